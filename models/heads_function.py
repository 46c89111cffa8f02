"""Heads in one pass: projection, bias, norm and rotation, with nothing kept but what their gradient needs.

R rows, d model width, H heads, D head width.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Angles = tuple[Tensor, Tensor]  # cos, sin [R, 1, D/2], or ready to broadcast to it


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, norm, eps, cos, sin):
        num_heads, head_dim = weight.shape[0] // bias.shape[0], bias.shape[0]
        u = torch.addmm(bias.repeat(num_heads), x, weight.t()).unflatten(1, (num_heads, head_dim))
        size = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
        inverse = size.square_().div_(head_dim).add_(eps).rsqrt_()
        z = u.mul_(inverse)
        ctx.save_for_backward(x, weight, norm, z, inverse, cos, sin)
        heads = z * norm
        return heads if cos is None else _turned(heads, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dheads):
        x, weight, norm, z, inverse, cos, sin = ctx.saved_tensors
        dheads = dheads if cos is None else _turned(dheads, cos, sin, -1)
        product = dheads * z
        dnorm = product.sum((0, 1))
        mean = product @ (norm / norm.shape[0])
        du = (dheads * norm).addcmul_(z, mean[..., None], value=-1).mul_(inverse)
        dbias, du = du.sum((0, 1)), du.flatten(1)
        dx = du @ weight if ctx.needs_input_grad[0] else None
        dweight = du.t() @ x if ctx.needs_input_grad[1] else None
        return dx, dweight, dbias, dnorm, None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """[R, H, D] by angles (sign 1) or back (sign -1): (x[i], x[i + D/2]) by angle i, as ``positions.rotate``."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    a, b = x.chunk(2, dim=-1)
    to_a, to_b = out.chunk(2, dim=-1)
    torch.mul(a, cos, out=to_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=to_b).addcmul_(a, sin, value=sign)
    return out


def serves(x: Tensor, *parameters: Tensor) -> bool:
    """Whether ``heads`` computes what the modules would: in one dtype of at least 32 bits, and not while torch.compile
    traces, which fuses the modules' own operations."""
    return (
        x.dtype in (torch.float32, torch.float64) and all(parameter.dtype == x.dtype for parameter in parameters)
        and not torch.is_autocast_enabled(x.device.type) and not torch.compiler.is_compiling()
    )  # fmt: skip


def heads(x: Tensor, weight: Tensor, bias: Tensor, norm: Tensor, eps: float, angles: Angles | None) -> Tensor:
    """x [..., d], weight [H * D, d], bias [D] and norm [D] of every head, angles of the rows -> [..., H, D].

        turn(rmsnorm(x W^T + bias) * norm, angles)

    Backward keeps x, the normalised heads and one number a head. One derivative only.
    """
    cos, sin = (None, None) if angles is None else (part.to(x.dtype).flatten(0, -3) for part in angles)
    if cos is not None and cos.shape[0] != x.shape[:-1].numel():  # one for all sequences
        cos, sin = (part.expand(*x.shape[:-1], *part.shape[-2:]).flatten(0, -3) for part in (cos, sin))
    out = _Heads.apply(x.flatten(0, -2), weight, bias, norm, eps, cos, sin)
    return out.unflatten(0, x.shape[:-1])
