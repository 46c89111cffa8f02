"""The torch backend: batched matrix products and two softmaxes of one similarity, differentiable by autograd.

Where the sequence boundaries can be read without waiting for a device, sequences run one after the other, unless they
are so small that calls cost more than padding; elsewhere (GPU, traced graphs) they run padded, side by side.
Holds the similarity and both weights, [B, H, N, C] each, for backward. Every product has its tokens where its gradient
comes out as [N, C] too, so that none of these is ever transposed.

float16 is computed in float32, because scores above 65504 are no float16. bfloat16 holds them.
"""

import torch
from torch import Tensor

from ..checks import readable

LARGE = 16384  # weights of a sequence above which one-by-one is faster even without padding (measured on a CPU)
MAX_WASTE = 2.5  # padded rows per real token above which it is faster for small sequences too


def bixt_attention(
    concept_qk: Tensor,
    concept_v: Tensor,
    token_qk: Tensor,
    token_v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    T, dtype = token_qk.shape[0], token_qk.dtype
    if dtype == torch.float16:
        concept_qk, concept_v, token_qk, token_v = (x.float() for x in (concept_qk, concept_v, token_qk, token_v))
    concepts = (concept_qk * scale).transpose(1, 2), concept_v.transpose(1, 2)  # [B,H,C,D]
    with torch.autocast(token_qk.device.type, enabled=False):  # it would take the scores back to 16 bits
        if pays_to_pad(cu_seqlens, T, max_seqlen, concept_qk.shape[1] * concept_qk.shape[2]):
            outs = side_by_side(*concepts, token_qk, token_v, cu_seqlens, min(max_seqlen, T))
        else:
            outs = one_by_one(*concepts, token_qk, token_v, cu_seqlens)
    return outs[0].to(dtype), outs[1].to(dtype)


def pays_to_pad(cu_seqlens: Tensor, num_tokens: int, max_seqlen: int, weights_per_token: int) -> bool:
    if not readable(cu_seqlens) or cu_seqlens.shape[0] == 1:
        return True
    num_sequences = cu_seqlens.shape[0] - 1
    is_small = num_sequences > 1 and num_tokens * weights_per_token < LARGE * num_sequences
    return is_small and num_sequences * min(max_seqlen, num_tokens) <= MAX_WASTE * num_tokens


def attend(concept_qk: Tensor, concept_v: Tensor, token_qk: Tensor, token_v: Tensor, valid: Tensor | None):
    """concepts [B,H,C,D], tokens [B,H,N,D], valid [B,1,N,1] -> both results, laid out like their own side."""
    similarity = token_qk @ concept_qk.mT  # [B,H,N,C]
    over_tokens = similarity
    if valid is not None:
        over_tokens = similarity.masked_fill(~valid, torch.finfo(similarity.dtype).min)
    over_tokens = over_tokens.softmax(-2)
    if valid is not None:  # a sequence without tokens has only such rows: its weights become 0, not NaN
        over_tokens = over_tokens.masked_fill(~valid, 0.0)
    return (token_v.mT @ over_tokens).mT, similarity.softmax(-1) @ concept_v


def one_by_one(concept_qk: Tensor, concept_v: Tensor, token_qk: Tensor, token_v: Tensor, cu_seqlens: Tensor):
    concept_out, token_out, lengths = [], [], cu_seqlens.diff().tolist()
    # split, not slices: its backward is one concatenation instead of a full-length sum for every sequence
    concepts = (x.split(1) for x in (concept_qk, concept_v))
    tokens = (x.split(lengths) for x in (token_qk, token_v))
    for *own, qk, v in zip(*concepts, *tokens, strict=True):
        concepts, rows = attend(*own, *(x.transpose(0, 1).unsqueeze(0) for x in (qk, v)), None)
        concept_out.append(concepts)
        token_out.append(rows.squeeze(0).transpose(0, 1))
    return torch.cat(concept_out).transpose(1, 2), torch.cat(token_out)


def side_by_side(
    concept_qk: Tensor, concept_v: Tensor, token_qk: Tensor, token_v: Tensor, cu_seqlens: Tensor, N: int
) -> tuple[Tensor, Tensor]:
    B, T = concept_qk.shape[0], token_qk.shape[0]
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    rows = starts[:, None] + torch.arange(N, device=starts.device)  # [B,N]
    valid = (rows < ends[:, None])[:, None, :, None]
    rows = rows.clamp(max=T - 1).flatten()
    padded = (x.index_select(0, rows).unflatten(0, (B, N)).transpose(1, 2) for x in (token_qk, token_v))
    concept_out, token_out = attend(concept_qk, concept_v, *padded, valid)
    token = torch.arange(T, device=starts.device)
    sequence = torch.searchsorted(ends, token, right=True)
    cells = sequence * N + token - starts[sequence]  # where packed row t stands in the padded layout
    token_out = token_out.transpose(1, 2).flatten(0, 1).index_select(0, cells)
    return concept_out.transpose(1, 2), token_out
