"""The specification of slot attention: plain torch, any floating dtype, one sequence after the other.

    A_cn   = softmax over c of scale * <q_c, k_n>        per sequence and head, c < C, n < N
    mass_c = sum_n A_cn
    "mean":  out_c = sum_n (A_cn + eps) v_n / sum_n (A_cn + eps)
    "sum":   out_c = sum_n A_cn v_n / (N / C)

A sequence without tokens has out = 0 and mass = 0.
"""

from itertools import pairwise

import torch
from torch import Tensor


def reference_slot_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, normalize: str, eps: float
) -> tuple[Tensor, Tensor]:
    C, H = q.shape[1:3]
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))  # a group of heads shares one of k and v
    out, mass = [q.new_zeros(0, *q.shape[1:])], [q.new_zeros(0, H, C)]
    for b, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        attention = (scale * torch.einsum("chd,nhd->hcn", q[b], k[start:end])).softmax(1)
        weight = attention
        if normalize == "mean":
            weight = (attention + eps) / (attention + eps).sum(2, keepdim=True)
        elif end > start:
            weight = attention / ((end - start) / C)
        out.append(torch.einsum("hcn,nhd->chd", weight, v[start:end]).unsqueeze(0))
        mass.append(attention.sum(2).unsqueeze(0))
    return torch.cat(out), torch.cat(mass)
