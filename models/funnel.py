"""Halving the number of tokens inside packed sequences, without a host synchronisation.

B texts, R packed rows, P packed rows after halving, H heads, K = Hkv key/value heads, D head width, W window,
J rows that a block may read.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .local import attend
from .packing import Packed


class Places(NamedTuple):
    """Where packed rows stand."""

    positions: Tensor  # [R], rising by at least 1 inside a sequence; integers, or means of them after a funnel
    sequence_ids: Tensor  # [R] int64
    packed: Packed


class Pairs(NamedTuple):
    """Neighbouring rows of a sequence, two and two; the last of an odd number stays alone."""

    first: Tensor  # [P] int64, row of the one; R for a pair that does not exist
    second: Tensor  # [P] int64, row of the other, or the same
    places: Places  # of the pairs

    def mean(self, x: Tensor) -> Tensor:
        """[R, ...] -> [P, ...]; 0 for a pair that does not exist."""
        return (take(x, self.first) + take(x, self.second)) / 2


def take(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], where row R is zero."""
    return F.pad(x, (*[0, 0] * (x.ndim - 1), 0, 1))[rows]


def pair_up(places: Places, num_texts: int) -> Pairs:
    """Pairs the rows of every sequence: N rows become ceil(N / 2), which stand at the mean of their positions.

    How many pairs there are depends on how many N are odd, which only the device knows. Their upper bound (R + B) / 2
    does not: as many are made, and those that do not exist form one sequence more, behind the B texts (with one text
    there are none). It has at most B rows, and nobody needs what comes of it.
    """
    packed, B = places.packed, num_texts
    P = (packed.num_tokens + B) // 2
    lengths_B = packed.cu_seqlens[: B + 1].diff()
    cu_pairs = F.pad(((lengths_B + 1) // 2).cumsum(0), (1, 0)).to(torch.int32)
    rows = torch.arange(P, device=cu_pairs.device)
    sequence_ids = torch.searchsorted(cu_pairs[1:].contiguous(), rows.to(torch.int32), right=True)  # B: does not exist
    text = sequence_ids.clamp(max=B - 1)
    within = rows - cu_pairs[:-1].long()[text]
    missing = sequence_ids == B
    first = torch.where(missing, packed.num_tokens, packed.cu_seqlens[text].long() + 2 * within)
    second = torch.where(first + 1 < packed.cu_seqlens[text + 1], first + 1, first)
    means = (take(places.positions, first) + take(places.positions, second)) / 2
    positions = torch.where(missing, rows - cu_pairs[-1], means)
    max_seqlen, extents = (packed.max_seqlen + 1) // 2, packed.num_positions()[:B]
    if B > 1:
        num_missing = (packed.cu_seqlens[-1:] + B) // 2 - cu_pairs[-1:]
        cu_pairs = torch.cat((cu_pairs, cu_pairs[-1:] + num_missing))
        max_seqlen, extents = max(max_seqlen, B), torch.cat((extents, num_missing.to(extents.dtype)))
    halved = Packed(take(packed.input_ids, first), positions.long(), cu_pairs, max_seqlen, extents)
    return Pairs(first, second, Places(positions, sequence_ids, halved))


def pooled_attention(q_PHD: Tensor, k_RKD: Tensor, v_RKD: Tensor, places: Places, pairs: Pairs, window: int) -> Tensor:
    """Each pair reads the rows of its own sequence at most ``window`` positions away from one of its two.

    Pairs are cut into blocks of W = min(window, max_seqlen). The rows of a block's pairs follow each other, 2W at most,
    and what they may read reaches W rows beyond them on either side. Time and memory O(P * 4W).

    Returns:
        [P, H, D]; anything finite for a pair that does not exist.
    """
    num_rows, num_pairs = k_RKD.shape[0], q_PHD.shape[0]
    W = max(1, min(window, places.packed.max_seqlen))
    num_blocks = -(-num_pairs // W)
    missing = num_blocks * W - num_pairs

    def blocks(x: Tensor, fill: int) -> Tensor:  # [P, ...] -> [n, W, ...]
        return F.pad(x, (*[0, 0] * (x.ndim - 1), 0, missing), value=fill).unflatten(0, (num_blocks, W))

    first_nW, second_nW = blocks(pairs.first, num_rows), blocks(pairs.second, num_rows)
    rows_nJ = first_nW[:, :1] - W + torch.arange(4 * W, device=q_PHD.device)
    is_row_nJ = (rows_nJ >= 0) & (rows_nJ < num_rows)
    rows_nJ = torch.where(is_row_nJ, rows_nJ, num_rows)

    position_nJ = take(places.positions, rows_nJ)[:, None, :]
    low_nW1, high_nW1 = (take(places.positions, rows)[:, :, None] for rows in (first_nW, second_nW))
    near = (position_nJ >= low_nW1 - window) & (position_nJ <= high_nW1 + window)
    own = take(places.sequence_ids, rows_nJ)[:, None, :] == blocks(pairs.places.sequence_ids, -1)[:, :, None]
    seen_nWJ = near & own & is_row_nJ[:, None, :]
    seen_nWJ = seen_nWJ | ~seen_nWJ.any(-1, keepdim=True)  # a pair that does not exist reads anything, so never NaN

    q_nHWD = blocks(q_PHD, 0).transpose(1, 2)
    k_nKJD, v_nKJD = (take(x, rows_nJ).transpose(1, 2) for x in (k_RKD, v_RKD))
    return attend(q_nHWD, k_nKJD, v_nKJD, seen_nWJ[:, None]).transpose(1, 2).flatten(0, 1)[:num_pairs]
