"""Tokenised documents on disk: one file of token ids, mapped into memory, and where each document starts in it.

While it is written, ``progress.jsonl`` beside it says how far it has come, so that whoever goes on after a process that
was killed reads only the rest.
"""

import contextlib
import json
import os
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .cache import bar, built, say
from .encoders import encoded
from .sources import Documents
from .tokenizer import Vocabulary

FORMAT = 1
PROGRESS = "progress.jsonl"
MARK_S = 2.0  # between two lines of it: what a killed process loses
SAY_S = 60.0  # between two lines on the screen, where that is no terminal


@dataclass(frozen=True)
class Store:
    tokens: np.ndarray  # [T] uint16 or uint32, memory-mapped, read-only
    offsets: np.ndarray  # [D+1] int64: document i is tokens[offsets[i] : offsets[i + 1]]
    hashes: np.ndarray  # [D] uint64, of each document's text
    index: dict[str, Any]  # num_documents, num_tokens, num_bytes (UTF-8), ...


def open_store(folder: Path, documents: Documents, vocabulary: Vocabulary, num_processes: int | None = None) -> Store:
    """Opens the store in ``folder``, and tokenises ``documents`` into it first if it is not there.

    Documents without a token are left out.

    Args:
        num_processes: that tokenise; None: one for each core. The store is the same.

    Raises:
        InputError: no document is left.
    """
    index = built(folder, lambda unfinished: write(unfinished, documents, vocabulary, num_processes), goes_on=True)
    return opened(folder, index)


def opened(folder: Path, index: dict[str, Any]) -> Store:
    return Store(
        tokens=np.memmap(folder / "tokens.bin", dtype=index["dtype"], mode="r"),
        offsets=np.load(folder / "offsets.npy"),
        hashes=np.load(folder / "hashes.npy"),
        index=index,
    )


def write(
    folder: Path, documents: Documents, vocabulary: Vocabulary, num_processes: int | None = None
) -> dict[str, Any]:
    with Writer(folder, type_of(vocabulary)) as writer:
        begun = writer.done["documents"]
        say(f"turning {documents.name} into tokens" + (f", from document {begun + 1:,} on" if begun else ""))
        texts = islice(documents.read(), begun, None)
        with bar(" documents", documents.count(), begun) as shown:
            spoken = time.monotonic()
            for count, batch in encoded(texts, vocabulary.plain, writer.dtype.name, num_processes):
                writer.add(count, batch)
                shown.update(count)
                if shown.disable and time.monotonic() >= spoken + SAY_S:
                    spoken = time.monotonic()
                    say(f"{documents.name}: {writer.done['documents']:,} documents, {writer.done['tokens']:,} tokens")
        if not writer.done["kept"]:
            raise InputError(f"data.source: {documents.name}: no text in it; give a source with at least one document")
        return writer.finish() | {"unreadable": documents.lost}


def type_of(vocabulary: Vocabulary) -> np.dtype:
    """Of stored token ids."""
    return np.dtype(np.uint16 if vocabulary.tokens.vocab_size <= 1 << 16 else np.uint32)


class Writer:
    """Appends batches of tokens to a folder, and finds where another left off there."""

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        sizes = {"tokens": dtype.itemsize, "lengths": 8, "hashes": 8}  # file -> bytes an entry
        self.done = {"documents": 0, "kept": 0, "tokens": 0, "bytes": 0}
        for line in self._marks():
            entries = {"tokens": line["tokens"], "lengths": line["kept"], "hashes": line["kept"]}
            if all(size_of(folder / f"{name}.bin") >= entries[name] * sizes[name] for name in sizes):
                self.done = line
                break
        entries = {"tokens": self.done["tokens"], "lengths": self.done["kept"], "hashes": self.done["kept"]}
        self._stack = contextlib.ExitStack()
        opened = self._stack.enter_context
        self._files = {name: opened((folder / f"{name}.bin").open("ab")) for name in sizes}
        for name, file in self._files.items():
            file.truncate(entries[name] * sizes[name])
        self._progress = opened((folder / PROGRESS).open("w"))
        self._progress.write(json.dumps(self.done, allow_nan=False) + "\n")
        self._marked = time.monotonic()

    def _marks(self) -> list[dict[str, int]]:
        """The lines of the file of progress, the last one first; one that was cut is none."""
        path = self.folder / PROGRESS
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in reversed(lines)]

    def add(self, count: int, batch: Any) -> None:
        """``count``: documents read, with those of which nothing is left."""
        done, kept = self.done, len(batch.lengths)
        self._files["tokens"].write(batch.ids)
        self._files["lengths"].write(np.array(batch.lengths, dtype=np.int64).tobytes())
        self._files["hashes"].write(np.array(batch.hashes, dtype=np.uint64).tobytes())
        self.done = {
            "documents": done["documents"] + count, "kept": done["kept"] + kept,
            "tokens": done["tokens"] + len(batch.ids) // self.dtype.itemsize, "bytes": done["bytes"] + batch.num_bytes,
        }  # fmt: skip
        if time.monotonic() >= self._marked + MARK_S:
            self.mark()

    def mark(self) -> None:
        """What is written so far stays, whatever happens."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._progress.write(json.dumps(self.done, allow_nan=False) + "\n")
        self._progress.flush()
        self._marked = time.monotonic()

    def finish(self) -> dict[str, Any]:
        self.close()
        done, folder = self.done, self.folder
        lengths = np.fromfile(folder / "lengths.bin", dtype=np.int64)
        np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        np.save(folder / "hashes.npy", np.fromfile(folder / "hashes.bin", dtype=np.uint64))
        for name in ("lengths.bin", "hashes.bin", PROGRESS):
            (folder / name).unlink()
        return {
            "format": FORMAT, "dtype": self.dtype.name, "num_documents": done["kept"], "num_tokens": done["tokens"],
            "num_bytes": done["bytes"],
        }  # fmt: skip

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._progress.closed and self.folder.exists():
            self.mark()
        self.close()


def size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else -1
