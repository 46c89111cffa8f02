"""The oracle of concept_attention: eager torch, sequence by sequence, in the dtype given (float64 for the truth)."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from ..philox import keep_mask


def concept_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor,
    *, scale: float | None = None, dropout_p: float = 0.0, seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, C, H, D], lse [B, H, C] in float32, or float64 for float64 inputs). Shapes as at the door."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    num_sequences, num_groups = cu_seqlens.numel() - 1, q.shape[-2] // k.shape[-2]
    q = q.expand(num_sequences, -1, -1, -1) if q.ndim == 3 else q
    outs, lses = [], []
    for b, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        keys, values = (x[start:end].repeat_interleave(num_groups, dim=1) for x in (k, v))  # [N, H, D]
        scores = torch.einsum("chd,nhd->hcn", q[b], keys) * scale
        weights = scores.softmax(-1)
        if dropout_p > 0:
            h, c = (torch.arange(n, device=q.device) for n in scores.shape[:2])
            keep = keep_mask(seed, dropout_p, torch.full_like(c, b)[:, None], h[:, None, None], c[:, None], end - start)
            weights = torch.where(keep, weights / (1 - dropout_p), 0.0)
        outs.append(torch.einsum("hcn,nhd->chd", weights, values))
        lses.append(scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1))
    if not outs:
        return q.clone(), q.new_empty(0, *q.shape[2:0:-1])
    return torch.stack(outs), torch.stack(lses)
