"""Documents to be embedded: where they come from, what each is called, and which files cannot be read."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ..data import sources
from ..errors import InputError

WINDOW_DOCUMENTS = 256  # of texts that are sorted by length together, and written together
WINDOW_CHARS = 1 << 20


class Document(NamedTuple):
    id: str  # the row's own `id`; else the file's path, and behind a colon the row, where a file has many
    text: str
    file: Path
    row: int  # in its file, from 0, rows without text counted


class Survey(NamedTuple):
    """A file that was read once from front to back."""

    file: Path
    size: int
    mtime_ns: int
    digest: str  # of its documents
    documents: int  # with text, before the fault if there is one
    chars: int
    fault: str | None  # one line


def files_of(paths: Sequence[str]) -> list[Path]:
    """The files that paths, folders and globs mean, each once, in the order given.

    Raises:
        InputError: one means none, or a file of an unknown kind.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        try:
            files = sources.find(path)
        except InputError as error:
            raise InputError(str(error).removeprefix("data.source: ")) from error
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def documents_of(file: Path, column: str, start: int = 0) -> Iterator[Document]:
    """The documents of a file that have text, without the first ``start`` of them.

    Raises:
        InputError: the file, or the next row of it, cannot be read.
    """
    is_one = file.name.endswith(".txt")
    try:
        rows = ((row, *entry) for row, entry in enumerate(sources.read_rows(file, column)) if entry[0].strip())
        for row, text, own in islice(rows, start, None):
            name = str(file) if is_one else f"{file}:{row + 1}"
            yield Document(name if own is None else str(own), text, file, row)
    except InputError as error:
        line = str(error).replace("set data.text_column=", "give --text-column ")
        raise InputError(line.replace("data.text_column", "--text-column")) from error


def document_at(file: Path, column: str, row: int) -> Document | None:
    """The document in a row, None where it is not there any more."""
    try:
        return next((each for each in documents_of(file, column) if each.row == row), None)
    except InputError:
        return None


def survey(file: Path, column: str) -> Survey:
    """Reads a file that is going to be embedded: reading is cheap beside that, and faults are known before."""
    digest, count, chars, fault, size, mtime_ns = hashlib.blake2b(digest_size=16), 0, 0, None, 0, 0
    try:
        stat = file.stat()
        size, mtime_ns = stat.st_size, stat.st_mtime_ns
        for document in documents_of(file, column):
            digest.update(f"{document.id}\0{document.text}\0".encode(errors="surrogatepass"))
            count, chars = count + 1, chars + len(document.text)
    except InputError as error:
        fault = str(error)
    except OSError as error:
        fault = f"{file}: cannot be read ({error.strerror or error})"
    return Survey(file, size, mtime_ns, digest.hexdigest(), count, chars, fault)


def surveyed(files: Iterable[Survey], column: str, skipped: Callable[[Path], int] = lambda _: 0) -> Iterator[Document]:
    """The documents that a survey has counted, without the first ``skipped`` of a file.

    Raises:
        InputError: a file has changed in between.
    """
    for each in files:
        start, count = skipped(each.file), 0
        for document in islice(documents_of(each.file, column, start), each.documents - start):
            count += 1
            yield document
        if start + count != each.documents:
            raise InputError(f"{each.file}: changed while it was read; start again")


def windows(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in order, as many at a time as ``WINDOW_DOCUMENTS`` and ``WINDOW_CHARS`` allow; one of any length."""
    window: list[Document] = []
    chars = 0
    for document in documents:
        if window and (len(window) == WINDOW_DOCUMENTS or chars + len(document.text) > WINDOW_CHARS):
            yield window
            window, chars = [], 0
        window.append(document)
        chars += len(document.text)
    if window:
        yield window


def report_faults(files: Sequence[Survey], num_files: int) -> int:
    """Names the files that cannot be read, or not to their end, on standard error; returns their number."""
    faulty = [each for each in files if each.fault]
    for each in faulty:
        kept = "; what stands before it is kept" if each.documents else ""
        print(f"conceptron: left out: {each.fault}{kept}", file=sys.stderr)
    if faulty:
        print(f"conceptron: {len(faulty)} of {num_files} files could not be read", file=sys.stderr)
    return len(faulty)
