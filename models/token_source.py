"""Token states that all layers read in chunks: what a training step keeps of a token, and one gradient for all layers.

B sequences, T packed tokens, C concepts, H heads, Hkv key/value heads, D head width, d model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from ..kernels.streamed_attention import eager
from ..kernels.streamed_attention.arguments import Arguments
from .config import ConceptConfig
from .packing import Packed

KEEPS = ("keys", "states", "ids")
ROWS = 2048  # of tokens that are embedded at one time


def check_keep(config: ConceptConfig, keep: str | None) -> None:
    """What of a token an encoder of this configuration may keep, see ``ConceptEncoder``.

    Raises:
        ValueError: it cannot; the message begins with "keep".
    """
    if keep not in (None, *KEEPS):
        raise ValueError(f"keep: expected one of {', '.join(KEEPS)} or None, got {keep!r}")
    if keep in ("states", "ids") and config.layer_kind != "cross":
        raise ValueError(f"keep: expected keys with layer_kind = {config.layer_kind}, got {keep!r}")
    is_plain = (
        config.num_token_layers == 0 and config.token_dim == config.hidden_size and config.token_positions == "rope"
    )
    if keep == "ids" and not is_plain:
        raise ValueError(
            "keep: expected keys or states, got 'ids', which needs token embeddings that nothing but the norm follows: "
            "num_token_layers = 0, token_dim = hidden_size, token_positions = rope"
        )


class Embedded(NamedTuple):
    """States that are made again wherever they are needed: RMSNorm(table[ids]) * norm."""

    ids: Tensor  # [T] int64
    table: Tensor  # [V, d]
    norm: Tensor  # [d]
    eps: float

    def rows(self, part: slice) -> tuple[Tensor, Tensor]:
        """(normalised rows [n, d] before the norm's weight, 1 / rms [n, 1])"""
        wide = torch.promote_types(self.table.dtype, torch.float32)
        rows = self.table.index_select(0, self.ids[part]).to(wide)
        inverse = (rows.square().mean(1, keepdim=True) + self.eps).rsqrt_()
        return rows.mul_(inverse), inverse

    def add_gradient(self, part: slice, dx: Tensor, dtable: Tensor, dnorm: Tensor) -> None:
        z, inverse = self.rows(part)
        dx = dx.to(z.dtype)
        dnorm += (dx * z).sum(0)
        dz = dx * self.norm
        dz.addcmul_(z, (dz * z).mean(1, keepdim=True), value=-1).mul_(inverse)
        ids = self.ids[part]
        if dtable.is_cuda:  # sorts, where index_add_ would use atomics
            torch.ops.aten._index_put_impl_(dtable, [ids], dz.to(dtable.dtype), accumulate=True, unsafe=True)
        else:
            dtable.index_add_(0, ids, dz.to(dtable.dtype))


class Where(NamedTuple):
    """Where tokens stand; their angles are made chunk by chunk."""

    positions: Tensor  # [T]
    frequencies: Tensor | None  # [D/2] float32 radians per position; None: nothing turns
    temperature: float  # of the turned keys


class TokenReader(nn.Module):
    """Makes the source of a batch; a module without parameters, so that what it keeps has a name."""

    def forward(
        self, states: Tensor | Embedded, packed: Packed, where: Where, dtype: torch.dtype | None = None
    ) -> "TokenSource":
        """With a ``dtype``, states to be embedded are embedded here, once for all layers."""
        return TokenSource(states if dtype is None else embed(states, dtype), packed, where)


class TokenSource:
    """The states of a batch, and one buffer for their gradient.

    Whatever reads them adds its gradient to the buffer, chunk by chunk. What autograd sees of them is ``ticket``, a
    number on which every read depends: its backward pass is the last of all, and hands the buffer on. So x and one dx
    are all that lives of a token, however many layers read it, and with ``Embedded`` states not even these: their
    buffer is that of the table.
    """

    def __init__(self, states: Tensor | Embedded, packed: Packed, where: Where):
        self.packed, self.where = packed, where
        self.is_embedded = isinstance(states, Embedded)
        self.gradients: tuple[Tensor, ...] = ()
        self.graph_task = None  # the backward pass that they belong to
        if self.is_embedded:
            self.states = states._replace(table=states.table.detach(), norm=states.norm.detach())
            self.ticket = _Ticket.apply(self, states.table, states.norm)
        else:
            self.states = states.detach()
            self.ticket = _Ticket.apply(self, states)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the gradients belong to."""
        return (self.states.table, self.states.norm) if self.is_embedded else (self.states,)

    @property
    def num_tokens(self) -> int:
        return len(self.states.ids) if self.is_embedded else len(self.states)

    def buffers(self) -> tuple[Tensor, ...]:
        """Of the gradients by ``tensors``, zero at the first read of a backward pass."""
        task = torch._C._current_graph_task_id()
        if self.graph_task != task:  # also where an earlier pass ended before it came to the ticket
            self.gradients, self.graph_task = tuple(torch.zeros_like(x) for x in self.tensors), task
        return self.gradients

    def take(self) -> tuple[Tensor, ...]:
        gradients = self.buffers()
        self.gradients, self.graph_task = (), None
        return gradients

    def read(
        self, q_BCHD: Tensor, w_key: Tensor, w_value: Tensor, key_bias: Tensor, key_norm: Tensor, eps: float
    ) -> Tensor:
        """What concepts read, [B, C, H, D]; weights [Hkv * D, d], bias and norm [D] of every head."""
        key_bias = key_bias.repeat(w_key.shape[0] // key_bias.shape[0])
        return _Read.apply(self.ticket, q_BCHD, w_key, w_value, key_bias, key_norm, self, eps, *self.tensors)

    def segment_means(self, offsets: Tensor) -> Tensor:
        """offsets [S + 1] of tokens -> their means [S, d]; 0 where there is none."""
        return _Means.apply(self.ticket, offsets, self, *self.tensors)

    def arguments(self, q: Tensor, w_key: Tensor, w_value: Tensor, bias: Tensor, norm: Tensor, eps: float) -> Arguments:
        states, (positions, frequencies, temperature) = self.states, self.where
        of_ids = (states.ids, states.norm) if self.is_embedded else (None, None)
        return Arguments(
            q, states.table if self.is_embedded else states, w_key, w_value, self.packed.cu_seqlens, bias, norm,
            None, None, None if frequencies is None else positions, frequencies, *of_ids, self.packed.max_seqlen,
            temperature, states.eps if self.is_embedded else 0.0, eps, q.shape[-1] ** -0.5, None,
        )  # fmt: skip


class _Ticket(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source, *tensors):
        ctx.save_for_backward(*(x.detach() for x in tensors))  # as every read does: one storage, which has a name here
        ctx.source = source
        return tensors[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        return None, *ctx.source.take()


class _Read(torch.autograd.Function):
    """``tensors`` of the source are given without their graph, for autograd to keep and to guard against changes."""

    @staticmethod
    def forward(ctx, ticket, q, w_key, w_value, bias, norm, source, eps, *tensors):
        a = source.arguments(q, w_key, w_value, bias, norm, eps)
        if isinstance(q, FakeTensor):  # sizes without content
            out = q.new_empty(source.packed.num_sequences, *q.shape[-3:])
            lse = q.new_empty(source.packed.num_sequences, *q.shape[-2:-4:-1], dtype=torch.float32)
        else:
            with torch.autocast(q.device.type, enabled=False):  # it would take what is exact back to 16 bits
                out, lse = eager.forward(a)
        ctx.save_for_backward(q, w_key, w_value, bias, norm, out, lse, *tensors)
        ctx.source, ctx.eps = source, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, w_key, w_value, bias, norm, out, lse, *_ = ctx.saved_tensors
        source, wants = ctx.source, ctx.needs_input_grad
        dtokens = source.buffers() if wants[0] else None
        a = source.arguments(q, w_key, w_value, bias, norm, ctx.eps)
        with torch.autocast(q.device.type, enabled=False):
            found = eager.backward(dout, out, lse, a, None if dtokens is None else dtokens[0])
        if dtokens is not None and source.is_embedded:
            dtokens[1].add_(found.dtoken_norm)
        weights = (
            gradient.to(weight.dtype)
            for gradient, weight in zip(found[1:5], (w_key, w_value, bias, norm), strict=True)
        )
        return torch.zeros_like(source.ticket), found.dq, *weights, None, None, *[None] * len(source.tensors)


class _Means(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ticket, offsets, source, *tensors):
        ctx.save_for_backward(offsets, *tensors)
        ctx.source = source
        (first, *_), counts = source.tensors, offsets.diff()
        sums = first.new_zeros(len(counts), first.shape[1], dtype=torch.promote_types(first.dtype, torch.float32))
        for part in parts(source.num_tokens):
            rows = source.states.rows(part)[0].mul_(source.states.norm) if source.is_embedded else source.states[part]
            add_to_owners(sums, rows.to(sums.dtype), offsets, part)
        return sums.div_(counts.clamp_min(1)[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx, dmeans):
        (offsets, *_), source = ctx.saved_tensors, ctx.source
        slopes, buffers = dmeans / offsets.diff().clamp_min(1)[:, None], source.buffers()
        for part in parts(source.num_tokens):
            dx = slopes.index_select(0, owners(offsets, part))
            if source.is_embedded:
                source.states.add_gradient(part, dx, *buffers)
            else:
                buffers[0][part] += dx
        return torch.zeros_like(source.ticket), None, None, *[None] * len(source.tensors)


class _Embed(torch.autograd.Function):
    """The states of all tokens, of which nothing but ids is kept for their own gradient."""

    @staticmethod
    def forward(ctx, table, norm, ids, eps, dtype):
        ctx.save_for_backward(table, norm, ids)
        ctx.eps = eps
        states, x = Embedded(ids, table, norm, eps), table.new_empty(len(ids), table.shape[1], dtype=dtype)
        for part in parts(len(ids)):
            x[part] = states.rows(part)[0].mul_(norm)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        table, norm, ids = ctx.saved_tensors
        states, dtable, dnorm = Embedded(ids, table, norm, ctx.eps), torch.zeros_like(table), torch.zeros_like(norm)
        for part in parts(len(ids)):
            states.add_gradient(part, dx[part], dtable, dnorm)
        return dtable, dnorm, None, None, None


def embed(states: Embedded, dtype: torch.dtype) -> Tensor:
    """[T, d], keeping for its gradient nothing but the ids."""
    return _Embed.apply(states.table, states.norm, states.ids, states.eps, dtype)


def parts(num_tokens: int) -> list[slice]:
    return [slice(i, min(i + ROWS, num_tokens)) for i in range(0, num_tokens, ROWS)]


def add_to_owners(sums: Tensor, rows: Tensor, offsets: Tensor, part: slice) -> None:
    """Adds rows [n, d] of tokens to the sums [S, d] of their segments, in order."""
    if rows.is_cuda:  # index_add_ would use atomics
        within = offsets.clamp(part.start, part.stop) - part.start
        sums += torch.segment_reduce(rows, "sum", offsets=within, axis=0, unsafe=True, initial=0)
    else:  # seven times as fast as segment_reduce there
        sums.index_add_(0, owners(offsets, part), rows)


def owners(offsets: Tensor, part: slice) -> Tensor:
    """[n] the segment that each row belongs to."""
    rows = torch.arange(part.start, part.stop, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), rows, right=True)
