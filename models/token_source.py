"""Token states that all layers read in chunks: what a training step keeps of a token, and one gradient for all layers.

B sequences, T packed tokens, C concepts, H heads, Hkv key/value heads, D head width, d model width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..kernels.checks import readable
from ..kernels.streamed_attention.op import streamed_attention
from ..kernels.streamed_attention.shared import SharedGradient
from ..kernels.streamed_attention.tokens import Embedded, Rows
from ..kernels.threads import in_order
from .config import ConceptConfig
from .packing import Packed
from .similarity import wide

KEEPS = ("keys", "states", "ids")
ROWS = 2048  # of tokens that are embedded at one time
FEW = 1024  # tokens of a call, whose keys weigh less than concepts do: to read in chunks saves little and takes longer


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


def what_is_kept(
    config: ConceptConfig, keep: str | None, is_plain: bool, is_divided: bool, is_on_cpu: bool, num_tokens: int
) -> str:
    """Of a token, in one call of an encoder.

    Args:
        is_plain: its projections of keys and values can be taken out of their modules.
        is_divided: several devices hold parts of a text.

    Raises:
        ValueError: ``keep`` says what layers of this kind, or as they are now, cannot; it begins with "keep".
    """
    check_keep(config, keep)
    if config.layer_kind != "cross" or keep == "keys":
        return "keys"
    if keep is None:
        is_made_once = config.tie_layers or config.share_kv > 1
        is_better = is_on_cpu and num_tokens > FEW and not is_made_once and not torch.compiler.is_compiling()
        return "states" if is_better and is_plain and not is_divided else "keys"
    if is_divided:
        raise ValueError(f"keep: expected keys or None for a text over several devices, got {keep!r}")
    if not is_plain:
        raise ValueError(
            f"keep: expected keys or None, got {keep!r}: projections of keys and values are wrapped, hooked, "
            "quantised, sharded, or cut by ZeRO-3, and cannot be taken out of their modules"
        )
    return keep


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
    """The states of a batch, and one gradient of them however many layers read (``SharedGradient``): x and one dx are
    all that lives of a token, and with ``Embedded`` states not even these: their gradient is that of the table.

    torch.compile, which adds the gradients of all reads up itself, sees plain states [T, d] and reads of them.
    """

    def __init__(self, states: Tensor | Embedded, packed: Packed, where: Where):
        self.packed, self.where = packed, where
        is_embedded = isinstance(states, Embedded)
        tensors = (states.table, states.norm) if is_embedded else (states,)
        self.shared = None if torch.compiler.is_compiling() else SharedGradient(*tensors)
        self.tensors = tensors if self.shared is None else self.shared.tensors
        self.embedded = Embedded(states.ids, *self.tensors, states.eps) if is_embedded else None

    def read(
        self, q_BCHD: Tensor, w_key: Tensor, w_value: Tensor, key_bias: Tensor, key_norm: Tensor, eps: float
    ) -> Tensor:
        """What concepts read, [B, C, H, D]; weights [Hkv * D, d], bias and norm [D] of every head."""
        packed, (positions, frequencies, temperature) = self.packed, self.where
        options = {"shared": self.shared}
        if frequencies is not None:
            options |= {"positions": positions, "frequencies": frequencies, "temperature": temperature}
        if self.embedded is not None:
            ids, _, norm, token_eps = self.embedded
            options |= {"ids": ids, "token_norm": norm, "token_eps": token_eps}
        return streamed_attention(
            q_BCHD, self.tensors[0], w_key, w_value, packed.cu_seqlens, packed.max_seqlen,
            key_bias=key_bias, key_norm=key_norm, eps=eps, **options,
        )  # fmt: skip

    def segment_means(self, offsets: Tensor) -> Tensor:
        """offsets [S + 1] of tokens -> their means [S, d]; 0 where there is none."""
        if self.shared is None:
            if self.embedded is None:
                return plain_means(self.tensors[0], offsets)
            return checkpoint(embedded_means, self.embedded, offsets, use_reentrant=False)
        return _Means.apply(self.shared.ticket, offsets, self.embedded, self.shared.buffers, *self.tensors)


class _Means(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ticket, offsets, embedded, buffers, *tensors):
        ctx.save_for_backward(offsets, *tensors)
        ctx.embedded, ctx.buffers = embedded, buffers
        (first, *_), counts = tensors, offsets.diff()
        num_tokens = len(first if embedded is None else embedded.ids)
        sums = first.new_zeros(len(counts), first.shape[1], dtype=torch.promote_types(first.dtype, torch.float32))

        def work(part: slice) -> tuple[slice, Tensor]:
            rows = first[part] if embedded is None else embedded.rows(part)[0].mul_(embedded.norm)
            return sums_of_owners(rows.to(sums.dtype), offsets, part)

        def add(_: slice, found: tuple[slice, Tensor]) -> None:
            sums[found[0]] += found[1]

        in_order(work, parts(num_tokens), first.device, add)
        return sums.div_(counts.clamp_min(1)[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx, dmeans):
        (offsets, first, *rest), embedded = ctx.saved_tensors, ctx.embedded
        slopes, gradients = dmeans / offsets.diff().clamp_min(1)[:, None], ctx.buffers.get()

        def work(part: slice) -> Rows | None:
            dx = slopes.index_select(0, owners(offsets, part))
            if embedded is not None:
                return embedded.gradient(part, dx)
            gradients[0][part] += dx
            return None

        def add(part: slice, found: Rows | None) -> None:
            if found is not None:
                embedded.add(part, found, *gradients)

        in_order(work, parts(len(first if embedded is None else embedded.ids)), first.device, add)
        return first.new_zeros(()), None, None, None, None, *[None] * len(rest)


def plain_means(states_Td: Tensor, offsets: Tensor) -> Tensor:
    # unsafe skips a check of the offsets that would synchronise; they are right by construction
    return torch.segment_reduce(wide(states_Td), "mean", offsets=offsets, axis=0, unsafe=True, initial=0)


def embedded_rows(states: Embedded) -> Tensor:
    rows_Td = wide(F.embedding(states.ids, states.table))
    return F.rms_norm(rows_Td, states.norm.shape, wide(states.norm), states.eps)


def embedded_means(states: Embedded, offsets: Tensor) -> Tensor:
    return plain_means(embedded_rows(states), offsets)


class _Embed(torch.autograd.Function):
    """The states of all tokens, of which nothing but ids is kept for their own gradient."""

    @staticmethod
    def forward(ctx, table, norm, ids, eps, dtype):
        ctx.save_for_backward(table, norm, ids)
        ctx.eps = eps
        states, x = Embedded(ids, table, norm, eps), table.new_empty(len(ids), table.shape[1], dtype=dtype)

        def work(part: slice) -> None:
            torch.mul(states.rows(part)[0], norm, out=x[part])

        in_order(work, parts(len(ids)), ids.device)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        table, norm, ids = ctx.saved_tensors
        states, wanted = Embedded(ids, table, norm, ctx.eps), (table, norm)
        sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in wanted]

        def work(part: slice) -> Rows:
            return states.gradient(part, dx[part])

        def add(part: slice, found: Rows) -> None:
            states.add(part, found, *sums)

        in_order(work, parts(len(ids)), ids.device, add)
        return *(part.to(x.dtype) for part, x in zip(sums, wanted, strict=True)), None, None, None


def embed(states: Embedded, dtype: torch.dtype) -> Tensor:
    """[T, d], keeping for its gradient nothing but the ids."""
    if torch.compiler.is_compiling():  # which would unroll the parts
        return checkpoint(embedded_rows, states, use_reentrant=False).to(dtype)
    return _Embed.apply(states.table, states.norm, states.ids, states.eps, dtype)


def parts(num_tokens: int) -> list[slice]:
    return [slice(i, min(i + ROWS, num_tokens)) for i in range(0, num_tokens, ROWS)]


def sums_of_owners(rows: Tensor, offsets: Tensor, part: slice) -> tuple[slice, Tensor]:
    """(segments, the sums of their rows [n, d]) of some tokens, in order."""
    if rows.is_cuda or not readable(offsets):  # index_add_ would use atomics, and bounds are on the device
        within = offsets.clamp(part.start, part.stop) - part.start
        return slice(None), torch.segment_reduce(rows, "sum", offsets=within, axis=0, unsafe=True, initial=0)
    found = owners(offsets, part)  # they ascend
    first, last = int(found[0]), int(found[-1]) + 1
    # seven times as fast as segment_reduce there
    return slice(first, last), rows.new_zeros(last - first, rows.shape[1]).index_add_(0, found - first, rows)


def owners(offsets: Tensor, part: slice) -> Tensor:
    """[n] the segment that each row belongs to."""
    rows = torch.arange(part.start, part.stop, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), rows, right=True)
