"""Registration of the Triton kernels with torch.library, and their derivatives.

The operators are opaque to torch.compile and described to it by the fake functions. Autograd stands outside them
(`torch.autograd.Function`): it costs less in eager mode than a registered formula, and compiles all the same.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import fused
from .fused import builds as builds

LIBRARY = torch.library.Library("conceptron", "FRAGMENT")
LIBRARY.define(
    "adaln_modulate(Tensor x, Tensor shift, Tensor scale, Tensor? cu_seqlens, float eps, ScalarType out_dtype)"
    " -> (Tensor y, Tensor mean, Tensor rstd)"
)
LIBRARY.define(
    "adaln_modulate_backward(Tensor dy, Tensor x, Tensor shift, Tensor scale, Tensor mean, Tensor rstd,"
    " Tensor? cu_seqlens) -> (Tensor dx, Tensor dshift, Tensor dscale)"
)
LIBRARY.define(
    "adaln_residual_modulate(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, Tensor? cu_seqlens,"
    " float eps, ScalarType out_dtype) -> (Tensor h, Tensor y, Tensor mean, Tensor rstd)"
)
LIBRARY.define(
    "adaln_residual_modulate_backward(Tensor dy, Tensor? dh, Tensor h, Tensor branch, Tensor gate, Tensor shift,"
    " Tensor scale, Tensor mean, Tensor rstd, Tensor? cu_seqlens)"
    " -> (Tensor dx, Tensor dbranch, Tensor dgate, Tensor dshift, Tensor dscale)"
)
OPS = torch.ops.conceptron


def _modulate(x, shift, scale, cu_seqlens, eps, out_dtype):
    return fused.forward(x, None, None, shift, scale, cu_seqlens, eps, out_dtype)[1:]


def _modulate_backward(dy, x, shift, scale, mean, rstd, cu_seqlens):
    dx, _, _, dshift, dscale = fused.backward(dy, None, x, None, None, shift, scale, mean, rstd, cu_seqlens)
    return dx, dshift, dscale


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors)


def _fake_modulate(x, shift, scale, cu_seqlens, eps, out_dtype):
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    return y, mean, rstd


def _fake_modulate_backward(dy, x, shift, scale, mean, rstd, cu_seqlens):
    return _like(x, shift, scale)


def _fake_residual_modulate(x, branch, gate, shift, scale, cu_seqlens, eps, out_dtype):
    return (*_like(x), *_fake_modulate(x, shift, scale, cu_seqlens, eps, out_dtype))


def _fake_residual_modulate_backward(dy, dh, h, branch, gate, shift, scale, mean, rstd, cu_seqlens):
    return _like(h, branch, gate, shift, scale)


for name, launch, fake in (
    ("adaln_modulate", _modulate, _fake_modulate),
    ("adaln_modulate_backward", _modulate_backward, _fake_modulate_backward),
    ("adaln_residual_modulate", fused.forward, _fake_residual_modulate),
    ("adaln_residual_modulate_backward", fused.backward, _fake_residual_modulate_backward),
):
    for key in ("CUDA", "CPU"):  # on a CPU the kernels run in Triton's interpreter
        LIBRARY.impl(name, launch, key)
    torch.library.register_fake(f"conceptron::{name}", fake, lib=LIBRARY)


class Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale, cu_seqlens, eps, out_dtype):
        y, mean, rstd = OPS.adaln_modulate(x, shift, scale, cu_seqlens, eps, out_dtype)
        ctx.save_for_backward(x, shift, scale, mean, rstd, cu_seqlens)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx, dshift, dscale = OPS.adaln_modulate_backward(dy, *ctx.saved_tensors)
        return dx, dshift, dscale, None, None, None


class ResidualModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, gate, shift, scale, cu_seqlens, eps, out_dtype):
        ctx.set_materialize_grads(False)
        h, y, mean, rstd = OPS.adaln_residual_modulate(x, branch, gate, shift, scale, cu_seqlens, eps, out_dtype)
        ctx.save_for_backward(h, branch, gate, shift, scale, mean, rstd, cu_seqlens)
        return h, y

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, dy):
        h = ctx.saved_tensors[0]
        if dy is None:  # only h was used: a gradient of zero that takes one element
            dy = h.new_zeros(()).expand(h.shape)
        grads = OPS.adaln_residual_modulate_backward(dy, dh, *ctx.saved_tensors)
        return (*grads, None, None, None)
