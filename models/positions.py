"""Where tokens and concepts stand, and how attention learns it: rotary embeddings on both sides.

B sequences, T packed tokens, N tokens of one sequence, C concepts, H heads, D head width.
"""

import math

import torch
from torch import Tensor

from .packing import Packed


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """positions [...] of any real type -> cos, sin [..., 1, D/2] float32, ready to broadcast over heads.

    Angle i is position * theta^(-2i/D). Nothing is kept in a buffer, so a cast of the model to bfloat16 cannot
    round the frequencies. Source: Su et al. 2021 (RoFormer), arXiv:2104.09864.
    """
    steps = torch.arange(head_dim // 2, device=positions.device, dtype=torch.float32)
    frequencies = torch.exp(steps * (-2.0 * math.log(theta) / head_dim))
    angles = (positions.float()[..., None] * frequencies)[..., None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """x [..., H, D] turned by cos, sin [..., 1, D/2]: the pair (x[i], x[i + D/2]) by angle i. Keeps every norm."""
    cos, sin = (part.to(x.dtype) for part in angles)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def anchors(num_positions_B: Tensor, num_concepts: int) -> Tensor:
    """[B] -> [B, C] float32: concept i stands in the middle of the i-th of C equal parts of its sequence.

    a_i = (i + 1/2) / C * N - 1/2, so that for C = N it is i, and any C and N fit each other.
    """
    steps_C = torch.arange(num_concepts, device=num_positions_B.device, dtype=torch.float32)
    return (steps_C + 0.5) / num_concepts * num_positions_B.float()[:, None] - 0.5


def segment_offsets(packed: Packed, num_concepts: int) -> Tensor:
    """[B*C + 1] int64: rows ``offsets[b*C + i]`` to ``offsets[b*C + i + 1]`` hold the tokens of part i of sequence b.

    Part i covers positions ceil(i*N/C) to ceil((i+1)*N/C) - 1; parts may be empty.
    """
    device, num_positions_B = packed.cu_seqlens.device, packed.num_positions()
    if packed.num_sequences == 0:
        return torch.zeros(1, dtype=torch.int64, device=device)
    steps_C = torch.arange(num_concepts, device=device)
    first_BC = -(-(steps_C * num_positions_B[:, None]) // num_concepts)  # exact ceiling, in integers
    # one rising key over the whole packed row: sequences are kept apart by a stride above every position
    stride = num_positions_B.max() + 1
    wanted_BC = torch.arange(packed.num_sequences, device=device)[:, None] * stride + first_BC
    starts = torch.searchsorted(packed.sequence_ids() * stride + packed.position_ids, wanted_BC.flatten())
    return torch.cat((starts, packed.cu_seqlens[-1:].long()))
