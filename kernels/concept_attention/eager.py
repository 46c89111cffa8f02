"""The torch backend of concept_attention: SDPA over the packed sequences, an explicit softmax where SDPA cannot serve.

Query heads that share a key head are extra rows of the same matrix product, so keys and values are never repeated.
On a CPU the lengths may be looked at: equal lengths become one batched call, ragged ones a loop without padding.
On a GPU, and while torch.compile traces, the lengths stay on the device and sequences are padded to max_seqlen.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import readable
from ..philox import keep_mask


def concept_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    scale: float, dropout_p: float, seed: Tensor | None, need_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    num_sequences, (num_concepts, num_heads, head_dim) = cu_seqlens.shape[0] - 1, q.shape[-3:]
    q = q.expand(num_sequences, -1, -1, -1) if q.ndim == 3 else q
    rows = q.unflatten(2, (k.shape[1], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, Hkv, G * C, D]
    if dropout_p > 0 or need_lse:
        with torch.autocast(q.device.type, enabled=False):  # it would take the scores back to 16 bits
            out, lse = _explicit(rows, k, v, cu_seqlens, max_seqlen, scale, dropout_p, seed, num_concepts)
    else:
        out, lse = _sdpa(rows, k, v, cu_seqlens, max_seqlen, scale), None
    out = out.reshape(num_sequences, num_heads, num_concepts, head_dim).transpose(1, 2)  # [B, C, H, D]
    return out, lse.reshape(num_sequences, num_heads, num_concepts) if need_lse else None


def _sdpa(rows: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    lengths = cu_seqlens.diff().tolist() if readable(cu_seqlens) and not cu_seqlens.is_cuda else None
    if lengths is None or k.shape[0] == 0:
        keys, values, seen = _pad(k, v, cu_seqlens, max_seqlen)
        return F.scaled_dot_product_attention(rows, keys, values, attn_mask=seen[:, None, None, :], scale=scale)
    if len(set(lengths)) == 1:
        keys, values = (x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in (k, v))  # [B, Hkv, N, D]
        return F.scaled_dot_product_attention(rows, keys, values, scale=scale)
    outs = []
    # split, not slices: its backward is one concatenation instead of a full-length sum for every sequence
    for query, keys, values in zip(rows.split(1), k.split(lengths), v.split(lengths), strict=True):
        if keys.shape[0] == 0:
            outs.append(query.masked_fill(torch.ones((), dtype=torch.bool), 0.0))
        else:
            keys, values = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
            outs.append(F.scaled_dot_product_attention(query, keys, values, scale=scale))
    return torch.cat(outs)


def _explicit(
    rows: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    scale: float, dropout_p: float, seed: Tensor | None, num_concepts: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax written out, for the log-sum-exp and for a dropout mask that does not depend on the backend.

    In float32 for 16-bit inputs: results that are to be merged must not carry the rounding of 16-bit scores.
    """
    exact = torch.promote_types(rows.dtype, torch.float32)
    keys, values, seen = (x.to(exact) if x.is_floating_point() else x for x in _pad(k, v, cu_seqlens, max_seqlen))
    scores = rows.to(exact) @ keys.transpose(-1, -2) * scale
    scores = scores.masked_fill(~seen[:, None, None, :], -torch.inf)  # [B, Hkv, G * C, N]
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.unsqueeze(-1))
    if dropout_p > 0:
        row = torch.arange(rows.shape[2], device=rows.device)[:, None]
        b, h_kv = (torch.arange(n, device=rows.device) for n in rows.shape[:2])
        h = h_kv[:, None, None] * (rows.shape[2] // num_concepts) + row // num_concepts
        keep = keep_mask(seed, dropout_p, b[:, None, None, None], h, row % num_concepts, keys.shape[2])
        weights = torch.where(keep, weights / (1 - dropout_p), 0.0)
    empty = (cu_seqlens.diff() == 0)[:, None, None]
    return (weights @ values).to(rows.dtype), lse.masked_fill(empty, -torch.inf)


def _pad(k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor, Tensor]:
    """k, v [T, Hkv, D] as [B, Hkv, N, D], and seen [B, N]. Past its end a sequence reads a row of zeros.

    An empty sequence sees exactly one such row: its output and every gradient are then zero, not NaN.
    """
    num_tokens = k.shape[0]
    position = torch.arange(max(max_seqlen, 1), device=k.device)
    index = cu_seqlens[:-1, None] + position
    valid = index < cu_seqlens[1:, None]
    index = torch.where(valid, index, num_tokens)
    empty = (cu_seqlens[1:] == cu_seqlens[:-1])[:, None]
    keys, values = (F.pad(x, (0, 0, 0, 0, 0, 1))[index].transpose(1, 2) for x in (k, v))
    return keys, values, valid | (empty & (position == 0))
