"""The oracle of streamed_attention: all keys and values, then the oracle of concept_attention; in the dtype given.

    x_n = RMSNorm(x[ids_n]) * token_norm                                   where there are ids, else x_n
    k_n = turn(RMSNorm(w_key x_n + key_bias) * key_norm, position_n)       every head by itself, value heads w_value x_n
"""

import torch
from torch import Tensor

from ..concept_attention import reference


def streamed_attention(
    q: Tensor, x: Tensor, w_key: Tensor, w_value: Tensor, cu_seqlens: Tensor,
    *, key_bias: Tensor | None = None, key_norm: Tensor | None = None, positions: Tensor | None = None,
    frequencies: Tensor | None = None, temperature: float = 1.0, ids: Tensor | None = None,
    token_norm: Tensor | None = None, token_eps: float = 1e-6, eps: float = 1e-6, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """out [B, C, H, D]. Shapes as at the door."""
    if ids is not None:
        x = rms_norm(x[ids], token_eps) * token_norm
    keys, values = ((x @ weight.t()).unflatten(1, (-1, q.shape[-1])) for weight in (w_key, w_value))  # [T, Hkv, D]
    keys = keys if key_bias is None else keys + key_bias
    keys = keys if key_norm is None else rms_norm(keys, eps) * key_norm
    if positions is not None:
        angles = positions.to(frequencies.dtype)[:, None, None] * frequencies  # [T, 1, D/2]
        cos, sin = ((temperature * part).to(keys.dtype) for part in (angles.cos(), angles.sin()))
        a, b = keys.chunk(2, dim=-1)
        keys = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return reference.concept_attention(q, keys, values, cu_seqlens, scale=scale)[0]


def rms_norm(x: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
