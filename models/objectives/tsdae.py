"""Denoising by deletion: most of the text is deleted, and all of it has to be written again."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..packing import Packed, pack_flat, positions_within
from ..ranges import check, given, number, one_of, portion
from .view import SampleKey, SpecialTokens, Text, View, build_view, clean_text, keep_rows, per_sequence
from .words import word_starts

CHOICE = 0  # stream of a key
EVALUATION_RATES = (0.3, 0.6, 0.9)


@dataclass(frozen=True)
class TSDAE:
    """Every token that is not special is deleted with ``probability``, independently, and every one is a target.

    ``units``: what is deleted as a whole, "token" or "word".
    ``positions``: of the tokens that the encoder still reads: "kept", with gaps where something was deleted, or
        "restart", counted anew without gaps (the original: where something is missing is then unknown too).

    Of a text that has tokens to delete, at least one (one word) survives. A target that survived is labelled *seen*
    and has the weight ``kept_weight``, since it only has to be copied; a deleted one has weight 1. The divisor is the
    sum of the weights. The decoder is given [MASK] at every target.

    Source: Wang et al. 2021 (TSDAE), arXiv:2104.06979.
    """

    probability: float = portion(0.6)
    units: str = one_of("token", "word")
    positions: str = one_of("kept", "restart")
    kept_weight: float = given(0.25, number(0, 1))

    def __post_init__(self):
        check(self)

    def view(self, batch: Packed, keys: Sequence[SampleKey], tokens: SpecialTokens) -> View:
        """A pure function of its arguments; what is deleted from a sequence depends on its own key only."""
        return self.view_at(self.probability, batch, keys, tokens)

    def evaluation_views(self, batch: Packed, keys: Sequence[SampleKey], tokens: SpecialTokens) -> dict[str, View]:
        """The training rate and a fixed grid of others; the same keys delete nested sets as the rate grows."""
        rates = sorted({*EVALUATION_RATES, self.probability})
        return {f"delete={rate:.2f}": self.view_at(rate, batch, keys, tokens) for rate in rates}

    def view_at(self, probability: float, batch: Packed, keys: Sequence[SampleKey], tokens: SpecialTokens) -> View:
        text = clean_text(batch, keys, tokens)
        is_deleted = deletions(text, keys, tokens, CHOICE, probability, self.units)
        rows = np.flatnonzero(text.maskable)
        weights = np.where(is_deleted[rows], 1.0, self.kept_weight)
        encoder = keep_rows(text, ~is_deleted)
        if self.positions == "restart":
            lengths = np.diff(encoder.cu_seqlens.numpy()).astype(np.int64)
            encoder = pack_flat(text.ids[~is_deleted], positions_within(lengths), lengths)
        return build_view(
            encoder=encoder, text=text, rows=rows, decoder_ids=np.full(len(rows), tokens.mask_id), weights=weights,
            seen=~is_deleted[rows], timesteps=None, divisor=float(weights.sum()),
        )  # fmt: skip


def deletions(
    text: Text, keys: Sequence[SampleKey], tokens: SpecialTokens, stream: int, probability: float, units: str = "token"
) -> np.ndarray:
    """[T] bool: what is deleted. In each sequence that has tokens to delete, the unit with the largest draw stays."""
    draws = per_sequence(text, keys, stream, np.random.Generator.random)
    if units == "word":
        rows = np.arange(len(draws))
        draws = draws[np.maximum.accumulate(np.where(word_starts(text, tokens), rows, 0))]
    largest = np.full(len(text.lengths), -1.0)
    np.maximum.at(largest, text.sequence[text.maskable], draws[text.maskable])
    return text.maskable & (draws < probability) & (draws < largest[text.sequence])
