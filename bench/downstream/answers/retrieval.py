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

BEST = 3  # parts of a document that may speak for it


def predict(given: Sequence[Example], reader: Reader, asks: Reader) -> dict[str, list[str]]:
    """Of every query the names of the best documents, by ``by_parts``."""
    return ranked(given, by_parts(given, reader, asks))


def variants(given: Sequence[Example], reader: Reader, asks: Reader) -> dict[str, dict[str, list[str]]]:
    """
    one vector   the cosine with the vector of the whole document
    with BM25    the sum of ``by_parts`` and of BM25's scores, of each query brought to mean 0 and deviation 1
    """
    documents, queries = of_both(given)
    wholes = np.stack([read.whole for read in reader.parts(documents)])
    whole = directions(asks.whole(queries)) @ directions(wholes).T
    both = standard(by_parts(given, reader, asks)) + standard(bm25_scores(queries, documents))
    return {"one vector": ranked(given, whole), "with BM25": ranked(given, both)}


def by_parts(given: Sequence[Example], reader: Reader, asks: Reader) -> np.ndarray:
    """[Q, n] the mean cosine of a query with its BEST parts of a document. From both is taken what all queries have in
    common, and all parts: that one asks for a summary of a meeting tells meetings apart by nothing."""
    documents, queries = of_both(given)
    parts = [read.vectors for read in reader.parts(documents)]
    middle = np.sum([part.sum(0, dtype=np.float64) for part in parts], axis=0) / sum(map(len, parts))
    asked = asks.whole(queries)
    asked = directions(asked - asked.mean(0)) if len(queries) > 1 else directions(asked)
    found = [asked @ directions(part - middle).T for part in parts]
    return np.stack([np.sort(cosines, axis=1)[:, -BEST:].mean(1) for cosines in found], axis=1)


def of_both(given: Sequence[Example]) -> tuple[list[str], list[str]]:
    """(documents, a query of each example)"""
    return list(dict.fromkeys(each.document for each in given)), [each.question for each in given]


def standard(scores: np.ndarray) -> np.ndarray:
    """[Q, n]"""
    spread = scores.std(1, keepdims=True)
    return (scores - scores.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1)


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
    documents, queries = of_both(given)
    return ranked(given, bm25_scores(queries, documents))
