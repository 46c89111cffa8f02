"""The torch backend: a chunk of tokens at a time, whose keys, values and scores stay in the caches of a CPU.

    forward     s = q k^T in units of log 2;  running maximum m, l = sum exp2(s - m), acc = sum exp2(s - m) v
    backward    p = exp2(s - lse);  dv = p^T dout;  ds = p (dout v^T - delta);  dk = scale ds^T q;  dq = scale ds k

Everything is computed in float32 (float64 for float64), also what comes in 16 bits, but for products with tokens where
``columns.product_dtype`` says so. Sums over chunks have the order of the tokens.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..threads import in_order
from . import columns, tokens
from .arguments import LN2, Arguments, Gradients, chunk_on_gpu, exact_dtype
from .pieces import Chunk, Piece, chunks
from .scratch import scratch

SCORE_BYTES = 2**20  # of the scores that one thread works on at a time

Read = tuple[Tensor, Tensor, Tensor]  # sums of weights times values [P, R, D] and of weights [P, R, 1]; highest score


def chunk_size(a: Arguments) -> int:
    """Tokens of a chunk. On a CPU a quarter of all, so that threads find work, but not so few that what goes on between
    products costs as much as they do, nor so many that their keys leave the caches; on a GPU as for its own kernels.
    """
    if a.q.is_cuda:
        return chunk_on_gpu(a)
    quarter = 1 << max(0, (a.num_tokens - 1) // 4).bit_length()  # it does not depend on how many threads there are
    return a.chunk or (min(2048, max(512, quarter)) if a.w_key.shape[0] <= 256 else 512)


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """(out [B, C, H, D] in q's dtype, lse [B, H, C] exact)."""
    dtype = exact_dtype(a.q.dtype)
    w, rows = columns.weights(a, dtype), _rows(a.q, a, dtype)
    queries = rows * (a.scale / LN2)
    shape = a.num_sequences, *rows.shape[1:]
    acc = rows.new_zeros(shape)  # [B, Hkv, R, D]
    total = rows.new_zeros(*shape[:-1], 1)
    peak = torch.full_like(total, -math.inf)

    def read(chunk: Chunk) -> list[Read]:
        start, stop, pieces = chunk
        x = tokens.states(a, start, stop).to(w.w_key.dtype)
        keys = columns.make(x, w, columns.turning(a, start, stop, dtype), a.num_kv_heads, a.eps, dtype).keys
        values = columns.values(x, w, a.num_kv_heads, dtype)
        return [_read(_of(queries, piece), piece.take(keys), piece.take(values), piece.seen) for piece in pieces]

    def merge(chunk: Chunk, reads: list[Read]) -> None:
        for piece, found in zip(chunk[2], reads, strict=True):
            _merge([part[piece.sequences] for part in (acc, total, peak)], found, piece)

    _each(a, read, merge)
    some = total > 0
    total = torch.where(some, total, 1.0)
    out = (acc / total).to(a.q.dtype).unflatten(2, (-1, a.q.shape[-3])).permute(0, 3, 1, 2, 4).flatten(2, 3)
    lse = torch.where(some, peak * LN2 + total.log(), -math.inf)
    return out.contiguous(), lse.view(a.num_sequences, *a.q.shape[-2:-4:-1])


def _each(a: Arguments, work: Callable[[Chunk], Any], add: Callable[[Chunk, Any], None]) -> None:
    cut = chunks(a.cu_seqlens, a.num_tokens, a.max_seqlen, a.num_kv_heads, chunk_size(a))
    in_order(work, cut, a.q.device, add)


def _read(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Read:
    """What queries [P, R, D] read of keys and values [P, D, N]."""
    acc, total = torch.empty_like(q), q.new_empty(*q.shape[:-1], 1)
    peak = torch.empty_like(total)
    for block in _blocks(q, k):
        scores = scratch.take("scores", (block.stop - block.start, q.shape[1], k.shape[2]), q)
        torch.bmm(q[block], k[block], out=scores)
        if seen is not None:
            scores.masked_fill_(~seen[block], -math.inf)
        highest = torch.amax(scores, -1, keepdim=True, out=peak[block])
        if seen is not None:
            highest = torch.where(highest == -math.inf, 0.0, highest)  # nothing seen: exp2(-inf)
        scores.sub_(highest).exp2_()
        torch.sum(scores, -1, keepdim=True, out=total[block])
        torch.bmm(scores, v[block].transpose(1, 2), out=acc[block])
    return acc, total, peak


def _merge(kept: Sequence[Tensor], found: Read, piece: Piece) -> None:
    """Adds what a piece has read to [P / Hkv, Hkv, R, ...] of what its sequences have read so far."""
    found = [part.view_as(whole) for part, whole in zip(found, kept, strict=True)]
    if piece.is_first:
        for part, whole in zip(found, kept, strict=True):
            whole.copy_(part)
        return
    (acc, total, peak), (acc_of, total_of, peak_of) = kept, found
    highest = torch.maximum(peak, peak_of)
    offset = highest if piece.seen is None else torch.where(highest == -math.inf, 0.0, highest)
    before, after = (peak - offset).exp2_(), (peak_of - offset).exp2_()
    acc.mul_(before).addcmul_(acc_of, after)
    total.mul_(before).addcmul_(total_of, after)
    peak.copy_(highest)


def backward(dout: Tensor, out: Tensor, lse: Tensor, a: Arguments, dx: Tensor | None) -> Gradients:
    """Gradients; that of the token states, or of the table, is added to ``dx``."""
    dtype = exact_dtype(a.q.dtype)
    w, rows = columns.weights(a, dtype), _rows(a.q, a, dtype)
    douts = _rows(dout, a, dtype)
    delta = (douts * _rows(out, a, dtype)).sum(-1, keepdim=True)  # [B, Hkv, R, 1]
    lse = lse.reshape(*delta.shape) / LN2
    queries = rows * (a.scale / LN2)
    of_sequences = queries, rows * a.scale, douts, lse, delta
    dq = torch.zeros_like(rows)
    dtoken_norm = None if a.token_norm is None else torch.zeros_like(a.token_norm, dtype=dtype)
    sums = [None if x is None else torch.zeros_like(x, dtype=dtype) for x in (w.w_key, w.w_value, w.bias, w.norm)]

    def differentiate(chunk: Chunk) -> tuple[list[Tensor], list[Tensor | None], tokens.Rows | None]:
        """Parts of dq, of the sums, and of the table's gradient; that of states is written here."""
        start, stop, pieces = chunk
        x = tokens.states(a, start, stop).to(w.w_key.dtype)
        made = columns.make(x, w, columns.turning(a, start, stop, dtype), a.num_kv_heads, a.eps, dtype)
        values = columns.values(x, w, a.num_kv_heads, dtype)
        dkeys, dvalues = (scratch.take(name, values.shape, values) for name in ("dkeys", "dvalues"))
        dqs = []
        for piece in pieces:
            k, v = piece.take(made.keys), piece.take(values)
            of_piece = [_of(part, piece) for part in of_sequences]
            is_whole = k.shape == values.shape
            dk, dv = (dkeys, dvalues) if is_whole else (torch.empty_like(k), torch.empty_like(v))
            dqs.append(torch.empty_like(of_piece[0]))
            for block in _blocks(of_piece[0], k):
                seen = None if piece.seen is None else piece.seen[block]
                blocks = *(part[block] for part in of_piece), k[block], v[block], seen
                _gradients(*blocks, dqs[-1][block], dk[block], dv[block])
            dkeys, dvalues = piece.put(dk, dkeys), piece.put(dv, dvalues)
        du, *small = columns.backward(dkeys, made, w)
        du, dvalues = du.to(x.dtype), dvalues.flatten(0, 1).to(x.dtype)
        parts = [torch.mm(du, x), torch.mm(dvalues, x), *small]
        if dx is None and dtoken_norm is None:
            return dqs, parts, None
        if a.ids is None and dx.dtype == x.dtype:
            dx[start:stop].addmm_(du.t(), w.w_key).addmm_(dvalues.t(), w.w_value)
            return dqs, parts, None
        part = torch.mm(du.t(), w.w_key).addmm_(dvalues.t(), w.w_value)
        if a.ids is None:
            dx[start:stop] += part
            return dqs, parts, None
        return dqs, parts, tokens.embedded(a).gradient(slice(start, stop), part)

    def add(chunk: Chunk, found: tuple[list[Tensor], list[Tensor | None], tokens.Rows | None]) -> None:
        dqs, parts, of_rows = found
        for part, piece in zip(dqs, chunk[2], strict=True):
            _add_queries(dq, part, piece)
        for part, whole in zip(parts, sums, strict=True):
            if whole is not None:
                whole += part
        if of_rows is not None:
            tokens.embedded(a).add(slice(*chunk[:2]), of_rows, dx, dtoken_norm)

    _each(a, differentiate, add)
    dq = dq.mul_(a.scale).unflatten(2, (-1, a.q.shape[-3])).permute(0, 3, 1, 2, 4).flatten(2, 3)
    dw_key, dw_value, dbias, dnorm = sums
    dbias = None if dbias is None else dbias.view(a.num_kv_heads, -1).sum(0)
    dnorm = None if dnorm is None else dnorm[:, 0]
    dq = dq.reshape(a.q.shape).to(a.q.dtype).contiguous()
    return Gradients(dq, dw_key, dw_value, dbias, dnorm, dtoken_norm)


def _gradients(
    queries: Tensor, rows: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, k: Tensor, v: Tensor,
    seen: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Of one block, into dq [P, R, D], dk and dv [P, D, N]; dq without its scale."""
    shape = *queries.shape[:2], k.shape[2]
    p = torch.bmm(queries, k, out=scratch.take("scores", shape, queries)).sub_(lse).exp2_()
    if seen is not None:
        p.masked_fill_(~seen, 0.0)
    torch.bmm(dout.transpose(1, 2), p, out=dv)
    ds = torch.bmm(dout, v, out=scratch.take("dscores", shape, queries)).sub_(delta).mul_(p)
    torch.bmm(rows.transpose(1, 2), ds, out=dk)
    torch.bmm(ds, k.transpose(1, 2), out=dq)


def _add_queries(dq: Tensor, part: Tensor, piece: Piece) -> None:
    """part [P, R, D] to dq [B, Hkv, R, D], or to [1, Hkv, R, D] of queries that all sequences share."""
    part = part.unflatten(0, (-1, dq.shape[1]))
    if dq.shape[0] == 1:
        dq += part.sum(0)
    else:
        dq[piece.sequences] += part


def _rows(x: Tensor, a: Arguments, dtype: torch.dtype) -> Tensor:
    """[B, C, H, D] or [C, H, D] -> [B or 1, Hkv, G * C, D]."""
    x = x if x.ndim == 4 else x[None]
    return x.to(dtype).unflatten(2, (a.num_kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3).contiguous()


def _of(x: Tensor, piece: Piece) -> Tensor:
    """[B or 1, Hkv, ...] -> [P, ...] of the piece's sequences."""
    num_sequences = piece.sequences.stop - piece.sequences.start
    x = x.expand(num_sequences, *x.shape[1:]) if x.shape[0] == 1 else x[piece.sequences]
    return x.flatten(0, 1)


def _blocks(q: Tensor, k: Tensor) -> list[slice]:
    """[P] in parts whose scores stay in the caches; on a GPU in one."""
    num_blocks, score_bytes = q.shape[0], q.shape[1] * k.shape[2] * q.element_size()
    step = num_blocks if q.is_cuda else max(1, SCORE_BYTES // score_bytes)
    return [slice(i, min(i + step, num_blocks)) for i in range(0, num_blocks, step)]
