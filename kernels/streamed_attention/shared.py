"""One gradient of token states that many reads share."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class SharedGradient:
    """Buffers to which every read of the same states adds its part, so that there is one gradient of them, however many
    layers read: autograd would make one for each and add them up.

    Give it the token states [T, E], or the table [V, E] and the norm [E] that states are made of, and then the same to
    every ``streamed_attention``, as ``shared=``. The gradient comes to them after the last read of a backward pass.
    Whoever reads them in another way takes ``ticket`` as an input of an ``autograd.Function``, adds to ``buffers()``
    in its backward pass, and returns zeros for the ticket.

    One derivative, and no compiled or checkpointed pass that runs the backward in pieces.
    """

    def __init__(self, *tensors: Tensor):
        self.tensors = tuple(x.detach() for x in tensors)  # what is read, without a graph of its own
        self.gradients: tuple[Tensor, ...] = ()
        self.graph_task: int | None = None  # the backward pass that they belong to
        self.ticket = _Ticket.apply(self, *tensors)

    def buffers(self) -> tuple[Tensor, ...]:
        """Of the gradients by ``tensors``, zero at the first read of a backward pass. A table, whose rows come again
        and again, is summed in float32 at least."""
        task = torch._C._current_graph_task_id()
        if self.graph_task != task:  # also where an earlier pass ended before it came to the ticket
            self.gradients = tuple(torch.zeros_like(x, dtype=self._dtype(x)) for x in self.tensors)
            self.graph_task = task
        return self.gradients

    def take(self) -> list[Tensor]:
        found = [part.to(x.dtype) for part, x in zip(self.buffers(), self.tensors, strict=True)]
        self.gradients, self.graph_task = (), None
        return found

    def _dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype if len(self.tensors) == 1 else torch.promote_types(x.dtype, torch.float32)


class _Ticket(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shared, *tensors):
        ctx.save_for_backward(*(x.detach() for x in tensors))  # as every read does: one storage, which has a name here
        ctx.shared = shared
        return tensors[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        return None, *ctx.shared.take()
