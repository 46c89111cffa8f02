"""The torch backend: batched matrix products and one softmax, differentiable by autograd.

As in bixt_attention, sequences run one after the other where that is known to be faster, else padded, side by side.
Holds the weights before and after normalisation, [B, H, N, C] each, for backward.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ..bixt_attention.eager import pays_to_pad


def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, normalize: str, eps: float
) -> tuple[Tensor, Tensor]:
    B, C, H, D = q.shape
    T, Hkv = k.shape[:2]
    # the heads of a group stand side by side as more concepts of the one head they share
    q = (q * scale).view(B, C, Hkv, H // Hkv, D).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B,Hkv,G*C,D]
    if not pays_to_pad(cu_seqlens, T, max_seqlen, C * H):
        parts = []
        for b, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            kv = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (k, v))  # [1,Hkv,N,D]
            valid = torch.ones(1, end - start, dtype=torch.bool, device=q.device)
            parts.append(attend(q[b : b + 1], *kv, valid, C, normalize, eps))
        out, mass = (torch.cat(part) for part in zip(*parts, strict=True))
    else:
        N = min(max_seqlen, T)
        rows = cu_seqlens[:-1, None].long() + torch.arange(N, device=q.device)  # [B,N]
        valid = rows < cu_seqlens[1:, None]
        rows = rows.clamp(max=T - 1).flatten()
        kv = (x.index_select(0, rows).unflatten(0, (B, N)).transpose(1, 2) for x in (k, v))  # [B,Hkv,N,D]
        out, mass = attend(q, *kv, valid, C, normalize, eps)
    return out.view(B, H, C, D).transpose(1, 2), mass.view(B, H, C)


def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, C: int, normalize: str, eps: float) -> tuple[Tensor, Tensor]:
    """q [B,Hkv,G*C,D], k and v [B,Hkv,N,D], valid [B,N] -> out [B,Hkv,G*C,D], mass [B,Hkv,G,C] in at least float32."""
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    valid = valid[:, None, :, None, None].to(exact)
    # in float32 also for its gradient: that of a concept which owns almost nothing overflows float16
    attention = (k @ q.mT).unflatten(-1, (-1, C)).softmax(-1, dtype=exact) * valid  # [B,Hkv,N,G,C]
    mass = attention.sum(2)
    num_tokens = valid.sum(2)  # [B,1,1,1]
    if normalize == "mean":
        total = mass + eps * num_tokens
        total = torch.where(total > 0, total, 1.0)  # no tokens, no weights: 0 / 1
        weight = (attention + eps * valid) / total.unsqueeze(2)
    else:
        weight = attention * (C / num_tokens.clamp(min=1)).unsqueeze(2)
    return weight.to(v.dtype).flatten(3).mT @ v, mass
