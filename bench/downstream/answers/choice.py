"""One of several options, by how well the document bears out each. Nothing is trained.

K options, P parts of a document, e width of a vector.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from ....engine.labelled.examples import Example
from ...analysis.embedding import directions
from ..readers import Reader
from .retrieval import bm25_scores

BEST = 3  # parts of the document that may speak for an option
PIECES = 64  # of a document, for BM25


def predict(given: Sequence[Example], reader: Reader, asks: Reader) -> dict[str, str]:
    """The option whose vector, read behind the question, has the largest mean cosine with its BEST parts of the
    document. An option also has a vector without the document, but what it says there is nothing about it."""
    reads = reader.parts([each.document for each in given])
    texts = [f"{each.question} {option}" for each in given for option in each.options]
    vectors, made, start = directions(asks.whole(texts)), {}, 0
    for each, read in zip(given, reads, strict=True):
        options = vectors[start : start + len(each.options)]
        start += len(each.options)
        cosines = np.sort(options @ directions(read.vectors).T, axis=1)[:, -BEST:].mean(1)
        made[each.id] = each.options[int(cosines.argmax())]
    return made


def bm25(given: Sequence[Example]) -> dict[str, str]:
    """The same by words, with the document in equal pieces."""
    made = {}
    for each in given:
        edges = [i * len(each.document) // PIECES for i in range(PIECES + 1)]
        pieces = [each.document[a:b] for a, b in itertools.pairwise(edges)]
        scores = bm25_scores([f"{each.question} {option}" for option in each.options], pieces)
        made[each.id] = each.options[int(np.sort(scores, axis=1)[:, -BEST:].mean(1).argmax())]
    return made
