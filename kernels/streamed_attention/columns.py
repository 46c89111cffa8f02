"""Keys of a chunk for the torch backend, with tokens last: [Hkv, D, n]. In place wherever a tensor is ours."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import Arguments, exact_dtype
from .scratch import scratch


class Weights(NamedTuple):
    """What makes keys and values: matrices in the dtype of products with tokens, the rest in that of computation."""

    w_key: Tensor
    w_value: Tensor
    bias: Tensor | None  # [Hkv * D, 1]
    norm: Tensor | None  # [D, 1]


class Keys(NamedTuple):
    """Keys, and what their gradient needs: z = u / rms(u) before weight and rotation (u itself without a norm)."""

    keys: Tensor  # [Hkv, D, n]
    z: Tensor  # [Hkv, D, n]
    inverse: Tensor | None  # [Hkv, 1, n], 1 / rms(u)
    tables: tuple[Tensor, Tensor] | None  # cos, sin [D/2, n]


def product_dtype(a: Arguments) -> torch.dtype:
    """Of products with tokens: bfloat16 where that is asked for and a CPU has units for it, which at width 512 are four
    fifths of the arithmetic; what they give is float32 again."""
    if a.q.dtype == torch.bfloat16 and a.q.device.type == "cpu" and _has_units():
        return torch.bfloat16
    return exact_dtype(a.q.dtype)


@cache
def _has_units() -> bool:
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def weights(a: Arguments, dtype: torch.dtype) -> Weights:
    in_products = product_dtype(a)
    return Weights(
        # copies are aligned: the last bit of a product depends on it
        *(w.to(in_products, copy=True) for w in (a.w_key, a.w_value)),
        None if a.key_bias is None else a.key_bias.to(dtype).repeat(a.num_kv_heads)[:, None],
        None if a.key_norm is None else a.key_norm.to(dtype)[:, None],
    )  # fmt: skip


def turning(a: Arguments, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """cos and sin [D/2, n] of tokens ``start`` to ``stop``."""
    if a.positions is None:
        return None
    angles = a.frequencies[:, None] * a.positions[start:stop].float()
    cos, sin = angles.cos(), angles.sin()
    if a.temperature != 1:
        cos, sin = cos * a.temperature, sin * a.temperature
    return cos.to(dtype), sin.to(dtype)


def project(w: Tensor, x: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """w x^T + bias into ``out`` [Hkv * D, n], whose dtype may be wider than that of w and x."""
    if w.dtype != out.dtype:
        out.copy_(torch.mm(w, x.t()))
        return out if bias is None else out.add_(bias)
    return torch.mm(w, x.t(), out=out) if bias is None else torch.addmm(bias, w, x.t(), out=out)


def make(
    x: Tensor, w: Weights, tables: tuple[Tensor, Tensor] | None, num_heads: int, eps: float, dtype: torch.dtype
) -> Keys:
    u = project(w.w_key, x, w.bias, scratch.take("u", (w.w_key.shape[0], x.shape[0]), x, dtype))
    z = u.view(num_heads, -1, x.shape[0])
    inverse, keys = None, z
    if w.norm is not None:
        squares = torch.mul(z, z, out=scratch.take("keys", z.shape, z))
        inverse = squares.mean(1, keepdim=True).add_(eps).rsqrt_()
        keys = torch.mul(z.mul_(inverse), w.norm, out=squares)
    if tables is not None:
        keys = _turn(keys, *tables, 1, scratch.take("turned", z.shape, z))
    return Keys(keys, z, inverse, tables)


def values(x: Tensor, w: Weights, num_heads: int, dtype: torch.dtype) -> Tensor:
    """[Hkv, D, n]"""
    out = scratch.take("values", (w.w_value.shape[0], x.shape[0]), x, dtype)
    return project(w.w_value, x, None, out).view(num_heads, -1, x.shape[0])


def backward(dkeys: Tensor, keys: Keys, w: Weights) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """du [Hkv * D, n], and what this chunk adds to the gradients of bias [Hkv * D, 1] and norm [D, 1]."""
    dbias = dnorm = None
    du = dkeys if keys.tables is None else _turn(dkeys, *keys.tables, -1, scratch.take("turned", dkeys.shape, dkeys))
    if w.norm is not None:
        product = torch.mul(du, keys.z, out=scratch.take("values", du.shape, du))  # nobody reads these any more
        dnorm = product.sum((0, 2))[:, None]
        mean = torch.matmul(w.norm.t() / w.norm.shape[0], product)  # [Hkv, 1, n]
        du = torch.mul(du, w.norm, out=product).addcmul_(keys.z, mean, value=-1).mul_(keys.inverse)
    du = du.flatten(0, 1)
    if w.bias is not None:
        dbias = du.sum(1, keepdim=True)
    return du, dbias, dnorm


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int, out: Tensor) -> Tensor:
    """[Hkv, D, n] by angles (sign 1) or back (sign -1); the pair (x[i], x[i + D/2]) by angle i."""
    a, b = x.chunk(2, dim=1)
    to_a, to_b = out.chunk(2, dim=1)
    torch.mul(a, cos, out=to_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=to_b).addcmul_(a, sin, value=sign)
    return out
