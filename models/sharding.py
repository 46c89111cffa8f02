"""One text over several devices: each holds a part of its tokens, all hold its concepts.

A layer reads its own tokens, and what the devices read is merged exactly by the log-sum-exp of each: of a layer, B * C
rows travel, whatever N is. Everything after the read is done by every device alike.

    forward     all_gather of (out_s, lse_s);      lse = log sum_s exp(lse_s);    out = sum_s exp(lse_s - lse) out_s
    backward    all_reduce of dout, since each device's loss reads the same concepts;
                dout_s = exp(lse_s - lse) dout;    dlse_s = exp(lse_s - lse) dout . (out_s - out)

The gradient of a parameter is the sum over the devices' gradients, as with data parallelism: the loss is the sum of
what each device says of its own tokens. Tokens that layers of tokens need of their neighbours come along as a halo,
whose states are dropped before concepts read: nothing is sent for them.

B sequences, T packed tokens, N tokens of one sequence, C concepts, H heads, D head width, d model width, S shards,
R rows of the decoder.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.concept_attention.merge import merge_partials
from ..kernels.concept_attention.op import concept_attention
from .config import ConceptConfig
from .objectives.view import View
from .packing import Packed, sequence_ids
from .token_layers import CONV_RADIUS


def halo(config: ConceptConfig) -> int:
    """How many positions on either side the states of a token depend on.

    Raises:
        ValueError: on all of them, or tokens are changed by what concepts are: such a model is not sharded.
    """
    faults = {
        "layer_kind": config.layer_kind != "cross", "funnel": bool(config.funnel),
        "backbone": config.backbone is not None, "init_queries": config.init_queries == "state",
    }  # fmt: skip
    for field, is_fault in faults.items():
        if is_fault:
            raise ValueError(
                f"{field}: {getattr(config, field) if field != 'backbone' else 'a backbone'} cannot be read over "
                "several devices; expected layer_kind = cross without a funnel or a backbone"
            )
    reach = CONV_RADIUS if config.token_mixer == "conv" else config.token_window
    return config.num_token_layers * reach


def shard(packed: Packed, rank: int, size: int, config: ConceptConfig) -> Packed:
    """The part of every sequence that device ``rank`` of ``size`` holds: N / size tokens in a row, and the halo.

    Raises:
        ValueError: rank is not one of size, or a model of this configuration is not sharded.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank: expected 0 to {size - 1}, got {rank}")
    around = halo(config)
    starts, ends = packed.cu_seqlens[:-1].long(), packed.cu_seqlens[1:].long()
    first = starts + (ends - starts) * rank // size
    last = starts + (ends - starts) * (rank + 1) // size
    rows = torch.arange(packed.num_tokens, device=packed.cu_seqlens.device)
    owner = packed.sequence_ids()
    own = (rows >= first[owner]) & (rows < last[owner])
    if around == 0 or packed.num_tokens == 0:
        return packed.select(own)
    low = packed.position_ids[first.clamp(max=packed.num_tokens - 1)] - around
    high = packed.position_ids[(last - 1).clamp(min=0)] + around
    near = (packed.position_ids >= low[owner]) & (packed.position_ids <= high[owner]) & (first < last)[owner]
    return packed.select(near)._replace(own=own[near])


def shard_view(view: View, rank: int, size: int, config: ConceptConfig) -> View:
    """What device ``rank`` of ``size`` reads of a view, and which of its targets it answers: M / size of each sequence.

    Targets are dealt by their number, not by where they stand: those of a text may all be at its end. The divisor is
    dealt in equal parts, so that sums over devices are those of the view.

    Raises:
        ValueError: as ``shard``; or the view has context, a pair or a lesson, which are not divided.
    """
    for field, part in (("context", view.target_rows), ("pair", view.pair), ("lesson", view.lesson)):
        if part is not None:
            raise ValueError(f"{field}: expected none in a view over several devices")
    bounds = view.decoder_cu_seqlens.long()
    starts, counts = bounds[:-1], bounds.diff()
    first, last = (starts + counts * i // size for i in (rank, rank + 1))
    rows = torch.arange(len(view.decoder_position_ids), device=bounds.device)
    owner = sequence_ids(view.decoder_cu_seqlens, len(rows))
    mine = (rows >= first[owner]) & (rows < last[owner])
    ends = torch.cat((bounds[:1], (last - first).cumsum(0)))
    return replace(
        view, encoder=shard(view.encoder, rank, size, config), decoder_position_ids=view.decoder_position_ids[mine],
        decoder_input_ids=None if view.decoder_input_ids is None else view.decoder_input_ids[mine],
        decoder_cu_seqlens=ends.to(view.decoder_cu_seqlens.dtype), targets=view.targets[mine],
        weights=view.weights[mine], seen=view.seen[mine], divisor=view.divisor / size,
    )  # fmt: skip


def read_shard(
    q_BCHD: Tensor, k_TKD: Tensor, v_TKD: Tensor, packed: Packed, group: dist.ProcessGroup
) -> Tensor:
    """What concepts read of the tokens of all devices of ``group``, [B, C, H, D], the same on each."""
    out, lse = concept_attention(q_BCHD, k_TKD, v_TKD, packed.cu_seqlens, packed.max_seqlen, return_lse=True)
    return _Merge.apply(out, lse, group)


def sum_shards(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the devices of ``group``, the same on each; its gradient is the sum of theirs."""
    return _Sum.apply(x, group)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, lse, group):
        outs, lses = gather(out, group), gather(lse, group)
        merged, total = merge_partials(outs, lses)
        share = torch.where(lse == -torch.inf, 0.0, torch.exp(lse - torch.where(total == -torch.inf, 0.0, total)))
        ctx.save_for_backward(out, merged, share)
        ctx.group = group
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx, dmerged):
        out, merged, share_BHC = ctx.saved_tensors
        dmerged = summed(dmerged.to(share_BHC.dtype), ctx.group)
        share_BCH = share_BHC.transpose(1, 2)
        dshare = (dmerged * (out.to(dmerged.dtype) - merged.to(dmerged.dtype))).sum(-1)
        return (dmerged * share_BCH[..., None]).to(out.dtype), (share_BCH * dshare).transpose(1, 2).contiguous(), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return summed(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        return summed(dx, ctx.group), None


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[S, ...] in the order of ranks, the same on each."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x
