"""`conceptron search`: the documents that answer a question, and the place in them, by their best concept (MaxSim)."""

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.cache import cache_folder, fingerprint
from ..data.teacher import Teacher
from ..errors import InputError
from .documents import document_at, files_of, report_faults
from .embed import SOME_LEFT_OUT
from .index import Hit, Index
from .model import ConceptModel
from .passage import passage, sentences, strip, wrapped

WIDEST = 100  # cells of a line, however wide the terminal is


class Asked(NamedTuple):
    """Who makes vectors of queries, in the space of the concepts."""

    name: str
    embed: Callable[[Sequence[str]], np.ndarray]  # n texts -> [n, d] of norm 1


def main(options: argparse.Namespace) -> int:
    """``options``: query (several), path, model, index, teacher, top, text_column.

    Returns 0; 1 where some files could not be read and the others were searched.
    """
    if not all(query.strip() for query in options.query):
        raise InputError("QUERY: expected a question in words, got an empty one")
    files = files_of([options.path])
    model = ConceptModel.from_pretrained(options.model)
    asked = who_asks(model, options.teacher)
    folder = options.index or default_folder(options.path, model)
    index = Index(folder, model, options.text_column)
    num_left_out = report_faults(index.update(files), len(files))
    vectors = asked.embed(options.query)
    hits = index.search(vectors, options.top)
    screen = Screen()
    screen.head(index, options.path, asked.name)
    for query, vector, found in zip(options.query, vectors, hits, strict=True):
        screen.answer(query, vector, found, asked, options.text_column)
    return SOME_LEFT_OUT if num_left_out else 0


def default_folder(path: str, model: ConceptModel) -> Path:
    """In the cache, one for each path and model."""
    name = fingerprint([str(Path(path).expanduser().resolve()), model.fingerprint])
    return cache_folder(None) / f"index-{name}"


def who_asks(model: ConceptModel, teacher: str | None) -> Asked:
    """The small teacher, in whose space the concepts lie: ``teacher``, the model's own backbone, or the one that the
    model was distilled from; a model without any embeds queries as it embeds texts.

    Raises:
        InputError: the teacher cannot be found or loaded, is another than in training, or is of another width.
    """
    learned = getattr(model.config, "distilled_from", None)
    if teacher is None and (model.has_states or learned is None or learned["width"] != model.width):
        return Asked("the model's backbone" if model.has_states else "the model itself", model.embed_queries)
    name = teacher or learned["teacher"]
    try:
        found = Teacher(name, model.device)
    except InputError as error:
        what = str(error).removeprefix("distill.teacher: ")
        raise InputError(f"--teacher: {what}{'' if teacher else '; the model was distilled from it'}") from error
    if found.width != model.width:
        raise InputError(f"--teacher: {name}: its vectors have {found.width} numbers, the model's {model.width}")
    if teacher is None and found.fingerprint != learned["fingerprint"]:
        raise InputError(f"--teacher: {name}: not the weights that the model was distilled from; name their folder")
    return Asked(name, found.embed)


class Screen:
    """What is printed: with colour on a terminal, plain text elsewhere."""

    def __init__(self) -> None:
        self.width = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
        self.is_coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        encoding = (sys.stdout.encoding or "ascii").lower()
        self.cells = ("\u2500", "\u2588") if encoding.startswith("utf") else ("-", "#")

    def style(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.is_coloured else text

    def head(self, index: Index, path: str, asked: str) -> None:
        what = f"{index.num_documents:,} documents in {path}; queries by {asked}"
        print(self.style("2", textwrap.fill(what, self.width, break_long_words=False, break_on_hyphens=False)))

    def answer(self, query: str, vector: np.ndarray, hits: Sequence[Hit], asked: Asked, column: str) -> None:
        print("\n" + self.style("1;36", textwrap.fill(query, self.width)))
        texts = [document.text if (document := document_at(hit.file, column, hit.row)) else None for hit in hits]
        for number, (hit, text) in enumerate(zip(hits, texts, strict=True), start=1):
            print()
            self.hit(number, hit, len(text) if text else None)
            if text is None:
                print("      the document has changed or is gone; search again")
                continue
            found = sentences(text, *hit.span)
            scores = asked.embed(found) @ vector
            print(wrapped(passage(found, scores), self.width, " " * 6, lambda words: self.style("1", words)))

    def hit(self, number: int, hit: Hit, length: int | None) -> None:
        """Number, score and name; behind them, if there is room, where in the document the passage stands."""
        name = f"{number:>3}  {hit.score:.2f}  {name_of(hit)}"
        begin, end = hit.span
        place = f"{begin:,}-{end:,}"
        if length:
            place = f"{place}  {strip(begin, end, length, self.cells)} {100 * begin // length:>2} %"
        gap = self.width - len(name) - len(place)
        shown = self.style("1;32", name[:9]) + self.style("32", name[9:])
        print(shown + (" " * gap if gap >= 2 else "\n" + " " * 6) + self.style("2", place))


def name_of(hit: Hit) -> str:
    """The file as it is called from here, and the row's own id or its number, where the file has many."""
    file = os.path.relpath(hit.file)
    file = str(hit.file) if file.startswith("..") else file
    if hit.file.name.endswith(".txt"):
        return file
    own = hit.id.rpartition(":")[2] if hit.id.endswith(f"{hit.file.name}:{hit.row + 1}") else hit.id
    return f"{file}: {own}"
