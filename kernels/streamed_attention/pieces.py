"""How the torch backend cuts a packed row: chunks of tokens whose keys exist at one time, and in them pieces, one
batched product each.

On a CPU lengths are looked at: a chunk is a run of whole sequences or a part of one, and a piece is sequences of equal
length. On a GPU lengths stay on the device: chunks end anywhere, and the sequences of a chunk are one piece, padded.
Tensors of a chunk have tokens last, [Hkv, D, n]: rows of one channel are what elementwise operations are fast on.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor


class Piece:
    """Sequences ``first`` to ``last`` of one length, in columns ``start`` to ``stop`` of a chunk; P is their number
    times that of key heads.
    """

    seen: Tensor | None = None  # [P, 1, N], False where a column belongs to nobody

    def __init__(self, first: int, last: int, start: int, stop: int, is_first: bool = True):
        self.sequences, self.columns = slice(first, last), slice(start, stop)
        self.is_first = is_first  # of the pieces of these sequences

    def take(self, x: Tensor) -> Tensor:
        """[Hkv, D, n] of the chunk -> [P, D, N]."""
        x = x[..., self.columns]
        num_sequences = self.sequences.stop - self.sequences.start
        return x if num_sequences == 1 else x.unflatten(2, (num_sequences, -1)).permute(2, 0, 1, 3).flatten(0, 1)

    def put(self, part: Tensor, x: Tensor) -> Tensor:
        """Its reverse, into ``x`` where the piece is not all of it; returns the whole."""
        num_sequences = self.sequences.stop - self.sequences.start
        if num_sequences > 1:
            part = part.unflatten(0, (num_sequences, -1)).permute(1, 2, 0, 3).flatten(2)
        if part.shape == x.shape:
            return part
        x[..., self.columns] = part
        return x


class Padded(Piece):
    """Every sequence, padded to ``length``; on the device, without a wait."""

    def __init__(self, cu_seqlens: Tensor, start: int, stop: int, length: int, num_kv_heads: int):
        super().__init__(0, cu_seqlens.shape[0] - 1, 0, stop - start, is_first=start == 0)
        bounds = (cu_seqlens.long() - start).clamp(0, stop - start)
        column = torch.arange(length, device=cu_seqlens.device)
        self.index = bounds[:-1, None] + column  # [B, N]
        seen = self.index < bounds[1:, None]
        self.index = torch.where(seen, self.index, 0)
        self.seen = seen.repeat_interleave(num_kv_heads, 0)[:, None]
        row = torch.arange(stop - start, device=cu_seqlens.device)
        owner = torch.searchsorted(bounds[1:].contiguous(), row, right=True)
        self.back = owner * length + row - bounds[owner]  # [n]

    def take(self, x: Tensor) -> Tensor:
        return x[:, :, self.index].permute(2, 0, 1, 3).flatten(0, 1)

    def put(self, part: Tensor, x: Tensor) -> Tensor:
        num_sequences = self.index.shape[0]
        return part.unflatten(0, (num_sequences, -1)).permute(1, 2, 0, 3).flatten(2)[:, :, self.back]


Chunk = tuple[int, int, list[Piece]]


def chunks(cu_seqlens: Tensor, num_tokens: int, max_seqlen: int, num_kv_heads: int, size: int) -> Iterator[Chunk]:
    """(first token, end, pieces) of every chunk, of at most ``size`` tokens."""
    if not cu_seqlens.is_cuda:
        yield from _readable(cu_seqlens.tolist(), size)
        return
    for start in range(0, num_tokens, size):
        stop = min(start + size, num_tokens)
        yield start, stop, [Padded(cu_seqlens, start, stop, min(max_seqlen, stop - start), num_kv_heads)]


def _readable(bounds: Sequence[int], size: int) -> Iterator[Chunk]:
    held: list[tuple[int, int, int]] = []  # (sequence, first token, end) of short sequences that will share a chunk
    for b, (start, stop) in enumerate(pairwise(bounds)):
        if held and stop - held[0][1] > size:
            yield _shared(held)
            held = []
        if stop - start > size:
            num_parts = -(-(stop - start) // size)
            cuts = [start + (stop - start) * i // num_parts for i in range(num_parts + 1)]
            for left, right in pairwise(cuts):
                yield left, right, [Piece(b, b + 1, 0, right - left, is_first=left == start)]
        elif stop > start:
            held.append((b, start, stop))
    if held:
        yield _shared(held)


def _shared(held: list[tuple[int, int, int]]) -> Chunk:
    origin, end = held[0][1], held[-1][2]
    pieces, i = [], 0
    while i < len(held):
        j, length = i + 1, held[i][2] - held[i][1]
        # neighbours of one length, without an empty sequence between
        while j < len(held) and held[j][0] == held[j - 1][0] + 1 and held[j][2] - held[j][1] == length:
            j += 1
        pieces.append(Piece(held[i][0], held[j - 1][0] + 1, held[i][1] - origin, held[j - 1][2] - origin))
        i = j
    return origin, end, pieces
