"""Sentences taken out of long chapters: which chapter is theirs, and where in it they stood."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from .embedding import Parts, directions

SENTENCE = re.compile(r"(?<=[.!?]\s)[A-Z][^.!?\n]{58,240}\.(?=\s)")
EDGE = 2  # characters: a place this near to a part belongs to it


class Question(NamedTuple):
    text: str
    chapter: int
    kept: int  # the middle of the sentence, in the chapter as it is
    removed: int  # where it stood, in the chapter without its sentences


class Chapters(NamedTuple):
    kept: list[str]
    removed: list[str]
    questions: list[Question]


def draw(texts: Sequence[str], per_chapter: int, seed: int = 0) -> Chapters:
    """Draws sentences that occur once. A pure function of its arguments; a chapter may have fewer of them."""
    generator, removed, questions = np.random.default_rng(seed), [], []
    for number, text in enumerate(texts):
        found = [match for match in SENTENCE.finditer(text) if text.count(match[0]) == 1]
        chosen = sorted(generator.permutation(len(found))[:per_chapter])
        rest, end = [], 0
        for match in (found[i] for i in chosen):
            rest.append(text[end : match.start()])
            where = sum(map(len, rest))
            questions.append(Question(match[0], number, (match.start() + match.end()) // 2, where))
            end = match.end()
        removed.append("".join([*rest, text[end:]]))
    return Chapters(list(texts), removed, questions)


def search(queries: np.ndarray, documents: Sequence[Parts], questions: Sequence[Question], is_removed: bool) -> dict:
    """How often the right chapter comes first by its best part, and how often its best part is the right one.

    ``queries``: [n, e] of norm 1. Returns shares and their standard errors, by the vectors as they are.
    """
    first = np.stack([(queries @ directions(parts.vectors).T).max(1) for parts in documents], axis=1).argmax(1)
    found = first == [question.chapter for question in questions]
    placed = []
    for query, question in zip(queries, questions, strict=True):
        parts = documents[question.chapter]
        begin, end = parts.spans[int((directions(parts.vectors) @ query).argmax())]
        where = question.removed if is_removed else question.kept
        placed.append(begin - EDGE <= where <= end + EDGE)
    return {"chapter": share(found), "place": share(np.array(placed))}


def whole(queries: np.ndarray, vectors: np.ndarray, questions: Sequence[Question]) -> dict:
    """The right chapter by one vector each, [n, e] of norm 1."""
    return {"chapter": share((queries @ vectors.T).argmax(1) == [question.chapter for question in questions])}


def centred(documents: Sequence[Parts]) -> list[Parts]:
    """Without what part p has in common in all documents; they must have as many parts each."""
    common = np.mean([parts.vectors for parts in documents], axis=0)
    return [parts._replace(vectors=parts.vectors - common) for parts in documents]


def bm25(documents: Sequence[str], questions: Sequence[Question], num_parts: int, is_removed: bool) -> dict | None:
    """The same two questions by BM25 over words; None where ``bm25s`` is not installed."""
    try:
        import bm25s
    except ImportError:
        return None

    def ranked(texts: Sequence[str], queries: Sequence[str]) -> Any:
        index = bm25s.BM25()
        index.index(bm25s.tokenize(list(texts), stopwords="en", show_progress=False), show_progress=False)
        words = bm25s.tokenize(list(queries), stopwords="en", show_progress=False)
        return index.retrieve(words, k=1, show_progress=False).documents[:, 0]

    queries = [question.text for question in questions]
    found = ranked(documents, queries) == [question.chapter for question in questions]
    placed = []
    for number, text in enumerate(documents):
        mine = [question for question in questions if question.chapter == number]
        if not mine:
            continue
        edges = [i * len(text) // num_parts for i in range(num_parts + 1)]
        best = ranked([text[a:b] for a, b in pairwise(edges)], [each.text for each in mine])
        for question, part in zip(mine, best, strict=True):
            where = question.removed if is_removed else question.kept
            placed.append(edges[part] - EDGE <= where <= edges[part + 1] + EDGE)
    return {"chapter": share(found), "place": share(np.array(placed))}


def share(hits: np.ndarray) -> tuple[float, float, int]:
    """(share, its standard error, number)."""
    mean = float(np.mean(hits))
    return mean, float(np.sqrt(mean * (1 - mean) / len(hits))), len(hits)
