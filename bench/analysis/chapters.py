"""Sentences taken out of long chapters: which chapter is theirs, and where in it they stood."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from .embedding import Parts, directions

SENTENCE = re.compile(r"(?<=[.!?]\s)[A-Z][^.!?\n]{58,240}\.(?=\s)")
EDGE = 2  # characters: a place this near to a part belongs to it
NEAR = 128  # tokens: from the middle of a part to a place that it found "within" so many


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
    """How often the right chapter comes first by its best part, and how often its best part is the right one, or one
    whose middle is within ``NEAR`` tokens of the place.

    ``queries``: [n, e] of norm 1. Returns shares and their standard errors, by the vectors as they are.
    """
    first = np.stack([(queries @ directions(parts.vectors).T).max(1) for parts in documents], axis=1).argmax(1)
    found = first == [question.chapter for question in questions]
    best = []
    for query, question in zip(queries, questions, strict=True):
        parts = documents[question.chapter]
        best.append(parts.spans[int((directions(parts.vectors) @ query).argmax())])
    return {"chapter": share(found), **placed(best, [parts.starts for parts in documents], questions, is_removed)}


def placed(
    best: Sequence[Sequence[int]], starts: Sequence[np.ndarray], questions: Sequence[Question], is_removed: bool
) -> dict:
    """How often the ``best`` part of a question, (begin, end) in characters, holds its place, and how often it is near.

    ``starts``: of each chapter, the first characters of its tokens.
    """
    hits, near = [], []
    for (begin, end), question in zip(best, questions, strict=True):
        where = question.removed if is_removed else question.kept
        hits.append(begin - EDGE <= where <= end + EDGE)
        middle, place = np.searchsorted(starts[question.chapter], [(begin + end) / 2, where], side="right")
        near.append(abs(middle - place) <= NEAR)
    return {"place": share(np.array(hits)), f"place within {NEAR} tokens": share(np.array(near))}


def whole(queries: np.ndarray, vectors: np.ndarray, questions: Sequence[Question]) -> dict:
    """The right chapter by one vector each, [n, e] of norm 1."""
    return {"chapter": share((queries @ vectors.T).argmax(1) == [question.chapter for question in questions])}


def centred(documents: Sequence[Parts]) -> list[Parts]:
    """Without what part p has in common in all documents; they must have as many parts each."""
    common = np.mean([parts.vectors for parts in documents], axis=0)
    return [parts._replace(vectors=parts.vectors - common) for parts in documents]


def bm25(
    documents: Sequence[str], starts: Sequence[np.ndarray], questions: Sequence[Question], num_parts: int,
    is_removed: bool,
) -> dict | None:  # fmt: skip
    """The same by BM25 over words, and over those of ``num_parts`` equal parts; None where ``bm25s`` is not installed.

    ``starts``: as for ``placed``.
    """
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
    asked, best = [], []
    for number, text in enumerate(documents):
        mine = [question for question in questions if question.chapter == number]
        if not mine:
            continue
        edges = [i * len(text) // num_parts for i in range(num_parts + 1)]
        spans = list(pairwise(edges))
        parts = ranked([text[a:b] for a, b in spans], [each.text for each in mine])
        asked += mine
        best += [spans[part] for part in parts]
    return {"chapter": share(found), **placed(best, starts, asked, is_removed)}


def share(hits: np.ndarray) -> tuple[float, float, int]:
    """(share, its standard error, number)."""
    mean = float(np.mean(hits))
    return mean, float(np.sqrt(mean * (1 - mean) / len(hits))), len(hits)
