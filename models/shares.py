"""Equal shares of a text, one a concept, whose means have the mean of the text exactly.

B texts, T packed tokens, N tokens of one text, C concepts, d width.
"""

import numpy as np
import torch
from torch import Tensor

from .packing import Packed

FEWEST_TOKENS = 4  # a mean of fewer is the state of a word more than of a passage


def share_means(x_Td: Tensor, packed: Packed, num_concepts: int) -> Tensor:
    """[T, d] -> [B, C, d]: the mean of x over the stretch of each concept; zero for a text without tokens.

    Token t is the stretch [t, t + 1) of its text, gaps closed, and share i is [i N/C, (i+1) N/C): a token on an edge
    counts for both in parts. Where shares are short, a concept takes an odd number of them around its own, enough for 4
    tokens; at the ends the text goes on as its mirror image, so that every token counts alike over all concepts:

        mean_i means[b, i] = mean_t x[t]    for any N and C.

    Differentiable; memory O(T d) for the gradient and O(B C d).
    """
    B, C, d = packed.num_sequences, num_concepts, x_Td.shape[-1]
    if packed.num_tokens == 0:
        return x_Td.new_zeros((B, C, d))
    starts_B1, N_B1 = packed.cu_seqlens[:-1].long()[:, None], packed.cu_seqlens.diff().long()[:, None]
    steps = torch.arange(C + 1, device=x_Td.device)
    whole_BC1 = steps * N_B1 // C  # tokens before edge i, and
    part_BC1 = ((steps * N_B1) % C).to(x_Td.dtype) / C  # how much of the next
    edges_BC1 = starts_B1 + whole_BC1
    offsets = torch.cat((edges_BC1[:, :-1].flatten(), packed.cu_seqlens[-1:].long()))
    # unsafe skips a check of the offsets that would synchronise; they are right by construction
    sums = torch.segment_reduce(x_Td, "sum", offsets=offsets, axis=0, unsafe=True, initial=0).view(B, C, d)
    cut_BC1d = part_BC1[..., None] * x_Td[edges_BC1.clamp_max(packed.num_tokens - 1)]
    means_BCd = (sums - cut_BC1d[:, :-1] + cut_BC1d[:, 1:]) * (C / N_B1.clamp_min(1))[..., None].to(x_Td.dtype)
    return smooth(means_BCd, -(-FEWEST_TOKENS * C // N_B1.clamp_min(1)))


def share_bounds(num_tokens: int, num_concepts: int) -> np.ndarray:
    """[C, 2] int64: the tokens begin to end - 1 that count for each concept, in whole or in part."""
    N, C = num_tokens, num_concepts
    half = min(-(-FEWEST_TOKENS * C // max(N, 1)) // 2, (C - 1) // 2)
    own = np.arange(C)
    begin, end = np.maximum(own - half, 0), np.minimum(own + half + 1, C)
    return np.stack((begin * N // C, -(-end * N // C)), axis=1)


def smooth(rows_BCd: Tensor, fewest_B1: Tensor) -> Tensor:
    """The mean of an odd number of rows, at least ``fewest`` [B, 1] but at most C, around each; rows go on mirrored."""
    C = rows_BCd.shape[1]
    half_B1 = torch.minimum(fewest_B1 // 2, torch.tensor((C - 1) // 2, device=rows_BCd.device))
    mirrored = torch.cat((rows_BCd.flip(1), rows_BCd, rows_BCd.flip(1)), dim=1)
    sums = torch.nn.functional.pad(mirrored.cumsum(1), (0, 0, 1, 0))
    own = torch.arange(C, 2 * C, device=rows_BCd.device)

    def at(places_BC: Tensor) -> Tensor:
        return sums.gather(1, places_BC[..., None].expand_as(rows_BCd))

    total = at(own + half_B1 + 1) - at(own - half_B1)
    return torch.where((half_B1 > 0)[..., None], total / (2 * half_B1 + 1)[..., None], rows_BCd)
