"""streamed_attention for autograd and torch.compile: registered operators, gradient, builds.

Both backends stand behind the same opaque operators, so that torch.compile sees neither their loops nor the number of
chunks. The gradient of token states is added to a tensor that the caller gives: many reads may share it.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..build import Build
from . import eager
from .arguments import Arguments, Gradients, exact_dtype
from .shared import SharedGradient

_library = torch.library.Library("conceptron", "FRAGMENT")
_ARGUMENTS = (
    "Tensor q, Tensor x, Tensor w_key, Tensor w_value, Tensor cu_seqlens, Tensor? key_bias, Tensor? key_norm, "
    "Tensor? positions, Tensor? frequencies, Tensor? ids, Tensor? token_norm, SymInt max_seqlen, float temperature, "
    "float token_eps, float eps, float scale, SymInt? chunk, str backend"
)
_library.define(f"streamed_attention({_ARGUMENTS}) -> (Tensor out, Tensor lse)")
_library.define(
    f"streamed_attention_backward(Tensor dout, Tensor out, Tensor lse, Tensor(a!)? dx, {_ARGUMENTS}) -> (Tensor dq, "
    "Tensor dw_key, Tensor dw_value, Tensor dkey_bias, Tensor dkey_norm, Tensor dtoken_norm)"
)
NUM_TENSORS = 11  # of Arguments: those that autograd keeps


def _backend(name: str):
    if name == "torch":
        return eager
    from . import fused  # not at the top: the torch backend works without triton

    return fused


def _forward(*arguments):
    *arguments, backend = arguments
    a = Arguments(*arguments)
    with torch.cuda.device_of(a.q), torch.autocast(a.q.device.type, enabled=False):  # it would round what is exact
        return _backend(backend).forward(a)


def _backward(dout, out, lse, dx, *arguments):
    *arguments, backend = arguments
    a = Arguments(*arguments)
    with torch.cuda.device_of(a.q), torch.autocast(a.q.device.type, enabled=False):
        found = _backend(backend).backward(dout, out.contiguous(), lse.contiguous(), a, dx)
    return tuple(lse.new_empty(0) if x is None else x for x in found)


_library.impl("streamed_attention", _forward, "CompositeExplicitAutograd")
_library.impl("streamed_attention_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("conceptron::streamed_attention", lib=_library)
def _(q, *rest):
    num_sequences, (num_concepts, num_heads, head_dim) = rest[3].shape[0] - 1, q.shape[-3:]
    out = q.new_empty(num_sequences, num_concepts, num_heads, head_dim)
    return out, q.new_empty(num_sequences, num_heads, num_concepts, dtype=exact_dtype(q.dtype))


@torch.library.register_fake("conceptron::streamed_attention_backward", lib=_library)
def _(dout, out, lse, dx, *arguments):
    a = Arguments(*arguments[:-1])
    like = a.w_key, a.w_value, a.key_bias, a.key_norm, a.token_norm
    return a.q.new_empty(a.q.shape), *(lse.new_empty(0 if x is None else x.shape) for x in like)


class _StreamedAttention(torch.autograd.Function):
    """With a ticket, x and token_norm have no graph, and their gradients go to its buffers."""

    @staticmethod
    def forward(ctx, ticket, buffers, backend, *arguments):
        out, lse = torch.ops.conceptron.streamed_attention(*arguments, backend)
        ctx.save_for_backward(*arguments[:NUM_TENSORS], out, lse)
        ctx.others = arguments[NUM_TENSORS:], buffers, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        *tensors, out, lse = ctx.saved_tensors
        scalars, buffers, backend = ctx.others
        a, wants = Arguments(*tensors, *scalars), Arguments(*ctx.needs_input_grad[3:])
        dx, of_norm, dticket = None, [], None
        if ctx.needs_input_grad[0]:
            dx, *of_norm = buffers.get()
            dticket = a.x.new_zeros(())
        elif wants.x:  # rows of a table come again and again, those of states once
            dx = torch.zeros_like(a.x, dtype=a.x.dtype if a.ids is None else exact_dtype(a.x.dtype))
        found = Gradients(*torch.ops.conceptron.streamed_attention_backward(dout, out, lse, dx, *a, backend))
        if of_norm:
            of_norm[0].add_(found.dtoken_norm)
        gradients = a._replace(
            q=found.dq, x=dx, w_key=found.dw_key, w_value=found.dw_value,
            key_bias=found.dkey_bias, key_norm=found.dkey_norm, token_norm=found.dtoken_norm,
        )  # fmt: skip
        cast = (
            part.to(x.dtype) if wanted and isinstance(x, Tensor) else None
            for part, x, wanted in zip(gradients, a, wants, strict=True)
        )
        return dticket, None, None, *cast


def streamed_attention(arguments: Arguments, shared: SharedGradient | None, backend: str) -> Tensor:
    ticket, buffers = (None, None) if shared is None else (shared.ticket, shared.buffers)
    return _StreamedAttention.apply(ticket, buffers, backend, *arguments)


def builds() -> list[Build]:
    """Every configuration that the Triton backend ships."""
    from . import fused  # not at the top: the torch backend works without triton

    return fused.builds()
