"""The oracle of token_attention: eager torch, sequence by sequence, in the dtype given (float64 for the truth)."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from ..philox import keep_mask


def token_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor,
    *, scale: float | None = None, dropout_p: float = 0.0, seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """out [T, H, D]. Shapes as at the door."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    num_groups = q.shape[1] // k.shape[2]
    outs = [q[:0]]
    for b, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        keys, values = (x[b].repeat_interleave(num_groups, dim=1) for x in (k, v))  # [C, H, D]
        weights = (torch.einsum("nhd,chd->hnc", q[start:end], keys) * scale).softmax(-1)
        if dropout_p > 0:
            h, n = (torch.arange(size, device=q.device) for size in weights.shape[:2])
            b_n = torch.full_like(n, b)[:, None]
            keep = keep_mask(seed, dropout_p, b_n, h[:, None, None], n[:, None], weights.shape[2])
            weights = torch.where(keep, weights / (1 - dropout_p), 0.0)
        outs.append(torch.einsum("hnc,chd->nhd", weights, values))
    return torch.cat(outs)
