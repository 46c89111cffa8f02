"""Sampling from a masked model: hidden positions of a canvas are revealed over a few steps.

B sequences, T packed tokens, M hidden positions, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .encoder import ConceptEncoderOutput
from .heads import ConceptForMaskedLM
from .objectives.view import SpecialTokens, check_option
from .packing import Packed, pack

CHUNK_ROWS = 4096  # hidden positions whose logits exist at one time


@dataclass(frozen=True)
class Sampling:
    """How a canvas is filled.

    steps: rounds of prediction. After round k of K, n hidden positions have become
        floor(n * (1 - k / K))            schedule "linear"
        floor(n * cos(pi / 2 * k / K))    schedule "cosine": few first, while little is known (MaskGIT)
    unmask: which of a sequence's positions are revealed: those whose drawn token is most probable ("confidence"), or
        any ("random").
    temperature: 0 takes the most probable token. top_k, top_p: draw from the k most probable tokens, from the fewest
        tokens that hold probability p; 0 and 1 mean all.
    seed: same seed, same canvas, same model, same text.

    Source: Chang et al. 2022 (MaskGIT), arXiv:2202.04200; Sahoo et al. 2024 (MDLM), arXiv:2406.07524.
    """

    steps: int = 16
    schedule: str = "cosine"
    unmask: str = "confidence"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        check_option("steps", self.steps, "a whole number of at least 1", int(self.steps) == self.steps >= 1)
        check_option("schedule", self.schedule, "'linear' or 'cosine'", self.schedule in ("linear", "cosine"))
        check_option("unmask", self.unmask, "'confidence' or 'random'", self.unmask in ("confidence", "random"))
        check_option("temperature", self.temperature, "a number of at least 0", self.temperature >= 0)
        check_option("top_k", self.top_k, "a whole number of at least 0", int(self.top_k) == self.top_k >= 0)
        check_option("top_p", self.top_p, "a number in (0, 1]", 0 < self.top_p <= 1)

    def num_hidden_after(self, step: int, num_hidden: Tensor) -> Tensor:
        """[B] hidden at the start -> [B] hidden after ``step`` of ``steps`` rounds."""
        if step >= self.steps:
            return torch.zeros_like(num_hidden)
        done = step / self.steps
        share = 1 - done if self.schedule == "linear" else math.cos(math.pi / 2 * done)
        return (num_hidden.double() * share + 1e-9).floor().to(num_hidden.dtype)  # 1e-9: 10 * 0.7 is 7, not 6


def blank_canvas(lengths: Sequence[int], tokens: SpecialTokens) -> Packed:
    """Nothing but [MASK]: one sequence of each length."""
    return pack([[tokens.mask_id] * n for n in lengths])


def continue_canvas(prefixes: Sequence[Sequence[int]], num_new: int, tokens: SpecialTokens) -> Packed:
    """Each prefix, followed by ``num_new`` [MASK] tokens."""
    return pack([[*prefix, *[tokens.mask_id] * num_new] for prefix in prefixes])


def fill(
    model: ConceptForMaskedLM, canvas: Packed, tokens: SpecialTokens, sampling: Sampling, source: Packed | None = None
) -> Packed:
    """Fills every [MASK] of ``canvas``.

    Args:
        model: its device is where everything runs; dropout is off while it samples.
        canvas: B packed sequences, [MASK] where a token is wanted. What is given is never changed.
        tokens: the ids that are never drawn.
        source: B packed texts whose concepts condition the result, encoded once (a model trained on the clean view).
            None: the concepts are those of the canvas itself, encoded again each round as tokens are revealed.

    Returns:
        The canvas without [MASK], on the model's device.

    Raises:
        ValueError: ``tokens`` does not belong to the model, or ``source`` has another number of sequences.
    """
    for step in fill_steps(model, canvas, tokens, sampling, source):
        canvas = step
    return canvas


@torch.no_grad()
def fill_steps(
    model: ConceptForMaskedLM, canvas: Packed, tokens: SpecialTokens, sampling: Sampling, source: Packed | None = None
) -> Iterator[Packed]:
    """As ``fill``, and shows the canvas after each round."""
    check_fit(model, canvas, tokens, source)
    canvas = canvas.to(model.device)
    generator = torch.Generator(device=model.device).manual_seed(sampling.seed)
    special = torch.tensor(sorted(tokens.special_ids), device=model.device)
    was_training = model.training
    model.eval()
    try:
        encoded = None if source is None else model.encoder(packed=source.to(model.device))
        num_hidden_B = count_hidden(canvas, tokens)
        for step in range(1, sampling.steps + 1):
            hidden = canvas.select(canvas.input_ids == tokens.mask_id)
            draws_M, confidence_M = predict(model, canvas, hidden, encoded, special, sampling, generator)
            num_reveal_B = hidden.cu_seqlens.diff() - sampling.num_hidden_after(step, num_hidden_B)
            if sampling.unmask == "random":
                confidence_M = torch.rand(confidence_M.shape, device=model.device, generator=generator)
            reveal_M = rank_within(confidence_M, hidden) < num_reveal_B[hidden.sequence_ids()]
            input_ids = canvas.input_ids.clone()
            input_ids[input_ids == tokens.mask_id] = torch.where(reveal_M, draws_M, tokens.mask_id)
            canvas = canvas._replace(input_ids=input_ids)
            yield canvas
    finally:
        model.train(was_training)


def predict(
    model: ConceptForMaskedLM, canvas: Packed, hidden: Packed, encoded: ConceptEncoderOutput | None,
    special: Tensor, sampling: Sampling, generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A drawn token [M] for every hidden position, and the model's probability [M] of it."""
    if encoded is None:
        encoded = model.encoder(packed=model.encoder.visible(canvas))
    share_B = hidden.cu_seqlens.diff() / canvas.cu_seqlens.diff().clamp_min(1)
    hidden_Md = model.decode(
        encoded, hidden.position_ids, hidden.cu_seqlens, hidden.max_seqlen, hidden.input_ids, share_B.clamp_min(1e-3)
    )
    parts = [draw(model.lm_head(rows), special, sampling, generator) for rows in hidden_Md.split(CHUNK_ROWS)]
    draws, confidences = zip(*parts, strict=True)
    return torch.cat(draws), torch.cat(confidences)


def draw(logits_MV: Tensor, special: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One token [M] from each row of logits, none of them special, and its probability [M] before temperature."""
    logits_MV = logits_MV.float().index_fill(1, special, -torch.inf)
    probabilities_MV = logits_MV.softmax(-1)
    if sampling.temperature == 0:
        confidence_M, draws_M = probabilities_MV.max(-1)
        return draws_M, confidence_M
    weights_MV = restrict(logits_MV / sampling.temperature, sampling).softmax(-1)
    if weights_MV.shape[0] == 0:
        return weights_MV.new_zeros(0, dtype=torch.int64), weights_MV.new_zeros(0)
    draws_M1 = torch.multinomial(weights_MV, 1, generator=generator)
    return draws_M1[:, 0], probabilities_MV.gather(1, draws_M1)[:, 0]


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


def rank_within(scores_M: Tensor, rows: Packed) -> Tensor:
    """[M] rank of each row among those of its sequence, 0 for the highest score; ties keep their order."""
    by_score = torch.argsort(scores_M, descending=True, stable=True)
    sequence_M = rows.sequence_ids()
    order_M = by_score[torch.argsort(sequence_M[by_score], stable=True)]
    rank_M = torch.empty_like(order_M)
    rank_M[order_M] = torch.arange(len(order_M), device=order_M.device)
    return rank_M - rows.cu_seqlens.long()[sequence_M]


def count_hidden(canvas: Packed, tokens: SpecialTokens) -> Tensor:
    return canvas.select(canvas.input_ids == tokens.mask_id).cu_seqlens.diff()


def check_fit(model: ConceptForMaskedLM, canvas: Packed, tokens: SpecialTokens, source: Packed | None) -> None:
    if tokens.mask_id not in tokens.special_ids:
        raise ValueError(f"tokens: expected mask_id = {tokens.mask_id} among special_ids, so that it is never drawn")
    if model.config.mask_token_id not in (None, tokens.mask_id):
        raise ValueError(
            f"tokens: expected the model's mask id {model.config.mask_token_id}, got {tokens.mask_id}; "
            "use the tokenizer the model was trained with"
        )
    if source is not None and source.num_sequences != canvas.num_sequences:
        raise ValueError(
            f"source: expected {canvas.num_sequences} sequences, as the canvas, got {source.num_sequences}"
        )
