"""The torch backend: a chunk of tokens at a time, whose keys, values and scores stay in the caches of a CPU.

    forward     s = q k^T in units of log 2;  running maximum m, l = sum exp2(s - m), acc = sum exp2(s - m) v
    backward    p = exp2(s - lse);  dv = p^T dout;  ds = p (dout v^T - delta);  dk = scale ds^T q;  dq = scale ds k

Everything is computed in float32 (float64 for float64), also what comes in 16 bits. Sums over chunks have the order of
the tokens.
"""

import math

import torch
from torch import Tensor

from . import columns, tokens
from .arguments import LN2, Arguments, Gradients, chunk_on_gpu, exact_dtype
from .pieces import Piece, chunks

SCORE_BYTES = 512 * 1024  # of the scores that one thread works on at a time


def chunk_size(a: Arguments) -> int:
    """Tokens whose keys and scores stay in a CPU's second-level cache; on a GPU as for its own kernels."""
    if a.q.is_cuda:
        return chunk_on_gpu(a)
    return a.chunk or (1024 if a.w_key.shape[0] <= 256 else 512)


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """(out [B, C, H, D] in q's dtype, lse [B, H, C] exact)."""
    dtype = exact_dtype(a.q.dtype)
    w, rows = columns.weights(a, dtype), _rows(a.q, a, dtype)
    queries = rows * (a.scale / LN2)
    shape = a.num_sequences, *rows.shape[1:]
    acc = rows.new_zeros(shape)  # [B, Hkv, R, D]
    total = rows.new_zeros(*shape[:-1], 1)
    peak = torch.full_like(total, -math.inf)
    for start, stop, pieces in chunks(a.cu_seqlens, a.num_tokens, a.max_seqlen, a.num_kv_heads, chunk_size(a)):
        x = tokens.states(a, start, stop).to(dtype)
        keys = columns.make(x, w, columns.turning(a, start, stop, dtype), a.num_kv_heads, a.eps).keys
        values = torch.mm(w.w_value, x.t()).view_as(keys)
        for piece in pieces:
            q, k, v = _of(queries, piece), piece.take(keys), piece.take(values)
            of_piece = [part[piece.sequences].flatten(0, 1) for part in (acc, total, peak)]
            for block in _blocks(q, k):
                seen = None if piece.seen is None else piece.seen[block]
                _read(q[block], k[block], v[block], seen, *(part[block] for part in of_piece))
    some = total > 0
    total = torch.where(some, total, 1.0)
    out = (acc / total).to(a.q.dtype).unflatten(2, (-1, a.q.shape[-3])).permute(0, 3, 1, 2, 4).flatten(2, 3)
    lse = torch.where(some, peak * LN2 + total.log(), -math.inf)
    return out.contiguous(), lse.view(a.num_sequences, *a.q.shape[-2:-4:-1])


def _read(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, acc: Tensor, total: Tensor, peak: Tensor) -> None:
    """Adds keys and values [P, D, N] to what queries [P, R, D] have read so far."""
    scores = torch.bmm(q, k)
    if seen is not None:
        scores.masked_fill_(~seen, -math.inf)
    highest = torch.maximum(peak, scores.amax(-1, keepdim=True))
    offset = highest if seen is None else torch.where(highest == -math.inf, 0.0, highest)  # nothing seen: exp2(-inf)
    weights = scores.sub_(offset).exp2_()
    keep = (peak - offset).exp2_()
    peak.copy_(highest)
    total.mul_(keep).add_(weights.sum(-1, keepdim=True))
    torch.baddbmm(acc.mul_(keep), weights, v.transpose(1, 2), out=acc)


def backward(dout: Tensor, out: Tensor, lse: Tensor, a: Arguments, dx: Tensor | None) -> Gradients:
    """Gradients; that of the token states, or of the table, is added to ``dx``."""
    dtype = exact_dtype(a.q.dtype)
    w, rows = columns.weights(a, dtype), _rows(a.q, a, dtype)
    douts = _rows(dout, a, dtype)
    delta = (douts * _rows(out, a, dtype)).sum(-1, keepdim=True)  # [B, Hkv, R, 1]
    lse = lse.reshape(*delta.shape) / LN2
    dq = torch.zeros_like(rows)
    dw_key, dw_value = torch.zeros_like(w.w_key), torch.zeros_like(w.w_value)
    dbias, dnorm = (None if x is None else torch.zeros_like(x) for x in (w.bias, w.norm))
    dtoken_norm = None if a.token_norm is None else torch.zeros_like(a.token_norm, dtype=dtype)
    queries = rows * (a.scale / LN2)
    rows = rows * a.scale
    for start, stop, pieces in chunks(a.cu_seqlens, a.num_tokens, a.max_seqlen, a.num_kv_heads, chunk_size(a)):
        x = tokens.states(a, start, stop).to(dtype)
        made = columns.make(x, w, columns.turning(a, start, stop, dtype), a.num_kv_heads, a.eps)
        values = torch.mm(w.w_value, x.t()).view_as(made.keys)
        dkeys, dvalues = torch.empty_like(values), torch.empty_like(values)
        for piece in pieces:
            k, v = piece.take(made.keys), piece.take(values)
            of_piece = [_of(x, piece) for x in (queries, rows, douts, lse, delta)]
            dk, dv, dq_piece = torch.empty_like(k), torch.empty_like(v), torch.empty_like(of_piece[0])
            for block in _blocks(of_piece[0], k):
                seen = None if piece.seen is None else piece.seen[block]
                blocks = *(x[block] for x in of_piece), k[block], v[block], seen
                _gradients(*blocks, dq_piece[block], dk[block], dv[block])
            _add_queries(dq, dq_piece, piece)
            dkeys, dvalues = piece.put(dk, dkeys), piece.put(dv, dvalues)
        du, dvalues = columns.backward(dkeys, made, w, dbias, dnorm), dvalues.flatten(0, 1)
        dw_key.addmm_(du, x)
        dw_value.addmm_(dvalues, x)
        if dx is not None or dtoken_norm is not None:
            _add_tokens(a, w, dx, du, dvalues, dtoken_norm, start, stop)
    dq = dq.mul_(a.scale).unflatten(2, (-1, a.q.shape[-3])).permute(0, 3, 1, 2, 4).flatten(2, 3)
    dbias = None if dbias is None else dbias.view(a.num_kv_heads, -1).sum(0)
    dnorm = None if dnorm is None else dnorm[:, 0]
    dq = dq.reshape(a.q.shape).to(a.q.dtype).contiguous()
    return Gradients(dq, dw_key, dw_value, dbias, dnorm, dtoken_norm)


def _gradients(
    queries: Tensor, rows: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, k: Tensor, v: Tensor,
    seen: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Of one block, into dq [P, R, D], dk and dv [P, D, N]; dq without its scale."""
    p = torch.bmm(queries, k).sub_(lse).exp2_()
    if seen is not None:
        p.masked_fill_(~seen, 0.0)
    torch.bmm(dout.transpose(1, 2), p, out=dv)
    ds = torch.bmm(dout, v).sub_(delta).mul_(p)
    torch.bmm(rows.transpose(1, 2), ds, out=dk)
    torch.bmm(ds, k.transpose(1, 2), out=dq)


def _add_queries(dq: Tensor, part: Tensor, piece: Piece) -> None:
    """part [P, R, D] to dq [B, Hkv, R, D], or to [1, Hkv, R, D] of queries that all sequences share."""
    part = part.unflatten(0, (-1, dq.shape[1]))
    if dq.shape[0] == 1:
        dq += part.sum(0)
    else:
        dq[piece.sequences] += part


def _add_tokens(
    a: Arguments, w: columns.Weights, dx: Tensor | None, du: Tensor, dvalues: Tensor, dtoken_norm: Tensor | None,
    start: int, stop: int,
) -> None:  # fmt: skip
    if a.ids is None and dx.dtype == du.dtype:
        dx[start:stop].addmm_(du.t(), w.w_key).addmm_(dvalues.t(), w.w_value)
    else:
        part = torch.mm(du.t(), w.w_key).addmm_(dvalues.t(), w.w_value)
        tokens.add_gradient(a, dx, part, dtoken_norm, start, stop)


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
    """[P] in parts whose scores stay in the caches, at least as many at a time as there are threads, which share a
    batched product by its batch; on a GPU in one."""
    num_blocks, score_bytes = q.shape[0], q.shape[1] * k.shape[2] * q.element_size()
    step = num_blocks if q.is_cuda else max(torch.get_num_threads(), SCORE_BYTES // score_bytes)
    return [slice(i, min(i + step, num_blocks)) for i in range(0, num_blocks, step)]
