"""The torch backend of token_attention: SDPA over the packed sequences, and an explicit softmax under dropout.

Query heads that share a key head are extra rows of the same matrix product, so keys and values are never repeated.
On a CPU the lengths may be looked at: equal lengths become one batched call, ragged ones a loop without padding.
On a GPU, and while torch.compile traces, the lengths stay on the device and the queries are padded to max_seqlen.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import readable
from ..philox import keep_mask


def token_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    scale: float, dropout_p: float, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    num_kv_heads = k.shape[2]
    keys, values = k.transpose(1, 2), v.transpose(1, 2)  # [B, Hkv, C, D]
    lengths = cu_seqlens.diff().tolist() if readable(cu_seqlens) and not cu_seqlens.is_cuda else None
    if dropout_p > 0 or lengths is None or q.shape[0] == 0:
        with torch.autocast(q.device.type, enabled=False):  # it would take the scores back to 16 bits
            return _padded(q, keys, values, cu_seqlens, max_seqlen, scale, dropout_p, seed)
    if len(set(lengths)) == 1:
        return _pack(_attend(_rows(q.unflatten(0, (len(lengths), -1)), num_kv_heads), keys, values, scale), q)
    outs = []
    # split, not slices: its backward is one concatenation instead of a full-length sum for every sequence
    for query, key, value in zip(q.split(lengths), keys.split(1), values.split(1), strict=True):
        if query.shape[0]:
            outs.append(_pack(_attend(_rows(query[None], num_kv_heads), key, value, scale), query))
    return torch.cat(outs)


def _padded(
    q: Tensor, keys: Tensor, values: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    scale: float, dropout_p: float, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    num_tokens, num_heads, num_kv_heads = q.shape[0], q.shape[1], keys.shape[1]
    position = torch.arange(max(max_seqlen, 1), device=q.device)
    index = cu_seqlens[:-1, None] + position  # [B, N]
    index = torch.where(index < cu_seqlens[1:, None], index, num_tokens)
    rows = _rows(F.pad(q, (0, 0, 0, 0, 0, 1))[index], num_kv_heads)  # past its end a sequence asks with zeros
    if dropout_p > 0:
        group = num_heads // num_kv_heads
        row = torch.arange(rows.shape[2], device=q.device)[:, None]
        b, h_kv = (torch.arange(n, device=q.device) for n in rows.shape[:2])
        h = h_kv[:, None, None] * group + row % group
        keep = keep_mask(seed, dropout_p, b[:, None, None, None], h, row // group, keys.shape[2])
        exact = torch.promote_types(q.dtype, torch.float32)
        scores = rows.to(exact) @ keys.to(exact).transpose(-1, -2) * scale
        weights = torch.where(keep, scores.softmax(-1) / (1 - dropout_p), 0.0)
        out = (weights @ values.to(exact)).to(q.dtype)
    else:
        out = _attend(rows, keys, values, scale)
    out = out.unflatten(2, (position.shape[0], -1)).transpose(1, 2).flatten(2, 3)  # [B, N, H, D]
    token = torch.arange(num_tokens, device=q.device)
    sequence = torch.bucketize(token, cu_seqlens[1:], right=True)
    return out[sequence, token - cu_seqlens[sequence]]


def _rows(q: Tensor, num_kv_heads: int) -> Tensor:
    """[B, N, H, D] -> [B, Hkv, N * G, D]."""
    return q.unflatten(2, (num_kv_heads, -1)).transpose(1, 2).flatten(2, 3)


def _attend(rows: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(rows, keys, values, scale=scale)


def _pack(out: Tensor, like: Tensor) -> Tensor:
    """[B, Hkv, N * G, D] -> like's [T, H, D]."""
    group = like.shape[1] // out.shape[1]
    return out.unflatten(2, (-1, group)).transpose(1, 2).reshape(like.shape)
