"""Answers compared word by word, as SQuAD, SCROLLS and LongBench do it.

Source: Rajpurkar et al. 2016, arXiv:1606.05250, whose evaluation script fixed this normalisation.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Lower case, without ASCII punctuation, then without articles, words one space apart; accents stay."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split())


def overlap_f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """2PR / (P + R) of two bags of words; 0 where they share none, so also where one is empty."""
    common = (Counter(prediction) & Counter(reference)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def f1(prediction: str, reference: str) -> float:
    """0 to 1."""
    return overlap_f1(normalized(prediction).split(), normalized(reference).split())


def exact_match(prediction: str, reference: str) -> float:
    """1 where the normalised texts are equal (so "a" equals "the"), else 0."""
    return float(normalized(prediction) == normalized(reference))
