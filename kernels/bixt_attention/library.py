"""bixt_attention in Triton for autograd and torch.compile: registered operators, gradient, builds.

More concepts than one tile holds run as the two one-way operators, each with a similarity of its own: four products
forward instead of three, fourteen backward at most instead of seven.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..build import Build
from ..concept_attention import backward as concept_backward
from ..concept_attention import forward as concept_forward
from ..splits import check_supported
from ..token_attention import backward as token_backward
from ..token_attention import forward as token_forward
from ..tracing import distinct
from . import backward, forward

_library = torch.library.Library("conceptron", "FRAGMENT")
_library.define(
    "bixt_attention(Tensor concept_qk, Tensor concept_v, Tensor token_qk, Tensor token_v, Tensor cu_seqlens, "
    "SymInt max_seqlen, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "bixt_attention_backward(Tensor? dconcept_out, Tensor? dtoken_out, Tensor concept_qk, Tensor concept_v, "
    "Tensor token_qk, Tensor token_v, Tensor concept_out, Tensor lse, Tensor offset, Tensor share, "
    "Tensor cu_seqlens, SymInt max_seqlen, float scale) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _forward(concept_qk, concept_v, token_qk, token_v, cu_seqlens, max_seqlen, scale):
    concept_qk, concept_v, token_qk, token_v = (_unit_stride(x) for x in (concept_qk, concept_v, token_qk, token_v))
    packed = cu_seqlens, max_seqlen, scale
    with torch.cuda.device_of(token_qk):
        if _fits_one_tile(concept_qk):
            return forward.forward(concept_qk, concept_v, token_qk, token_v, *packed)
        concept_out, lse = concept_forward.forward(concept_qk, token_qk, token_v, *packed, 0.0, None)
        token_out = token_forward.forward(token_qk, concept_qk, concept_v, *packed, 0.0, None)
    return concept_out, token_out, lse, *(lse.new_zeros(token_qk.shape[:2]) for _ in range(2))  # these are not used


def _backward(
    dconcept_out, dtoken_out, concept_qk, concept_v, token_qk, token_v, concept_out, lse, offset, share, *packed
):  # fmt: skip
    dconcept_out = concept_out.new_zeros(concept_out.shape) if dconcept_out is None else _unit_stride(dconcept_out)
    dtoken_out = token_qk.new_zeros(token_qk.shape) if dtoken_out is None else _unit_stride(dtoken_out)
    concept_qk, concept_v, token_qk, token_v = (_unit_stride(x) for x in (concept_qk, concept_v, token_qk, token_v))
    saved = concept_out.contiguous(), lse.contiguous()
    with torch.cuda.device_of(token_qk):
        if _fits_one_tile(concept_qk):
            inputs = concept_qk, concept_v, token_qk, token_v
            saved = *saved, offset.contiguous(), share.contiguous()
            return backward.backward(dconcept_out, dtoken_out, *inputs, *saved, *packed)
        dconcept_qk, dtoken_qk, dtoken_v = concept_backward.backward(
            dconcept_out, None, concept_qk, token_qk, token_v, *saved, *packed, 0.0, None
        )
        from_tokens, from_concepts, dconcept_v = token_backward.backward(
            dtoken_out, token_qk, concept_qk, concept_v, *packed, 0.0, None
        )
    return dconcept_qk.add_(from_concepts), dconcept_v, dtoken_qk.add_(from_tokens), dtoken_v


def _fits_one_tile(concept_qk: Tensor) -> bool:
    return forward.tile_of(backward.TILES, concept_qk) is not None


def _unit_stride(x: Tensor) -> Tensor:
    """Kernels take any strides but the last, which must be 1: the one copy that strides can cost."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


for _key in ("CPU", "CUDA"):  # on the CPU in Triton's interpreter only; the door has checked
    _library.impl("bixt_attention", _forward, _key)
    _library.impl("bixt_attention_backward", _backward, _key)


@torch.library.register_fake("conceptron::bixt_attention", lib=_library)
def _(concept_qk, concept_v, token_qk, token_v, cu_seqlens, max_seqlen, scale):
    num_sequences, num_concepts, num_heads, _ = concept_qk.shape
    lse = concept_qk.new_empty(num_sequences, num_heads, num_concepts, dtype=torch.float32)
    offset, share = (token_qk.new_empty(token_qk.shape[:2], dtype=torch.float32) for _ in range(2))
    return concept_qk.new_empty(concept_qk.shape), token_qk.new_empty(token_qk.shape), lse, offset, share


@torch.library.register_fake("conceptron::bixt_attention_backward", lib=_library)
def _(dconcept_out, dtoken_out, concept_qk, concept_v, token_qk, token_v, *rest):
    return tuple(x.new_empty(x.shape) for x in (concept_qk, concept_v, token_qk, token_v))


class _BixtAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, concept_qk, concept_v, token_qk, token_v, cu_seqlens, max_seqlen, scale):
        ctx.set_materialize_grads(False)
        inputs = concept_qk, concept_v, token_qk, token_v
        arguments = *inputs, cu_seqlens, max_seqlen, scale
        concept_out, token_out, *weights = torch.ops.conceptron.bixt_attention(*arguments)
        ctx.save_for_backward(*inputs, concept_out, *weights, cu_seqlens)
        ctx.scalars = max_seqlen, scale
        return concept_out, token_out

    @staticmethod
    @once_differentiable
    def backward(ctx, dconcept_out, dtoken_out):
        if dconcept_out is None and dtoken_out is None:
            return (None,) * 7
        gradients = torch.ops.conceptron.bixt_attention_backward(
            dconcept_out, dtoken_out, *ctx.saved_tensors, *ctx.scalars
        )
        return *gradients, None, None, None


def bixt_attention(
    concept_qk: Tensor, concept_v: Tensor, token_qk: Tensor, token_v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_supported("concept_qk", concept_qk)
    tensors = distinct(concept_qk, concept_v, token_qk, token_v, cu_seqlens.contiguous())
    return _BixtAttention.apply(*tensors, max_seqlen, scale)


def builds() -> list[Build]:
    return forward.builds() + backward.builds()
