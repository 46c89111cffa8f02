"""Which hidden positions a round reveals: how many by the schedule, and which of them by the strategy.

B sequences, T packed tokens, M hidden positions, V vocabulary.
"""

import math

import torch
from torch import Tensor

from ..packing import Packed
from .sampling import Sampling

BLIND = ("random", "mdlm", "remdm")  # choose without looking at predictions


def hidden_share(schedule: str, after: int, rounds: int) -> float:
    """The share that is hidden after round k of K: 1 - k/K ("linear"), cos(pi/2 * k/K) ("cosine")."""
    if after >= rounds:
        return 0.0
    return 1 - after / rounds if schedule == "linear" else math.cos(math.pi / 2 * after / rounds)


def num_hidden_after(schedule: str, after: int, rounds: int, num_wanted_B: Tensor) -> Tensor:
    """[B] wanted -> [B] hidden after round k of K: the share, rounded down."""
    share = hidden_share(schedule, after, rounds)
    return (num_wanted_B.double() * share + 1e-9).floor().to(num_wanted_B.dtype)  # 1e-9: 10 * 0.7 is 7, not 6


def budget(
    sampling: Sampling, number: int, rounds: int, num_wanted_B: Tensor, num_hidden_B: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """How many positions of each sequence round ``number`` of ``rounds`` reveals, and how many it hides again.

    With n wanted, h of them hidden before the round, and h' = ``num_hidden_after`` the round:

        mdlm        reveals Binomial(h, (t - s) / t), t and s the hidden shares before and after: what comes of each
                    position being revealed by itself. The last round reveals all.
        remdm       hides m of the n - h revealed positions again and reveals h - h' + m of the hidden ones, so that
                    exactly h' are hidden afterwards. m is sigma * (n - h), rounded up or down at random so that its
                    mean is exact, with the capped sigma = min(remask, h' / (n - h)): more could not be hidden and h'
                    still be met. The last round hides none.
        the others  reveal h - h' and hide none.
    """
    none_B = torch.zeros_like(num_hidden_B)
    if sampling.unmask == "mdlm":
        before, after = (hidden_share(sampling.schedule, k, rounds) for k in (number - 1, number))
        chance_B = torch.full_like(num_hidden_B, 1 - after / before, dtype=torch.float64)
        return torch.binomial(num_hidden_B.double(), chance_B, generator).to(num_hidden_B.dtype), none_B
    left_B = num_hidden_after(sampling.schedule, number, rounds, num_wanted_B)
    if sampling.unmask != "remdm":
        return num_hidden_B - left_B, none_B
    revealed_B = num_wanted_B - num_hidden_B
    mean_B = (sampling.remask * revealed_B.double()).minimum(left_B.double())
    again_B = (mean_B + torch.rand(mean_B.shape, dtype=mean_B.dtype, device=mean_B.device, generator=generator)).floor()
    again_B = again_B.to(left_B.dtype).minimum(left_B)
    return num_hidden_B - left_B + again_B, again_B


def certainty(unmask: str, probabilities_MV: Tensor, draws_M: Tensor) -> Tensor:
    """[M] how sure the model is of each position, by the strategy; the surest are revealed first."""
    if unmask == "confidence":
        return probabilities_MV.gather(1, draws_M[:, None])[:, 0]
    if unmask == "margin":
        best_M2 = probabilities_MV.topk(2, dim=-1).values
        return best_M2[:, 0] - best_M2[:, 1]
    return torch.special.entr(probabilities_MV).sum(-1).neg()


def highest(scores_M: Tensor, rows: Packed, counts_B: Tensor) -> Tensor:
    """[M] bool: the ``counts_B`` rows of each sequence with the highest scores."""
    return rank_within(scores_M, rows) < counts_B[rows.sequence_ids()]


def rank_within(scores_M: Tensor, rows: Packed) -> Tensor:
    """[M] rank of each row among those of its sequence, 0 for the highest score; ties keep their order."""
    by_score = torch.argsort(scores_M, descending=True, stable=True)
    sequence_M = rows.sequence_ids()
    order_M = by_score[torch.argsort(sequence_M[by_score], stable=True)]
    rank_M = torch.empty_like(order_M)
    rank_M[order_M] = torch.arange(len(order_M), device=order_M.device)
    return rank_M - rows.cu_seqlens.long()[sequence_M]


def blocks(is_wanted_T: Tensor, canvas: Packed, sampling: Sampling) -> list[tuple[Tensor, int]]:
    """(which positions [T] bool, how many rounds) of each block, from left to right.

    Block i holds the i-th ``sampling.block`` wanted positions of every sequence; one that has no more is done.

    Raises:
        ValueError: there are fewer steps than blocks.
    """
    if sampling.block == 0:
        return [(is_wanted_T, sampling.steps)]
    wanted = canvas.select(is_wanted_T)
    place_T = is_wanted_T.cumsum(0) - 1 - wanted.cu_seqlens.long()[canvas.sequence_ids()]
    most = int(wanted.cu_seqlens.diff().max()) if canvas.num_sequences else 0
    num_blocks = max(1, -(-most // sampling.block))
    if sampling.steps < num_blocks:
        raise ValueError(
            f"steps: expected at least {num_blocks}, one for each block of {sampling.block}, got {sampling.steps}"
        )
    each, more = divmod(sampling.steps, num_blocks)
    return [(is_wanted_T & (place_T // sampling.block == i), each + (i < more)) for i in range(num_blocks)]
