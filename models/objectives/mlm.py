"""Masked language modelling: a fixed share of the tokens is hidden, and asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..packing import Packed
from ..ranges import PLACE, check, given, number, one_of, or_nothing, portion, switch
from .masking import KINDS, SPANS, Masking
from .view import (
    HIDDEN,
    SampleKey,
    SpecialTokens,
    Text,
    View,
    build_view,
    check_option,
    clean_text,
    hide_rows,
    per_sequence,
)  # fmt: skip

CHOICE, FATE, WORD = range(3)  # streams of a key
EVALUATION_RATES = (0.15, 0.3, 0.5)


@dataclass(frozen=True)
class MaskedLM:
    """A share ``probability`` of the tokens that are not special is asked for.

    Which ones: ``masking``, ``span`` and ``phrases``, see ``Masking``; by default each token independently.

    Of the targets, a share ``random`` is replaced by random tokens and a share ``unchanged`` stays as it is (BERT: 0.1
    and 0.1), a word or span always as a whole; the others are hidden. The encoder sees an unchanged target, so its
    loss is labelled *seen*. Each target has weight 1 and the divisor is their number.

    ``hidden``: what stands for a hidden token in the encoder's input, "drop": nothing, positions keep their gaps, or
    "mask": [MASK]. The decoder's ids are those of the corrupted text.

    ``context``: also give the decoder the other tokens, as rows that are not asked for: for decoders that mix rows.

    Source: Devlin et al. 2019 (BERT), arXiv:1810.04805.
    """

    probability: float = portion(0.3)
    random: float = given(0.0, number(0, 1))
    unchanged: float = given(0.0, number(0, 1))
    hidden: str = one_of(*HIDDEN)
    masking: str = one_of(*KINDS)
    span: str = one_of(*SPANS)
    phrases: str | None = given(None, or_nothing(PLACE))
    context: bool = switch()

    def __post_init__(self):
        check(self)
        expected = f"a number in [0, 1 - random = {1 - self.random:g}]"
        check_option("unchanged", self.unchanged, expected, self.unchanged <= 1 - self.random)
        self.choice()

    def choice(self) -> Masking:
        return Masking(self.masking, self.span, self.phrases)

    def view(self, batch: Packed, keys: Sequence[SampleKey], tokens: SpecialTokens) -> View:
        """A pure function of its arguments; the corruption of a sequence depends on its own key only."""
        text = clean_text(batch, keys, tokens)
        is_target, leader = self.choice().choose(self.probability, text, keys, tokens, CHOICE)
        fate = per_sequence(text, keys, FATE, np.random.Generator.random)[leader]
        is_random = is_target & (fate < self.random)
        is_unchanged = is_target & (fate >= 1 - self.unchanged)
        is_hidden = is_target & ~is_random & ~is_unchanged
        ids = np.where(is_random, self.random_words(text, keys, tokens), text.ids)
        corrupted = np.where(is_hidden, tokens.mask_id, ids)
        rows = np.flatnonzero(is_target)
        return build_view(
            encoder=hide_rows(text._replace(ids=ids), is_hidden, tokens, self.hidden),
            text=text, rows=rows, decoder_ids=corrupted[rows], weights=np.ones(len(rows)), seen=is_unchanged[rows],
            timesteps=None, divisor=float(len(rows)), context=~is_target if self.context else None,
        )  # fmt: skip

    def evaluation_views(self, batch: Packed, keys: Sequence[SampleKey], tokens: SpecialTokens) -> dict[str, View]:
        """The training rate and a fixed grid of others, everything hidden that is asked for."""
        rates = sorted({*EVALUATION_RATES, self.probability})
        plain = {rate: replace(self, probability=rate, random=0.0, unchanged=0.0) for rate in rates}
        return {f"mask={rate:.2f}": objective.view(batch, keys, tokens) for rate, objective in plain.items()}

    def random_words(self, text: Text, keys: Sequence[SampleKey], tokens: SpecialTokens) -> np.ndarray:
        if self.random == 0:
            return text.ids
        words = np.setdiff1d(np.arange(tokens.vocab_size), np.fromiter(tokens.special_ids, dtype=np.int64))
        return words[per_sequence(text, keys, WORD, lambda g, n: g.integers(len(words), size=n))]
