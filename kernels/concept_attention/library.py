"""concept_attention in Triton for autograd and torch.compile: registered operators, gradient, builds."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..build import Build
from ..splits import check_supported
from ..tracing import distinct
from . import backward, forward

_library = torch.library.Library("conceptron", "FRAGMENT")
_library.define(
    "concept_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, float scale, "
    "float dropout_p, Tensor? seed) -> (Tensor, Tensor)"
)
_library.define(
    "concept_attention_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor cu_seqlens, SymInt max_seqlen, float scale, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)"
)


def _forward(q, k, v, *rest):
    with torch.cuda.device_of(q):  # Triton launches on the current device
        return forward.forward(*(_unit_stride(x) for x in (q, k, v)), *rest)


def _backward(dout, dlse, q, k, v, out, lse, *rest):
    with torch.cuda.device_of(q):
        q, k, v = (_unit_stride(x) for x in (q, k, v))
        dout = torch.zeros_like(out) if dout is None else dout
        return backward.backward(dout, dlse, q, k, v, out.contiguous(), lse.contiguous(), *rest)


def _unit_stride(x: Tensor) -> Tensor:
    """Kernels take any strides but the last, which must be 1: the one copy that strides can cost."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


for _key in ("CPU", "CUDA"):  # on the CPU in Triton's interpreter only; the door has checked
    _library.impl("concept_attention", _forward, _key)
    _library.impl("concept_attention_backward", _backward, _key)


@torch.library.register_fake("conceptron::concept_attention", lib=_library)
def _(q, k, v, cu_seqlens, max_seqlen, scale, dropout_p, seed):
    num_sequences, (num_concepts, num_heads, head_dim) = cu_seqlens.shape[0] - 1, q.shape[-3:]
    out = q.new_empty(num_sequences, num_concepts, num_heads, head_dim)
    return out, q.new_empty(num_sequences, num_heads, num_concepts, dtype=torch.float32)


@torch.library.register_fake("conceptron::concept_attention_backward", lib=_library)
def _(dout, dlse, q, k, v, out, lse, cu_seqlens, max_seqlen, scale, dropout_p, seed):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _ConceptAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, max_seqlen, scale, dropout_p, seed):
        ctx.set_materialize_grads(False)
        out, lse = torch.ops.conceptron.concept_attention(q, k, v, cu_seqlens, max_seqlen, scale, dropout_p, seed)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, seed)
        ctx.scalars = max_seqlen, scale, dropout_p
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, cu_seqlens, seed = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 8
        gradients = torch.ops.conceptron.concept_attention_backward(
            dout, dlse, q, k, v, out, lse, cu_seqlens, *ctx.scalars, seed
        )
        return *gradients, None, None, None, None, None


def concept_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    scale: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_supported("q", q)
    tensors = distinct(q, k, v, cu_seqlens.contiguous())
    return _ConceptAttention.apply(*tensors, max_seqlen, scale, dropout_p, seed)


def builds() -> list[Build]:
    return forward.builds() + backward.builds()
