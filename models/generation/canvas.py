"""Sampling from a masked model: hidden positions of a canvas are revealed over a few rounds.

B sequences, T packed tokens, M hidden positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..encoder import ConceptEncoderOutput
from ..masked_lm import ConceptForMaskedLM
from ..objectives.view import SpecialTokens
from ..packing import Packed, pack
from .sampling import Sampling, draw, guide
from .unmasking import BLIND, blocks, budget, certainty, highest

CHUNK_ROWS = 512  # hidden positions whose logits exist at one time, in float64


def blank_canvas(lengths: Sequence[int], tokens: SpecialTokens) -> Packed:
    """Nothing but [MASK]: one sequence of each length."""
    return pack([[tokens.mask_id] * n for n in lengths])


def continue_canvas(prefixes: Sequence[Sequence[int]], num_new: int, tokens: SpecialTokens) -> Packed:
    """Each prefix, followed by ``num_new`` [MASK] tokens."""
    return pack([[*prefix, *[tokens.mask_id] * num_new] for prefix in prefixes])


def infill_canvas(
    befores: Sequence[Sequence[int]], num_new: int, afters: Sequence[Sequence[int]], tokens: SpecialTokens
) -> Packed:
    """``num_new`` [MASK] tokens between the two parts of each text."""
    gap = [tokens.mask_id] * num_new
    return pack([[*before, *gap, *after] for before, after in zip(befores, afters, strict=True)])


def given_text(canvas: Packed, tokens: SpecialTokens) -> Packed:
    """What a canvas gives, where it stands: the source for a model that was trained to generate one part of a text
    from another (``PrefixDiffusion`` with the positions of the text)."""
    return canvas.select(canvas.input_ids != tokens.mask_id)


def fill(
    model: ConceptForMaskedLM, canvas: Packed, tokens: SpecialTokens, sampling: Sampling, source: Packed | None = None
) -> Packed:
    """Fills every [MASK] of ``canvas``.

    Args:
        model: its device is where everything runs; dropout is off while it samples.
        canvas: B packed sequences, [MASK] where a token is wanted. What is given is never changed.
        tokens: the ids that are never drawn.
        source: B packed texts whose concepts condition the result, encoded once: for a model whose encoder sees other
            text than it is asked for (``PrefixDiffusion``; source: ``given_text``), or all of it (the clean view). The
            model is at the time that tells which share of the *wanted* tokens is hidden; a decoder that mixes rows
            sees those that it has written.
            None: the concepts are those of the canvas itself, encoded again each round as tokens are revealed. The time
            is the hidden share of the whole canvas; a decoder that mixes rows sees all of it.

    Returns:
        The canvas without [MASK], on the model's device.

    Raises:
        ValueError: ``tokens`` does not belong to the model, ``source`` has another number of sequences, the model
            cannot be guided, or there are fewer steps than blocks.
    """
    for step in fill_steps(model, canvas, tokens, sampling, source):
        canvas = step
    return canvas


@torch.no_grad()
def fill_steps(
    model: ConceptForMaskedLM, canvas: Packed, tokens: SpecialTokens, sampling: Sampling, source: Packed | None = None
) -> Iterator[Packed]:
    """As ``fill``, and shows the canvas after each round. A round that reveals nothing asks the model nothing."""
    check_fit(model, canvas, tokens, source)
    was_training = model.training
    model.eval()
    try:
        filling = Filling(model, canvas.to(model.device), tokens, sampling, source)
        for is_wanted_T, rounds in blocks(filling.is_wanted_T, filling.canvas, sampling):
            for number in range(1, rounds + 1):
                filling.round(is_wanted_T, number, rounds)
                yield filling.canvas
    finally:
        model.train(was_training)


class Filling:
    """A canvas on its way."""

    def __init__(
        self, model: ConceptForMaskedLM, canvas: Packed, tokens: SpecialTokens, sampling: Sampling,
        source: Packed | None,
    ):  # fmt: skip
        self.model, self.canvas, self.mask_id, self.sampling = model, canvas, tokens.mask_id, sampling
        self.is_wanted_T = canvas.input_ids == tokens.mask_id
        self.special = torch.tensor(sorted(tokens.special_ids), device=model.device)
        self.generator = torch.Generator(device=model.device).manual_seed(sampling.seed)
        self.encoded = None if source is None else model.encoder(packed=source.to(model.device))

    def round(self, is_wanted_T: Tensor, number: int, rounds: int) -> None:
        """Round ``number`` of the ``rounds`` in which the positions of one block are revealed."""
        sampling, canvas = self.sampling, self.canvas
        is_hidden_T = is_wanted_T & (canvas.input_ids == self.mask_id)
        hidden, shown = canvas.select(is_hidden_T), canvas.select(is_wanted_T & ~is_hidden_T)
        num_hidden_B, num_shown_B = hidden.cu_seqlens.diff(), shown.cu_seqlens.diff()
        num_reveal_B, num_hide_B = budget(
            sampling, number, rounds, num_hidden_B + num_shown_B, num_hidden_B, self.generator
        )
        if not num_reveal_B.any():  # then nothing is hidden either
            return
        rows_M = is_hidden_T.nonzero()[:, 0]
        greedy = sampling.clean_up and number == rounds
        if sampling.unmask in BLIND:  # only what is revealed is predicted
            rows_M = rows_M[highest(self.uniform(hidden), hidden, num_reveal_B)]
            draws_M, _ = self.predict(rows_M, greedy)
        else:
            draws_M, certainty_M = self.predict(rows_M, greedy)
            is_revealed_M = highest(certainty_M, hidden, num_reveal_B)
            rows_M, draws_M = rows_M[is_revealed_M], draws_M[is_revealed_M]
        again = (is_wanted_T & ~is_hidden_T).nonzero()[:, 0][highest(self.uniform(shown), shown, num_hide_B)]
        input_ids = canvas.input_ids.clone()
        input_ids[rows_M] = draws_M
        input_ids[again] = self.mask_id
        self.canvas = canvas._replace(input_ids=input_ids)

    def uniform(self, rows: Packed) -> Tensor:
        return torch.rand(rows.num_tokens, device=self.model.device, generator=self.generator)

    def predict(self, rows_M: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
        """A drawn token [M] for each of these hidden rows of the canvas, and how certain the model is of it [M]."""
        model, sampling, encoded = self.model, self.sampling, self.encoded
        if encoded is None:
            encoded = model.encoder(packed=model.encoder.visible(self.canvas))
        states = [self.decode(encoded, rows_M)]
        if sampling.guidance > 0:
            null = model.exposure.withhold(encoded.last_hidden_state)
            states.append(self.decode(ConceptEncoderOutput(last_hidden_state=null, anchors=encoded.anchors), rows_M))
        draws, certainties = [], []
        for parts in zip(*(hidden_Md.split(CHUNK_ROWS) for hidden_Md in states), strict=True):
            logits = [model.lm_head(part) for part in parts]
            guided = guide(*logits, sampling.guidance) if sampling.guidance > 0 else logits[0]
            tokens, probabilities = draw(guided, self.special, sampling, self.generator, greedy)
            draws.append(tokens)
            certainties.append(certainty(sampling.unmask, probabilities, tokens))
        return torch.cat(draws), torch.cat(certainties)

    def decode(self, encoded: ConceptEncoderOutput, rows_M: Tensor) -> Tensor:
        """Hidden states [M, d] of these rows of the canvas."""
        model, canvas = self.model, self.canvas
        is_hidden_T = canvas.input_ids == self.mask_id
        takes_part_T = torch.ones_like(is_hidden_T) if self.encoded is None else self.is_wanted_T
        num_hidden_B, num_all_B = (canvas.select(rows).cu_seqlens.diff() for rows in (is_hidden_T, takes_part_T))
        times_B = (num_hidden_B / num_all_B.clamp_min(1)).clamp_min(1e-3)
        is_asked_T = torch.zeros_like(is_hidden_T).index_fill(0, rows_M, True)
        rows_T = takes_part_T if model.mixes_rows else is_asked_T
        rows = canvas.select(rows_T)
        hidden_Rd = model.decode(
            encoded, rows.position_ids, rows.cu_seqlens, rows.max_seqlen, rows.input_ids, times_B
        )
        return hidden_Rd[is_asked_T[rows_T]] if model.mixes_rows else hidden_Rd


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
