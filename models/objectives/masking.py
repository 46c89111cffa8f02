"""What a masked language model is asked for: single tokens, whole words, spans, or phrases that belong together.

T packed tokens, N tokens of one sequence that are not special, W words of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..packing import offsets
from ..ranges import PLACE, check, given, one_of, or_nothing
from . import pmi
from .view import SampleKey, SpecialTokens, Text, check_option, per_sequence
from .words import word_starts

LENGTHS = np.arange(1, 11)
SPANS = {  # how often a span has each of the LENGTHS, up to a factor
    "uniform": (LENGTHS >= 3).astype(float),  # of tokens; mean 6.5
    "poisson": np.array([3.0**n / math.factorial(n) for n in LENGTHS]),  # of tokens; rate 3, none of length 0
    "geometric": 0.8**LENGTHS,  # of words; p = 0.2, mean 3.8
}
KINDS = ("random", "whole_word", "span", "pmi")


class Targets(NamedTuple):
    is_target: np.ndarray  # [T] bool
    leader: np.ndarray  # [T] int64: the row whose draw decides for this row too; its own if it is decided alone


@dataclass(frozen=True)
class Masking:
    """``masking``:
        "random"      each token is a target with ``probability``, independently.
        "whole_word"  whole words (see ``word_starts``), probability * N tokens in all.
        "pmi"         the same with phrases: words that stand together in the list ``phrases`` are one unit, where
                      the longest match (in words) wins and equals are drawn; every other word is a unit of its own.
        "span"        spans of drawn lengths, until exactly floor(probability * n + u) of the n tokens (``span``
                      "uniform": 3 to 10; "poisson") or words ("geometric", 1 to 10: SpanBERT) are reached, u uniform
                      in [0, 1); the last span is cut to fit. Every placement is equally likely, on a circle, so that
                      the ends of a text are hidden as often as its middle; a span may go on at the other end.

    Words and phrases are laid on a circle in random order, and those under an arc of probability * N tokens are taken;
    one that lies under the arc in part, with the chance of that part. So each is a target with exactly ``probability``,
    however long it is, and the number of targets misses the budget by less than two of them. (Counting off until the
    budget is full instead would rarely take a long word from a short text.) Special tokens are never targets; words
    and phrases end at them.

    Source: Joshi et al. 2020 (SpanBERT), arXiv:1907.10529; Levine et al. 2021 (PMI-Masking), arXiv:2010.01825;
    Lewis et al. 2020 (BART, Poisson), arXiv:1910.13461.
    """

    masking: str = one_of(*KINDS)
    span: str = one_of(*SPANS)
    phrases: str | None = given(None, or_nothing(PLACE))  # file made by pmi.save

    def __post_init__(self):
        check(self)
        expected = "a file of phrases with masking 'pmi', and nothing with another"
        check_option("phrases", self.phrases, expected, (self.phrases is not None) == (self.masking == "pmi"))
        if self.phrases is not None:
            pmi.load(self.phrases)

    def choose(
        self, probability: float, text: Text, keys: Sequence[SampleKey], tokens: SpecialTokens, stream: int
    ) -> Targets:
        """The choice in a sequence is a pure function of its tokens and its key.

        Raises:
            ValueError: words are needed and the tokenizer does not tell them, or the phrases are another tokenizer's.
        """
        everyone = np.arange(len(text.ids))
        if self.masking == "random":
            draws = per_sequence(text, keys, stream, np.random.Generator.random)
            return Targets(text.maskable & (draws < probability), everyone)
        by_token = self.masking == "span" and self.span != "geometric"
        starts = np.ones(len(everyone), dtype=bool) if by_token else word_starts(text, tokens)
        phrases = pmi.load(self.phrases).for_vocabulary(tokens.vocab_size) if self.masking == "pmi" else None
        is_target, leader = np.zeros(len(everyone), dtype=bool), everyone.copy()
        bounds = offsets(text.lengths)
        for key, begin, end in zip(keys, bounds[:-1], bounds[1:], strict=True):
            g, rows, begins = key.generator(stream), everyone[begin:end], starts[begin:end]
            if phrases is not None:
                begins = phrases.join(text.ids[rows], begins, g)
            rows, begins = rows[text.maskable[rows]], begins[text.maskable[rows]]
            sizes = np.diff(np.append(np.flatnonzero(begins), len(rows)))  # tokens of each unit
            group = self.spans(len(sizes), probability, g) if self.masking == "span" else take(sizes, probability, g)
            group = group[np.cumsum(begins) - 1]  # of each row; -1: not a target
            rows, group = rows[group >= 0], group[group >= 0]
            _, first, member = np.unique(group, return_index=True, return_inverse=True)
            is_target[rows], leader[rows] = True, rows[first][member]
        return Targets(is_target, leader)

    def spans(self, num_items: int, probability: float, g: np.random.Generator) -> np.ndarray:
        """[num_items] int64: the number of the span that each token (or word) is in, -1 for none."""
        budget = int(probability * num_items + g.random())
        frequency = SPANS[self.span]
        sizes = g.choice(LENGTHS, size=budget, p=frequency / frequency.sum())
        ends = np.cumsum(sizes)
        num_spans = int(np.searchsorted(ends, budget)) + 1 if budget else 0
        sizes = np.diff(np.minimum(ends[:num_spans], budget), prepend=0)
        # spans and the items between them, shuffled
        blocks = np.concatenate([sizes, np.ones(num_items - budget, dtype=np.int64)])
        names = np.concatenate([np.arange(num_spans), np.full(num_items - budget, -1)])
        order = g.permutation(len(blocks))
        return np.roll(np.repeat(names[order], blocks[order]), g.integers(max(num_items, 1)))


def take(sizes: np.ndarray, probability: float, g: np.random.Generator) -> np.ndarray:
    """[W] int64: the number of the unit if it is a target, else -1; for units of ``sizes`` [W] tokens."""
    order, num_tokens = g.permutation(len(sizes)), sizes.sum()
    ends = np.cumsum(sizes[order])
    arc = g.random() * num_tokens - np.array([[0.0], [num_tokens]])  # where it begins, and once more a turn earlier
    inside = np.minimum(ends, arc + probability * num_tokens) - np.maximum(ends - sizes[order], arc)
    is_taken = g.random(len(sizes)) * sizes[order] < np.maximum(inside, 0).sum(0)
    group = np.full(len(sizes), -1)
    group[order[is_taken]] = order[is_taken]
    return group
