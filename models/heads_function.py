"""Heads in one pass: projection, bias, norm and rotation, with nothing kept but what their gradient needs.

R rows, d model width, H heads, D head width.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.threads import in_order

ROWS = 1024

Angles = tuple[Tensor, Tensor]  # cos, sin [R, 1, D/2], or ready to broadcast to it


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, norm, eps, cos, sin):
        num_heads, head_dim = weight.shape[0] // bias.shape[0], bias.shape[0]
        z, inverse = x.new_empty(x.shape[0], num_heads, head_dim), x.new_empty(x.shape[0], num_heads, 1)
        out, biases = torch.empty_like(z), bias.repeat(num_heads)

        def work(part: slice) -> None:
            z_of, inverse_of, out_of = z[part], inverse[part], out[part]
            torch.addmm(biases, x[part], weight.t(), out=z_of.view(-1, weight.shape[0]))
            torch.linalg.vector_norm(z_of, dim=-1, keepdim=True, out=inverse_of)
            z_of.mul_(inverse_of.square_().div_(head_dim).add_(eps).rsqrt_())
            if cos is None:
                torch.mul(z_of, norm, out=out_of)
            else:
                _turn(z_of * norm, cos[part], sin[part], 1, out_of)

        in_order(work, parts(x), x.device)
        ctx.save_for_backward(x, weight, norm, z, inverse, cos, sin)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dheads):
        x, weight, norm, z, inverse, cos, sin = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        sums = [torch.zeros_like(norm), torch.zeros_like(norm)]  # of bias and norm
        if ctx.needs_input_grad[1]:
            sums.append(torch.zeros_like(weight))

        def work(part: slice) -> list[Tensor]:
            z_of, dout = z[part], dheads[part]
            dout = dout if cos is None else _turn(dout, cos[part], sin[part], -1, z_of.new_empty(z_of.shape))
            product = dout * z_of
            mean = product @ (norm / norm.shape[0])
            du = (dout * norm).addcmul_(z_of, mean[..., None], value=-1).mul_(inverse[part])
            found, du = [du.sum((0, 1)), product.sum((0, 1))], du.flatten(1)
            if dx is not None:
                torch.mm(du, weight, out=dx[part])
            return found if len(sums) == 2 else [*found, du.t() @ x[part]]

        def add(part: slice, found: list[Tensor]) -> None:
            for whole, of_part in zip(sums, found, strict=True):
                whole += of_part

        in_order(work, parts(x), x.device, add)
        dbias, dnorm, *dweight = sums
        return dx, *(dweight or [None]), dbias, dnorm, None, None, None


def parts(x: Tensor) -> list[slice]:
    """Rows that go through all of it while they are in the caches of a CPU."""
    step = ROWS if x.device.type == "cpu" else max(1, x.shape[0])
    return [slice(i, min(i + step, x.shape[0])) for i in range(0, x.shape[0], step)]


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int, out: Tensor) -> Tensor:
    """[R, H, D] by angles (sign 1) or back (sign -1): (x[i], x[i + D/2]) by angle i, as ``positions.rotate``."""
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
