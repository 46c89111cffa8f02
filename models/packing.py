"""Packed batches: B sequences in one row of T tokens, with no padding anywhere.

B sequences, T packed tokens, N tokens of one sequence.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Packed(NamedTuple):
    """B sequences end to end. Sequence b is rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``; it may be empty.

    Positions rise strictly inside a sequence but may leave gaps: a token that was deleted is simply absent, and those
    that stay keep the position they had.
    """

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, position of each token within its own sequence
    cu_seqlens: Tensor  # [B+1] int32
    max_seqlen: int  # at least the longest sequence; a Python int, so that nothing is read back from the device
    extents: Tensor | None = None  # [B] int64, N before tokens were left out; None: none was at the end
    states: Tensor | None = None  # [T, e] what a frozen backbone made of these very texts, where that is known
    embeds: Tensor | None = None  # [T, e] in place of the rows of the table of embeddings; input_ids are then -1
    own: Tensor | None = None  # [T] bool, False where a token is only there for its neighbours (``sharding.shard``)

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Packed":
        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=non_blocking)

        tensors = (self.input_ids, self.position_ids, self.cu_seqlens)
        others = (self.extents, self.states, self.embeds, self.own)
        return Packed(*(move(x) for x in tensors), self.max_seqlen, *(move(x) for x in others))

    def num_positions(self) -> Tensor:
        """[B] int64: sequence b has the positions 0 to ``num_positions[b] - 1``, whether or not they hold a token."""
        if self.extents is not None:
            return self.extents
        starts, ends = self.cu_seqlens[:-1].long(), self.cu_seqlens[1:].long()
        before = F.pad(self.position_ids, (1, 0))  # row i holds the position of row i - 1: no case for T = 0
        return torch.where(ends > starts, before[ends] + 1, 0)

    def sequence_ids(self) -> Tensor:
        """[T] int64: the sequence that each row belongs to."""
        return sequence_ids(self.cu_seqlens, self.num_tokens)

    def select(self, keep: Tensor) -> "Packed":
        """Only the rows where ``keep`` [T] bool is true; the others are absent, positions and extents stay."""
        kept = torch.zeros(self.num_tokens + 1, dtype=torch.int32, device=keep.device)
        kept[1:] = keep.cumsum(0)
        return Packed(
            self.input_ids[keep], self.position_ids[keep], kept[self.cu_seqlens.long()], self.max_seqlen,
            self.num_positions(), embeds=None if self.embeds is None else self.embeds[keep],
        )  # fmt: skip


def fitting_concepts(packed: Packed, tokens_per_concept: float, most: int) -> int:
    """C for a whole batch: one concept for so many tokens of its longest text, at least 1 and at most ``most``.

    Concepts of a batch are as many for all texts, [B, C, d]: sort texts by length, so that those of a batch are alike.
    """
    if not tokens_per_concept > 0:
        raise ValueError(f"tokens_per_concept: expected a number above 0, got {tokens_per_concept!r}")
    return max(1, min(most, math.ceil(packed.max_seqlen / tokens_per_concept)))


def sequence_ids(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """[T] int64: the sequence that each of the ``num_rows`` = ``cu_seqlens[-1]`` rows belongs to."""
    rows = torch.arange(num_rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)


def pack(sequences: Sequence[np.ndarray | Tensor | Sequence[int]]) -> Packed:
    """Packs B one-dimensional arrays of token ids, on the CPU; positions count from 0 in each.

    Raises:
        ValueError: an array is not one-dimensional; the message names its index.
    """
    arrays = [np.asarray(ids, dtype=np.int64) for ids in sequences]
    for i, ids in enumerate(arrays):
        if ids.ndim != 1:
            raise ValueError(f"sequences[{i}]: expected a one-dimensional array of ids, got shape {list(ids.shape)}")
    lengths = np.array([len(ids) for ids in arrays], dtype=np.int64)
    input_ids = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)
    return pack_flat(input_ids, positions_within(lengths), lengths)


def pack_flat(
    input_ids: np.ndarray, position_ids: np.ndarray, lengths: np.ndarray, extents: np.ndarray | None = None
) -> Packed:
    """Packs rows that already lie end to end: ids [T], positions [T], length of each of the B sequences."""
    return Packed(
        torch.from_numpy(np.ascontiguousarray(input_ids, dtype=np.int64)),
        torch.from_numpy(np.ascontiguousarray(position_ids, dtype=np.int64)),
        torch.from_numpy(offsets(lengths)),
        int(lengths.max()) if len(lengths) else 0,
        None if extents is None else torch.from_numpy(np.ascontiguousarray(extents, dtype=np.int64)),
    )


def join(*batches: Packed) -> Packed:
    """One batch of the sequences of all, in order."""
    ends = np.cumsum([batch.num_tokens for batch in batches])
    bounds = [batches[0].cu_seqlens]
    bounds += [batch.cu_seqlens[1:] + int(end) for batch, end in zip(batches[1:], ends, strict=False)]
    return Packed(
        torch.cat([batch.input_ids for batch in batches]), torch.cat([batch.position_ids for batch in batches]),
        torch.cat(bounds), max(batch.max_seqlen for batch in batches),
        torch.cat([batch.num_positions() for batch in batches]),
    )  # fmt: skip


def offsets(lengths: np.ndarray) -> np.ndarray:
    """[B] lengths -> [B+1] int32 running sums that start at 0."""
    cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=cu_seqlens[1:])
    if cu_seqlens[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"lengths: expected at most 2**31 - 1 tokens in one packed batch, got {cu_seqlens[-1]}")
    return cu_seqlens.astype(np.int32)


def positions_within(lengths: np.ndarray) -> np.ndarray:
    """[B] lengths -> [T] int64: 0 .. N-1 for each sequence in turn."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum(), dtype=np.int64) - np.repeat(starts, lengths)


def pack_padded(input_ids: Tensor, attention_mask: Tensor | None = None, max_seqlen: int | None = None) -> Packed:
    """Packs a padded batch, on its own device. With a mask, costs two host synchronisations (one with max_seqlen).

    Args:
        input_ids: [B, N] int64.
        attention_mask: [B, N], non-zero where a token is real; None means everywhere. Padding may stand on either side
            or in between: positions count real tokens only, so a padded batch and a packed one give the same result.
        max_seqlen: at least the longest text; by default read from the mask, and N where torch.compile or torch.export
            look on, which cannot read it.

    Raises:
        ValueError: a shape does not fit.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids: expected shape [B, N], got {list(input_ids.shape)}")
    B, N = input_ids.shape
    if attention_mask is None:
        cu_seqlens = torch.arange(B + 1, device=input_ids.device, dtype=torch.int32) * N
        positions = torch.arange(N, device=input_ids.device).repeat(B)
        return Packed(input_ids.reshape(-1), positions, cu_seqlens, N)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected input_ids' shape {list(input_ids.shape)}, got {list(attention_mask.shape)}"
        )
    valid_BN = attention_mask != 0
    lengths_B = valid_BN.sum(1)
    positions_BN = valid_BN.cumsum(1) - 1
    cu_seqlens = torch.zeros(B + 1, device=input_ids.device, dtype=torch.int32)
    cu_seqlens[1:] = lengths_B.cumsum(0)
    if max_seqlen is None:
        max_seqlen = N if torch.compiler.is_compiling() or B == 0 else int(lengths_B.max())
    return Packed(input_ids[valid_BN], positions_BN[valid_BN], cu_seqlens, max_seqlen)
