"""Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in torch integer arithmetic.

The dropout masks of the fused operators are functions of (seed, position) alone, so that splits, tiles and the
backward pass see the same mask; this is the same function for the oracles and the torch backend.
"""

import torch
from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_KEY_STEP_0, _KEY_STEP_1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
ROUNDS = 7  # the fewest that pass BigCrush (section 5 of the paper)


def philox(seed: Tensor, *counter: Tensor, rounds: int = ROUNDS) -> list[Tensor]:
    """Four int64 tensors of uint32 words, for a 64-bit key ``seed`` and four broadcastable uint32 counter words."""
    x0, x1, x2, x3 = torch.broadcast_tensors(*counter)
    key_0, key_1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(rounds):
        # the product wraps in int64; masking after the shift gives the unsigned high word all the same
        product_0, product_1 = x0 * _MULTIPLIER_0, x2 * _MULTIPLIER_1
        x0, x1, x2, x3 = (
            ((product_1 >> 32) & _LOW) ^ x1 ^ key_0,
            product_1 & _LOW,
            ((product_0 >> 32) & _LOW) ^ x3 ^ key_1,
            product_0 & _LOW,
        )
        key_0, key_1 = (key_0 + _KEY_STEP_0) & _LOW, (key_1 + _KEY_STEP_1) & _LOW
    return [x0, x1, x2, x3]


def drop_threshold(dropout_p: float) -> int:
    """A position is dropped when its word, read as int32, is below this."""
    return min(int(dropout_p * 2**32), _LOW) - 2**31


def keep_mask(seed: Tensor, dropout_p: float, b: Tensor, h: Tensor, row: Tensor, num_columns: int) -> Tensor:
    """Bool mask [broadcast of b, h, row (each [..., 1]), num_columns]: True where the attention weight is kept.

    Column j takes word j % 4 of philox(seed; j // 4, row, h, b).
    """
    group = torch.arange((num_columns + 3) // 4, device=seed.device)
    words = torch.stack(philox(seed, group, row, h, b), dim=-1)  # [..., ceil(num_columns / 4), 4]
    words = torch.where(words < 2**31, words, words - 2**32)  # as int32: what the kernels compare
    return words.flatten(-2)[..., :num_columns] >= drop_threshold(dropout_p)


def as_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """``seed`` as an int64 tensor [1] on ``device``, without synchronising; None draws one from torch's generator."""
    if seed is None:
        return torch.randint(0, 2**62, (1,), device=device, dtype=torch.int64)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"seed: expected one int64 on {device}, got {seed.dtype} {list(seed.shape)} on {seed.device}"
            )
        return seed.reshape(1)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, an int64 tensor or None, got {type(seed).__name__}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 <= seed < 2**63, got {seed}")
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def check_dropout(dropout_p: float) -> float:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: expected a float, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= dropout_p < 1, got {dropout_p}")
    return float(dropout_p)
