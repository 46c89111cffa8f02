"""Where in a document something stands: needles, twins, paragraphs. Nothing is trained.

P parts of a document, e width of a vector.
"""

import itertools
import re
from collections.abc import Sequence

import numpy as np

from ....engine.errors import InputError
from ....engine.labelled.examples import Example
from ....engine.labelled.task import Task
from ...analysis.embedding import directions
from ..readers import Read, Reader
from .retrieval import bm25_scores

PARAGRAPH = re.compile(r"Paragraph (\d+): ")
NEAR = 0.99  # cosine above which two passages, each read alone, count as one: equal ones have 1 but for rounding
FAR = 3  # parts that two alike ones must be apart


def predict(task: Task, given: Sequence[Example], reader: Reader, asks: Reader) -> dict[str, int | str]:
    """1 where the part that was found overlaps what was asked for; of LongBench's tasks what they want written.

    Passages are counted by reading each alone: parts of the document do not end where passages do, so that two copies
    have other parts, and are no more alike than some that differ.
    """
    if task.short == "passage_count":
        return {each.id: str(num_different(each, reader)) for each in given}
    reads = reader.parts([each.document for each in given])
    queries = directions(asks.whole([each.question for each in given])) if given[0].question else [None] * len(given)
    found = zip(given, reads, queries, strict=True)
    if task.short == "passage_retrieval_en":
        return {each.id: best_paragraph(each, read, query) for each, read, query in found}
    if task.generator == "duplicate":
        return {each.id: int(twins(each, read)) for each, read, _ in found}
    return {each.id: int(overlaps(read.spans[int((directions(read.vectors) @ query).argmax())], each.spans[0]))
            for each, read, query in found}  # fmt: skip


def overlaps(part: np.ndarray, span: tuple[int, int]) -> bool:
    return bool(part[0] < span[1] and span[0] < part[1])


def twins(example: Example, read: Read) -> bool:
    """Whether the two parts that are most alike, some parts apart, lie one in each copy."""
    if len(read.vectors) <= FAR:
        return False
    vectors = directions(read.vectors)
    cosines = vectors @ vectors.T
    places = np.arange(len(vectors))
    cosines[places[:, None] + FAR > places] = -np.inf
    i, j = divmod(int(cosines.argmax()), len(vectors))
    return overlaps(read.spans[i], example.spans[0]) and overlaps(read.spans[j], example.spans[1])


def paragraphs(example: Example) -> list[tuple[str, int, int]]:
    """(number, first character, end) of the document's numbered paragraphs, which begin with their number.

    Raises:
        InputError: there are none.
    """
    starts = [(match[1], match.start()) for match in PARAGRAPH.finditer(example.document)]
    if not starts:
        raise InputError(f"{example.id}: expected a document of 'Paragraph 1: ...', 'Paragraph 2: ...'; get it again")
    ends = [*(start for _, start in starts[1:]), len(example.document)]
    return [(number, start, end) for (number, start), end in zip(starts, ends, strict=True)]


def best_paragraph(example: Example, read: Read, query: np.ndarray) -> str:
    """By the mean of the parts whose middles lie in it."""
    found = paragraphs(example)
    middle = read.spans.mean(1)
    rows = []
    for _, begin, end in found:
        inside = (middle >= begin) & (middle < end)
        if not inside.any():
            inside = np.arange(len(middle)) == np.abs(middle - (begin + end) / 2).argmin()
        rows.append(read.vectors[inside].mean(0))
    return f"Paragraph {found[int((directions(np.stack(rows)) @ query).argmax())][0]}"


def num_different(example: Example, reader: Reader) -> int:
    """Passages without those that are one before them again."""
    texts = [PARAGRAPH.sub("", example.document[a:b], count=1).strip() for _, a, b in paragraphs(example)]
    vectors = directions(reader.whole(texts))
    cosines = np.tril(vectors @ vectors.T, -1)
    return int((cosines.max(1, initial=0) < NEAR).sum())


def bm25(task: Task, given: Sequence[Example], num_parts: int) -> dict[str, int | str]:
    """The same by words: the document in equal pieces, or in its paragraphs."""
    made: dict[str, int | str] = {}
    for each in given:
        if task.short == "passage_retrieval_en":
            found = paragraphs(each)
            pieces = [each.document[a:b] for _, a, b in found]
            made[each.id] = f"Paragraph {found[int(bm25_scores([each.question], pieces)[0].argmax())][0]}"
            continue
        edges = [i * len(each.document) // num_parts for i in range(num_parts + 1)]
        pieces = [each.document[a:b] for a, b in itertools.pairwise(edges)]
        best = int(bm25_scores([each.question], pieces)[0].argmax())
        made[each.id] = int(overlaps(np.array(edges[best : best + 2]), each.spans[0]))
    return made
