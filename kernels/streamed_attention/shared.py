"""One gradient of token states that many reads share."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Buffers:
    """What a backward pass adds up, by tensor; zero at its first read. Holds no graph: nodes of one may hold it.

    A table, whose rows come again and again, is summed in float32 at least.
    """

    def __init__(self, *tensors: Tensor):
        self.tensors = tuple(x.detach() for x in tensors)
        is_table = len(tensors) > 1
        self.dtypes = [torch.promote_types(x.dtype, torch.float32) if is_table else x.dtype for x in tensors]
        self.gradients: tuple[Tensor, ...] = ()
        self.graph_task: int | None = None  # the backward pass that they belong to

    def get(self) -> tuple[Tensor, ...]:
        task = torch._C._current_graph_task_id()
        if self.graph_task != task:  # also where an earlier pass ended before it came to the ticket
            pairs = zip(self.tensors, self.dtypes, strict=True)
            self.gradients, self.graph_task = tuple(torch.zeros_like(x, dtype=dtype) for x, dtype in pairs), task
        return self.gradients

    def take(self) -> list[Tensor]:
        found = [part.to(x.dtype) for part, x in zip(self.get(), self.tensors, strict=True)]
        self.gradients, self.graph_task = (), None
        return found


class SharedGradient:
    """Buffers to which every read of the same states adds its part, so that there is one gradient of them, however many
    layers read: autograd would make one for each and add them up.

    Give it the token states [T, E], or the table [V, E] and the norm [E] that states are made of, and it to every
    ``streamed_attention`` of them, as ``shared=``. The gradient comes to them after the last read of a backward pass.
    Whoever reads them in another way takes ``ticket`` as an input of an ``autograd.Function``, adds in its backward
    pass to ``buffers.get()``, and returns a zero for the ticket.

    One derivative, and no checkpoint that runs the backward pass in pieces (reentrant ones).
    """

    def __init__(self, *tensors: Tensor):
        self.buffers = Buffers(*tensors)
        self.ticket = _Ticket.apply(self.buffers, *tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is read, without its graph."""
        return self.buffers.tensors

    def is_of(self, *tensors: Tensor) -> bool:
        """Whether these are the tensors that it was given."""
        return len(tensors) == len(self.tensors) and all(
            (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())
            and a.untyped_storage()._cdata == b.untyped_storage()._cdata
            for a, b in zip(tensors, self.tensors, strict=True)
        )


class _Ticket(torch.autograd.Function):
    @staticmethod
    def forward(ctx, buffers, *tensors):
        ctx.save_for_backward(*(x.detach() for x in tensors))  # as every read does: one storage, which has a name here
        ctx.buffers = buffers
        return tensors[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        return None, *ctx.buffers.take()
