"""The torch backend: two batched matrix products and one softmax, differentiable by autograd.

As in bixt_attention, sequences run one after the other where that is known to be faster, else padded, side by side.
Holds the weights [B, H, N, C] for backward, in at least float32. Results are linear in them, so they are normalised
after the product, and a column of ones beside v makes it leave the masses as well. Scores of float16 are float32 too,
because those above 65504 are no float16.
"""

import torch
from torch import Tensor

from ..bixt_attention.eager import pays_to_pad


def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, normalize: str, eps: float
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):  # it would take the scores and weights back to 16 bits
        return read(q, k, v, cu_seqlens, max_seqlen, scale, normalize, eps)


def read(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, normalize: str, eps: float
) -> tuple[Tensor, Tensor]:
    B, C, H, D = q.shape
    T, Hkv = k.shape[:2]
    if q.dtype == torch.float16:
        q, k = q.float(), k.float()
    # the heads of a group stand side by side as more concepts of the one head they share
    q = (q * scale).view(B, C, Hkv, H // Hkv, D).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B,Hkv,G*C,D]
    if not pays_to_pad(cu_seqlens, T, max_seqlen, C * H):
        parts, lengths = [], cu_seqlens.diff().tolist()
        # split, not slices: its backward is one concatenation instead of a full-length sum for every sequence
        for own, *kv in zip(q.split(1), k.split(lengths), v.split(lengths), strict=True):
            kv = (x.transpose(0, 1).unsqueeze(0) for x in kv)  # [1,Hkv,N,D]
            parts.append(attend(own, *kv, None, C, normalize, eps))
        out, mass = (torch.cat(part) for part in zip(*parts, strict=True))
    else:
        N = min(max_seqlen, T)
        rows = cu_seqlens[:-1, None].long() + torch.arange(N, device=q.device)  # [B,N]
        valid = rows < cu_seqlens[1:, None]
        rows = rows.clamp(max=T - 1).flatten()
        kv = (x.index_select(0, rows).unflatten(0, (B, N)).transpose(1, 2) for x in (k, v))  # [B,Hkv,N,D]
        out, mass = attend(q, *kv, valid, C, normalize, eps)
    return out.reshape(B, H, C, D).transpose(1, 2), mass.reshape(B, H, C)


def attend(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, C: int, normalize: str, eps: float
) -> tuple[Tensor, Tensor]:
    """q [B,Hkv,G*C,D], k and v [B,Hkv,N,D], valid [B,N] -> out [B,Hkv,G*C,D], mass [B,Hkv,G*C] in at least float32."""
    exact = torch.promote_types(q.dtype, torch.float32)
    attention = (k @ q.mT).unflatten(-1, (-1, C)).softmax(-1, dtype=exact).flatten(3)  # [B,Hkv,N,G*C]
    values = torch.cat([v.to(exact), v.new_ones(*v.shape[:-1], 1, dtype=exact)], -1)  # [B,Hkv,N,D+1]
    if valid is not None:
        values = values.masked_fill(~valid[:, None, :, None], 0.0)
    read = (values.mT @ attention).mT  # [B,Hkv,G*C,D+1]; so ordered, the weights' gradient is not transposed
    total = values.sum(2, keepdim=True)
    if normalize == "mean":
        weighted = read + eps * total
        divisor = weighted[..., -1:]
        out = weighted[..., :-1] / torch.where(divisor > 0, divisor, 1.0)  # no tokens, no weights: 0 / 1
    else:
        out = read[..., :-1] * (C / total[..., -1:].clamp(min=1))
    return out.to(v.dtype), read[..., -1]
