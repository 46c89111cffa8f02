"""slot_attention in Triton for autograd and torch.compile: registered operators, gradient, builds."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..build import Build
from ..splits import check_supported
from ..tracing import distinct
from . import backward, forward

_library = torch.library.Library("conceptron", "FRAGMENT")
_library.define(
    "slot_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, float scale, str normalize, "
    "float eps) -> (Tensor, Tensor)"
)
_library.define(
    "slot_attention_backward(Tensor? dout, Tensor? dmass, Tensor q, Tensor k, Tensor v, Tensor out, Tensor mass, "
    "Tensor cu_seqlens, SymInt max_seqlen, float scale, str normalize, float eps) -> (Tensor, Tensor, Tensor)"
)


def _forward(q, k, v, cu_seqlens, max_seqlen, scale, normalize, eps):
    q, k, v = (_unit_stride(x) for x in (q, k, v))
    with torch.cuda.device_of(q):
        return forward.forward(q, k, v, cu_seqlens, max_seqlen, scale, normalize, eps)


def _backward(dout, dmass, q, k, v, out, mass, cu_seqlens, max_seqlen, scale, normalize, eps):
    q, k, v = (_unit_stride(x) for x in (q, k, v))
    dout = out.new_zeros(out.shape) if dout is None else _unit_stride(dout)
    out, mass = out.contiguous(), mass.contiguous()
    with torch.cuda.device_of(q):
        return backward.backward(dout, dmass, q, k, v, out, mass, cu_seqlens, max_seqlen, scale, normalize, eps)


def _unit_stride(x: Tensor) -> Tensor:
    """Kernels take any strides but the last, which must be 1: the one copy that strides can cost."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


for _key in ("CPU", "CUDA"):  # on the CPU in Triton's interpreter only; the door has checked
    _library.impl("slot_attention", _forward, _key)
    _library.impl("slot_attention_backward", _backward, _key)


@torch.library.register_fake("conceptron::slot_attention", lib=_library)
def _(q, k, v, cu_seqlens, max_seqlen, scale, normalize, eps):
    num_sequences, num_concepts, num_heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(num_sequences, num_heads, num_concepts, dtype=torch.float32)


@torch.library.register_fake("conceptron::slot_attention_backward", lib=_library)
def _(dout, dmass, q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


class _SlotAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, max_seqlen, scale, normalize, eps):
        ctx.set_materialize_grads(False)
        ctx.scalars = max_seqlen, scale, normalize, eps
        out, mass = torch.ops.conceptron.slot_attention(q, k, v, cu_seqlens, *ctx.scalars)
        ctx.save_for_backward(q, k, v, out, mass, cu_seqlens)
        return out, mass

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dmass):
        if dout is None and dmass is None:
            return (None,) * 8
        gradients = torch.ops.conceptron.slot_attention_backward(dout, dmass, *ctx.saved_tensors, *ctx.scalars)
        return *gradients, None, None, None, None, None


def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, normalize: str, eps: float
) -> tuple[Tensor, Tensor]:
    check_supported("q", q)
    tensors = distinct(q, k, v, cu_seqlens.contiguous())
    return _SlotAttention.apply(*tensors, max_seqlen, scale, normalize, eps)


def builds() -> list[Build]:
    return forward.builds() + backward.builds()
