"""Exact merge of concept_attention results over disjoint sets of tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_float, check_tensor


def merge_partials(outs: Tensor | Sequence[Tensor], lses: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merges concept_attention over S token shards into the result over all their tokens.

        lse = log sum_s exp(lse_s)        out = sum_s exp(lse_s - lse) * out_s

    Exact, associative up to rounding, and differentiable in outs and lses: concept_attention takes the gradient of
    its lse, so every shard gets the gradient that the unsplit operator would have given it. The work is O(S C H D);
    only C rows, never tokens, travel between the devices that hold the shards.

    Args:
        outs: S tensors [B, C, H, D], or one stacked [S, B, C, H, D]; any floating dtype.
        lses: S tensors [B, H, C], or one stacked [S, B, H, C]; float32 (float64), natural log, as concept_attention
              returns them. A shard without tokens has lse = -inf and counts nothing.

    Returns:
        (out [B, C, H, D] in outs' dtype, lse [B, H, C]). Where no shard had a token: 0 and -inf, gradients 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    With attention dropout give every shard its own seed: positions count from the start of the shard.
    """
    outs, lses = _stack("outs", outs), _stack("lses", lses)
    check_tensor("outs", outs, "[S, B, C, H, D]", 5)
    check_tensor("lses", lses, "[S, B, H, C]", 4)
    check_float("outs", outs)
    if lses.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"lses: expected float32 or float64, got {lses.dtype}")
    if lses.device != outs.device:
        raise ValueError(f"lses: expected outs's device {outs.device}, got {lses.device}")
    num_shards, num_sequences, num_concepts, num_heads, _ = outs.shape
    expected = (num_shards, num_sequences, num_heads, num_concepts)
    if tuple(lses.shape) != expected:
        raise ValueError(f"lses: expected shape {list(expected)} (S, B, H, C of outs), got {list(lses.shape)}")
    if num_shards == 0:
        raise ValueError("outs: expected at least one shard, got none")

    largest = lses.detach().amax(0)
    largest = torch.where(largest == -torch.inf, 0.0, largest)  # no shard had a token: exp(-inf - 0) = 0, not NaN
    weights = torch.exp(lses - largest)  # [S, B, H, C]
    total = weights.sum(0)
    some = total > 0
    safe_total = torch.where(some, total, 1.0)
    share = (weights / safe_total).transpose(-1, -2).unsqueeze(-1)  # [S, B, C, H, 1]
    out = (share * outs).sum(0).to(outs.dtype)
    return out, torch.where(some, safe_total.log() + largest, -torch.inf)


def _stack(name: str, value: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, (list, tuple)) or not all(isinstance(part, Tensor) for part in value):
        raise TypeError(f"{name}: expected a tensor or a sequence of tensors, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{name}: expected at least one shard, got none")
    shapes = {tuple(part.shape) for part in value}
    if len(shapes) > 1:
        raise ValueError(f"{name}: expected shards of one shape, got {sorted(shapes)}")
    return torch.stack(tuple(value))
