"""Documents ranked for a query. Nothing is trained.

Q queries, n documents, P parts of a document, e width of a vector.
"""

import logging
from collections.abc import Sequence

import numpy as np

from ....engine.errors import InputError
from ....engine.labelled.examples import Example
from ...analysis.embedding import directions
from ..metrics.ranking import CUT
from ..readers import Reader

WAYS = ("best part", "one vector")


def predict(given: Sequence[Example], reader: Reader, asks: Reader, way: str = "best part") -> dict[str, list[str]]:
    """Of every query the names of the best documents.

    best part    the largest cosine of the query's vector with a part of the document
    one vector   the cosine with the vector of the whole document
    """
    documents = list(dict.fromkeys(each.document for each in given))
    queries = directions(asks.whole([each.question for each in given]))
    found = reader.parts(documents)
    if way == "one vector":
        scores = queries @ directions(np.stack([read.whole for read in found])).T
    else:
        scores = np.stack([(queries @ directions(read.vectors).T).max(1) for read in found], axis=1)
    return ranked(given, scores)


def ranked(given: Sequence[Example], scores: np.ndarray) -> dict[str, list[str]]:
    """[Q, n] -> the first CUT of each. Documents that score alike stand in an order that no query knows."""
    shuffle = np.random.default_rng(0).permutation(scores.shape[1])
    order = shuffle[np.argsort(-scores[:, shuffle], axis=1, kind="stable")[:, :CUT]]
    return {each.id: [str(number) for number in row] for each, row in zip(given, order, strict=True)}


def references(given: Sequence[Example]) -> dict[str, list[str]]:
    """Of every query its document's number, in the order in which documents come first."""
    number = {document: str(i) for i, document in enumerate(dict.fromkeys(each.document for each in given))}
    return {each.id: [number[each.document]] for each in given}


def bm25_scores(queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
    """[Q, n] by the library bm25s, with English stop words left out."""
    try:
        import bm25s
    except ImportError as error:
        raise InputError("bm25s is not installed; pip install 'conceptron[downstream]'") from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of every index, a line a question
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(documents), stopwords="en", show_progress=False), show_progress=False)
    words = bm25s.tokenize(list(queries), stopwords="en", return_ids=False, show_progress=False)
    return np.stack([index.get_scores(each) if each else np.zeros(len(documents)) for each in words])


def bm25(given: Sequence[Example]) -> dict[str, list[str]]:
    documents = list(dict.fromkeys(each.document for each in given))
    return ranked(given, bm25_scores([each.question for each in given], documents))
