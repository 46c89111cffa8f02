"""Which rows of which sequence a program owns, without a read-back of the lengths.

A slot is at most ``rows`` consecutive rows of one sequence. Packed, sequence b owns the slots from
``cu[b] // rows + b`` up to those of b + 1: never fewer than ``ceil(length / rows)``, because
``(a + n) // r - a // r >= ceil(n / r) - 1``. So the grid has ``T // rows + B`` slots, whatever the lengths are. A slot
finds its b by counting the sequences whose slots start at or before it; slots left over have no rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def slot_rows(cu_seqlens_ptr, slot, rows, B, N, PACKED: tl.constexpr, BLOCK_B: tl.constexpr):
    """The sequence of a slot and the first and last + 1 of its rows; no rows where first >= end.

    Packed: rows of [T,d], N = T. Padded: rows of one sequence's [N,d].
    """
    if PACKED:
        sequence = 0
        for start in range(1, B, BLOCK_B):
            index = start + tl.arange(0, BLOCK_B)  # [BLOCK_B]
            in_b = index < B
            first_slot = tl.load(cu_seqlens_ptr + index, mask=in_b, other=0) // rows + index
            sequence += tl.sum((in_b & (first_slot <= slot)).to(tl.int32), 0)
        begin = tl.load(cu_seqlens_ptr + sequence)
        finish = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), N)
        first = begin + (slot - begin // rows - sequence) * rows
    else:
        slots = tl.cdiv(N, rows)
        sequence = slot // slots
        finish = N
        first = (slot - sequence * slots) * rows
    return sequence, first, tl.minimum(first + rows, finish)


def num_slots(shape: torch.Size, cu_seqlens: Tensor | None, rows: int) -> int:
    if cu_seqlens is None:
        return shape[0] * triton.cdiv(shape[1], rows)
    return shape[0] // rows + cu_seqlens.shape[0] - 1


def sizes(shape: torch.Size, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """(B, N) of the kernels: N is T when packed."""
    return (shape[0], shape[1]) if cu_seqlens is None else (cu_seqlens.shape[0] - 1, shape[0])


def row_strides(tensor: Tensor | None) -> tuple[int, int, int]:
    """(b, t, d) strides of [B,N,d] or [T,d]."""
    if tensor is None:
        return (0, 0, 1)
    return tensor.stride() if tensor.ndim == 3 else (0, *tensor.stride())
