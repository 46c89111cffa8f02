"""Masked diffusion: each sequence is hidden at its own time t, and the model is asked for what is hidden."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..packing import Packed
from ..ranges import check, one_of, portion, switch, within
from .view import (
    HIDDEN,
    SampleKey,
    SpecialTokens,
    View,
    build_view,
    clean_text,
    hide_rows,
    keep_rows,
    low_discrepancy_t,
    per_sequence,
)  # fmt: skip

CHOICE = 0  # stream of a key
WEIGHTINGS = ("mdlm", "selfnorm", "none")
EVALUATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


@dataclass(frozen=True)
class Diffusion:
    """Every token that is not special is hidden with probability t, independently; t in (eps, 1] is one per sequence.

    ``weighting``:
        "mdlm"      weight 1/t, divided by the number of all tokens that can be hidden: an upper bound of their
                    negative log-likelihood in nats per token, exact in expectation (log-linear schedule).
        "selfnorm"  weight 1/max(t, t_floor), divided by the sum of the weights. Not a bound.
        "none"      weight 1, divided by the number of hidden tokens.
    ``encoder_view``:
        "noisy"     the encoder reads the text without what is hidden; every target is *unseen*.
        "clean"     the encoder reads the whole text: auto-encoding, every target is *seen*. A target's loss then
                    depends on t through the timestep alone, unless the decoder mixes rows.
    ``hidden``: what stands for a hidden token in a noisy encoder's input, nothing ("drop") or [MASK] ("mask").
    ``context``: also give the decoder the tokens that are not hidden, as rows that are not asked for: for decoders that
        mix rows, which without it would know the visible text through the concepts alone.

    Times have low discrepancy (``view.low_discrepancy_t``), so that every batch is spread over them. The divisor is
    a sum over the batch and adds up over micro-batches and ranks.

    Source: Sahoo et al. 2024 (MDLM), arXiv:2406.07524.
    """

    weighting: str = one_of(*WEIGHTINGS)
    encoder_view: str = one_of("noisy", "clean")
    hidden: str = one_of(*HIDDEN)
    context: bool = switch()
    eps: float = within(1e-3)
    t_floor: float = portion(0.1)

    def __post_init__(self):
        check(self)

    def view(self, batch: Packed, keys: Sequence[SampleKey], tokens: SpecialTokens) -> View:
        """A pure function of its arguments; what is hidden in a sequence depends on its own key only."""
        return self.view_at(low_discrepancy_t(keys, self.eps), batch, keys, tokens)

    def evaluation_views(self, batch: Packed, keys: Sequence[SampleKey], tokens: SpecialTokens) -> dict[str, View]:
        """The same weighting at fixed times; the same keys hide nested sets of tokens as t grows."""
        return {f"t={t:.2f}": self.view_at(np.full(len(keys), t), batch, keys, tokens) for t in EVALUATION_TIMES}

    def view_at(self, t_B: np.ndarray, batch: Packed, keys: Sequence[SampleKey], tokens: SpecialTokens) -> View:
        """The view at given times [B]."""
        text = clean_text(batch, keys, tokens)
        t_T = np.repeat(t_B, text.lengths)
        is_hidden = text.maskable & (per_sequence(text, keys, CHOICE, np.random.Generator.random) < t_T)
        rows = np.flatnonzero(is_hidden)
        weights, divisor = self.weights(t_T[rows], int(text.maskable.sum()))
        everything = np.ones_like(is_hidden)
        is_clean = self.encoder_view == "clean"
        return build_view(
            encoder=keep_rows(text, everything) if is_clean else hide_rows(text, is_hidden, tokens, self.hidden),
            text=text, rows=rows, decoder_ids=np.full(len(rows), tokens.mask_id), weights=weights,
            seen=np.full(len(rows), is_clean), timesteps=t_B, divisor=divisor,
            context=~is_hidden if self.context else None,
        )  # fmt: skip

    def weights(self, t_M: np.ndarray, num_maskable: int) -> tuple[np.ndarray, float]:
        if self.weighting == "mdlm":
            return 1.0 / t_M, float(num_maskable)
        weights = 1.0 / np.maximum(t_M, self.t_floor) if self.weighting == "selfnorm" else np.ones_like(t_M)
        return weights, float(weights.sum())
