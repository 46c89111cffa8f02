"""How tokens are drawn: the options of sampling, and one token from each row of logits.

M hidden positions, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..objectives.view import check_option

SCHEDULES = ("linear", "cosine")
STRATEGIES = ("confidence", "margin", "entropy", "random", "mdlm", "remdm")


@dataclass(frozen=True)
class Sampling:
    """How a canvas is filled.

    steps: rounds of prediction, dealt evenly to the blocks, the first of which get what is left over.
    schedule: "linear" or "cosine" (few tokens first, while little is known), see ``unmasking.hidden_share``.
    unmask: which hidden positions are revealed in a round, see ``unmasking``.
        "confidence"  those whose drawn token is most probable (LLaDA)
        "margin"      those whose best token is furthest ahead of the second
        "entropy"     those whose distribution has the least entropy
        "random"      any; as many as the schedule says, as with the three above
        "mdlm"        each by itself with the schedule's probability: ancestral sampling
        "remdm"       any, and tokens that were revealed may be hidden again
    remask: remdm only, the share of the revealed tokens that a round hides again, as far as the schedule allows.
    block: hidden positions are filled from left to right in blocks of so many; 0: all at once.
    guidance: w, draws from the distribution with log-probabilities (1 + w) * given the concepts - w * given none.
    temperature: 0 takes the most probable token. top_k, top_p: draw from the k most probable tokens, from the fewest
        tokens that hold probability p; 0 and 1 mean all.
    clean_up: the last round of each block takes the most probable tokens instead of drawing.
    seed: same seed, same canvas, same model, same text.

    Sources: Chang et al. 2022 (MaskGIT), arXiv:2202.04200; Nie et al. 2025 (LLaDA), arXiv:2502.09992; Kim et al. 2025
    (margin), arXiv:2502.06768; Sahoo et al. 2024 (MDLM, clean-up), arXiv:2406.07524; Wang et al. 2025 (ReMDM),
    arXiv:2503.00307; Ho & Salimans 2022 (guidance), arXiv:2207.12598.
    """

    steps: int = 16
    schedule: str = "cosine"
    unmask: str = "confidence"
    remask: float = 0.1
    block: int = 0
    guidance: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    clean_up: bool = False
    seed: int = 0

    def __post_init__(self):
        check_option("steps", self.steps, "a whole number of at least 1", int(self.steps) == self.steps >= 1)
        check_option("schedule", self.schedule, f"one of {', '.join(SCHEDULES)}", self.schedule in SCHEDULES)
        check_option("unmask", self.unmask, f"one of {', '.join(STRATEGIES)}", self.unmask in STRATEGIES)
        check_option("remask", self.remask, "a number in [0, 1]", 0 <= self.remask <= 1)
        check_option("block", self.block, "a whole number of at least 0", int(self.block) == self.block >= 0)
        check_option("guidance", self.guidance, "a number of at least 0", self.guidance >= 0)
        check_option("temperature", self.temperature, "a number of at least 0", self.temperature >= 0)
        check_option("top_k", self.top_k, "a whole number of at least 0", int(self.top_k) == self.top_k >= 0)
        check_option("top_p", self.top_p, "a number in (0, 1]", 0 < self.top_p <= 1)


def guide(logits_MV: Tensor, logits_without_MV: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: (1 + w) * log p(given the concepts) - w * log p(given none), up to a constant a row."""
    log_p, log_p_without = logits_MV.double().log_softmax(-1), logits_without_MV.double().log_softmax(-1)
    return (1 + guidance) * log_p - guidance * log_p_without


def draw(
    logits_MV: Tensor, special: Tensor, sampling: Sampling, generator: torch.Generator, greedy: bool = False
) -> tuple[Tensor, Tensor]:
    """One token [M] from each row of logits, none of them special; and the probabilities [M, V] before temperature.

    In float64: with float32 noise the rarest tokens are never drawn (Zheng et al. 2024, arXiv:2409.02908).

    Raises:
        ValueError: a logit is not finite: what is drawn from it would mean nothing.
    """
    if not logits_MV.isfinite().all():
        raise ValueError("the model's logits are not finite; take an earlier checkpoint of its run")
    logits_MV = logits_MV.double().index_fill(1, special, -torch.inf)
    probabilities_MV = logits_MV.softmax(-1)
    if greedy or sampling.temperature == 0:
        return probabilities_MV.argmax(-1), probabilities_MV
    weights_MV = restrict(logits_MV / sampling.temperature, sampling).softmax(-1)
    if weights_MV.shape[0] == 0:
        return weights_MV.new_zeros(0, dtype=torch.int64), probabilities_MV
    return torch.multinomial(weights_MV, 1, generator=generator)[:, 0], probabilities_MV


def restrict(logits_MV: Tensor, sampling: Sampling) -> Tensor:
    """Logits with everything outside top_k and top_p at -inf; the most probable token always stays."""
    if sampling.top_k == 0 and sampling.top_p == 1:
        return logits_MV
    sorted_MV, order_MV = logits_MV.sort(-1, descending=True)
    before_MV = sorted_MV.softmax(-1).cumsum(-1) - sorted_MV.softmax(-1)  # probability of all better tokens
    drop_MV = before_MV >= sampling.top_p
    if sampling.top_k > 0:
        drop_MV[:, sampling.top_k :] = True
    drop_MV[:, 0] = False
    return sorted_MV.masked_fill(drop_MV, -torch.inf).gather(1, order_MV.argsort(-1))
