"""token_attention in Triton for autograd and torch.compile: registered operators, gradient, builds."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..build import Build
from ..splits import check_supported
from ..tracing import distinct
from . import backward, forward

_library = torch.library.Library("conceptron", "FRAGMENT")
_library.define(
    "token_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, float scale, "
    "float dropout_p, Tensor? seed) -> Tensor"
)
_library.define(
    "token_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, "
    "float scale, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)"
)


def _forward(q, k, v, *rest):
    with torch.cuda.device_of(q):  # Triton launches on the current device
        return forward.forward(*(_unit_stride(x) for x in (q, k, v)), *rest)


def _backward(dout, q, k, v, *rest):
    with torch.cuda.device_of(q):
        return backward.backward(dout, *(_unit_stride(x) for x in (q, k, v)), *rest)


def _unit_stride(x: Tensor) -> Tensor:
    """Kernels take any strides but the last, which must be 1: the one copy that strides can cost."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


for _key in ("CPU", "CUDA"):  # on the CPU in Triton's interpreter only; the door has checked
    _library.impl("token_attention", _forward, _key)
    _library.impl("token_attention_backward", _backward, _key)


@torch.library.register_fake("conceptron::token_attention", lib=_library)
def _(q, k, v, cu_seqlens, max_seqlen, scale, dropout_p, seed):
    return q.new_empty(q.shape)


@torch.library.register_fake("conceptron::token_attention_backward", lib=_library)
def _(dout, q, k, v, cu_seqlens, max_seqlen, scale, dropout_p, seed):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _TokenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, max_seqlen, scale, dropout_p, seed):
        ctx.save_for_backward(q, k, v, cu_seqlens, seed)
        ctx.scalars = max_seqlen, scale, dropout_p
        return torch.ops.conceptron.token_attention(q, k, v, cu_seqlens, max_seqlen, scale, dropout_p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, cu_seqlens, seed = ctx.saved_tensors
        gradients = torch.ops.conceptron.token_attention_backward(dout, q, k, v, cu_seqlens, *ctx.scalars, seed)
        return *gradients, None, None, None, None, None


def token_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    scale: float, dropout_p: float, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    check_supported("q", q)
    tensors = distinct(q, k, v, cu_seqlens.contiguous())
    return _TokenAttention.apply(*tensors, max_seqlen, scale, dropout_p, seed)


def builds() -> list[Build]:
    return forward.builds() + backward.builds()
