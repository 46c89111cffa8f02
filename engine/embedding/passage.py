"""The sentence in a passage that answers best, and how it looks on a terminal."""

import re
import textwrap
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

BREAK = re.compile(r"(?<=[.!?])\s+(?=[\"'(\[`A-Z0-9])|\n\s*\n")  # between sentences
AROUND = 240  # characters before and behind a concept's span in which its first and last sentence may begin and end
SHOWN = 420  # characters of a passage
STRIP = 24  # cells that show the place in the document


class Passage(NamedTuple):
    before: str
    best: str  # the sentence that is nearest to the query
    after: str


def sentences(text: str, begin: int, end: int) -> list[str]:
    """The sentences that the characters ``begin`` to ``end`` - 1 touch, white space collapsed, very long ones cut."""
    left, right = max(0, begin - AROUND), min(len(text), end + AROUND)
    starts = [match.end() for match in BREAK.finditer(text, left, right)]
    edges = [left, *starts, right]
    touched = [(a, b) for a, b in pairwise(edges) if a < end and b > begin] or [(begin, end)]
    found = [" ".join(text[a:b].split()) for a, b in touched]
    if 0 < left == touched[0][0]:
        found[0] = f"... {found[0]}"
    if touched[-1][1] == right < len(text.rstrip()):
        found[-1] = f"{found[-1]} ..."
    return [sentence for sentence in found if sentence]


def passage(found: Sequence[str], scores: np.ndarray) -> Passage:
    """The best sentence, and as much around it as there is room for."""
    best = int(np.argmax(scores))
    first = last = best
    room = SHOWN - len(found[best])
    while room > 0 and (first > 0 or last + 1 < len(found)):
        grows_back = first > 0 and (last + 1 == len(found) or best - first <= last - best)
        first, last = (first - 1, last) if grows_back else (first, last + 1)
        room -= len(found[first if grows_back else last])
    return Passage(" ".join(found[first:best]), found[best], " ".join(found[best + 1 : last + 1]))


def wrapped(shown: Passage, width: int, indent: str, mark: Callable[[str], str]) -> str:
    """Lines of at most ``width`` cells; every word of the best sentence passes through ``mark``."""
    words = [(word, is_best) for part, is_best in zip(shown, (False, True, False), strict=True)
             for word in shortened(part, is_best).split()]  # fmt: skip
    lines: list[list[tuple[str, bool]]] = [[]]
    used = 0
    for word, is_best in words:
        if lines[-1] and used + 1 + len(word) > width - len(indent):
            lines.append([])
            used = 0
        used += len(word) + bool(lines[-1])
        lines[-1].append((word, is_best))
    return "\n".join(indent + marked(line, mark) for line in lines)


def shortened(part: str, is_best: bool) -> str:
    return textwrap.shorten(part, 2 * SHOWN, placeholder=" ...") if is_best else part


def marked(line: Sequence[tuple[str, bool]], mark: Callable[[str], str]) -> str:
    """One line; neighbouring words of the best sentence are marked together."""
    pieces: list[str] = []
    run: list[str] = []
    for word, is_best in [*line, ("", False)]:
        if is_best:
            run.append(word)
            continue
        if run:
            pieces.append(mark(" ".join(run)))
            run = []
        pieces += [word] if word else []
    return " ".join(pieces)


def strip(begin: int, end: int, length: int, cells: tuple[str, str]) -> str:
    """Where in a text of ``length`` characters a span lies: ``cells`` are what is outside and what is inside."""
    first = min(STRIP - 1, begin * STRIP // max(length, 1))
    last = max(first + 1, -(-end * STRIP // max(length, 1)))
    return cells[0] * first + cells[1] * (last - first) + cells[0] * (STRIP - last)
