"""The specification of adaptive layer norm: plain torch, any floating dtype, every step visible to autograd.

    h_t = x_t + gate_b * branch_t                                  b: the sequence that row t belongs to
    y_t = (h_t - mean(h_t)) / sqrt(var(h_t) + eps) * (1 + scale_b) + shift_b
"""

import torch
from torch import Tensor


def per_token(modulation: Tensor, num_tokens: int, cu_seqlens: Tensor | None) -> Tensor:
    """[B,d] -> the row of each token: [T,d] packed, [B,1,d] padded."""
    if cu_seqlens is None:
        return modulation.unsqueeze(1)
    return torch.repeat_interleave(modulation, cu_seqlens.diff(), dim=0, output_size=num_tokens)


def reference_modulate(x: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor | None, eps: float) -> Tensor:
    shift, scale = (per_token(m, x.shape[0], cu_seqlens) for m in (shift, scale))
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred * torch.rsqrt(variance + eps) * (1 + scale) + shift


def reference_residual_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    h = x + per_token(gate, x.shape[0], cu_seqlens) * branch
    return h, reference_modulate(h, shift, scale, cu_seqlens, eps)
