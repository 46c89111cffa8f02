"""What a teacher says of windows of text, computed once and kept on disk, mapped into memory.

    CACHE/teacher-FINGERPRINT/vectors.bin   [n, 1 + S, e] float16: of each window the whole, then its stretches; sparse
                             /done.bin      [n] uint8: 1 where a row is written

The fingerprint is that of the text, its tokenizer, the teacher and the cut, so a store is never out of date. Only rows
that a run will read are computed; those that are there already, of another run or of one that was stopped, are not
computed again.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...models.objectives.distill import Distill, Lesson, stretch_bounds
from ...models.packing import Packed
from ..errors import InputError
from .cache import UNUSABLE, fingerprint, locked, say
from .teacher import Teacher
from .windows import Windows

FORMAT = 1
ROWS = 1024  # of windows between two marks of what is done
SAY_S = 30.0


class Lessons:
    """The vectors of one set of windows."""

    def __init__(self, folder: Path, num_windows: int, num_stretches: int, width: int) -> None:
        self.folder, self.shape = folder, (num_windows, 1 + num_stretches, width)

    def open(self, mode: str = "r") -> tuple[np.ndarray, np.ndarray]:
        vectors = np.memmap(self.folder / "vectors.bin", np.float16, mode, shape=self.shape)
        return vectors, np.memmap(self.folder / "done.bin", np.uint8, mode, shape=self.shape[:1])

    def missing(self, rows: np.ndarray) -> np.ndarray:
        rows = np.unique(rows)
        if not (self.folder / "done.bin").is_file():
            return rows
        _, done = self.open()
        return rows[done[rows] == 0]

    def lesson(self, rows: np.ndarray, texts: Packed | None) -> Lesson:
        """Of the windows ``rows``, in their order.

        Raises:
            RuntimeError: a row was never computed.
        """
        vectors, done = self.open()
        if not done[rows].all():
            raise RuntimeError(f"{self.folder}: holds no vector of window {rows[done[rows] == 0][0]}")
        found = torch.from_numpy(vectors[rows])
        return Lesson(found[:, 0], found[:, 1:], texts)


def key(windows: Windows, tokenizer: str, teacher: str, options: Distill) -> str:
    """The fingerprint of a store."""
    cut = [options.num_stretches, options.shortest] if options.num_stretches else [0]
    return fingerprint([FORMAT, windows.fingerprint, tokenizer, teacher, *cut])


def learn(
    windows: Windows, rows: np.ndarray, teacher: Teacher, tokenizer: Any, tokenizer_id: str, options: Distill,
    cache: Path,
) -> Lessons:  # fmt: skip
    """The store of these windows, in which all of ``rows`` are computed.

    Raises:
        InputError: it would be larger than ``options.max_gib``, or cannot be written.
    """
    folder = cache / f"teacher-{key(windows, tokenizer_id, teacher.fingerprint, options)}"
    lessons = Lessons(folder, len(windows), options.num_stretches, teacher.width)
    missing = lessons.missing(rows)
    if not len(missing):
        return lessons
    size = len(missing) * lessons.shape[1] * lessons.shape[2] * 2
    what = f"{len(missing):,} texts x {lessons.shape[1]} vectors x {lessons.shape[2]} x 2 bytes"
    if size > options.max_gib * 2**30:
        raise InputError(
            f"distill.max_gib: the teacher's vectors need {size / 2**30:.1f} GiB ({what}), more than "
            f"{options.max_gib:g}; raise it, or lower train.steps, distill.stretches or batch.tokens"
        )
    say(f"vectors of {teacher.name}: {size / 2**20:,.0f} MiB ({what}) into {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            fill(lessons, windows, lessons.missing(rows), teacher, tokenizer, options)
    except OSError as error:
        if error.errno not in UNUSABLE:
            raise
        raise InputError(
            f"{error.filename or folder}: cannot write the teacher's vectors ({error.strerror}); "
            "make room there or set data.cache to another folder"
        ) from error
    return lessons


def fill(
    lessons: Lessons, windows: Windows, missing: np.ndarray, teacher: Teacher, tokenizer: Any, options: Distill
) -> None:
    is_new = not (lessons.folder / "done.bin").is_file()
    vectors, done = lessons.open("w+" if is_new else "r+")
    start = last = time.monotonic()
    for begin in range(0, len(missing), ROWS):
        rows = missing[begin : begin + ROWS]
        vectors[rows] = vectors_of([windows[int(row)] for row in rows], teacher, tokenizer, options)
        vectors.flush()
        done[rows] = 1  # only now: a run that is stopped before computes these again
        done.flush()
        now, ready = time.monotonic(), begin + len(rows)
        if now - last > SAY_S and ready < len(missing):
            left = (now - start) * (len(missing) - ready) / ready
            say(f"vectors of {teacher.name}: {ready:,} of {len(missing):,} texts, about {left / 60:.1f} min to go")
            last = now


def vectors_of(texts: Sequence[np.ndarray], teacher: Teacher, tokenizer: Any, options: Distill) -> np.ndarray:
    """[n, 1 + S, e] float32 of the windows' token ids; 0 for stretches shorter than ``options.shortest`` tokens."""
    S, pieces, places = options.num_stretches, [], []
    for number, ids in enumerate(texts):
        pieces.append(ids)
        places.append((number, 0))
        for s, (begin, end) in enumerate(stretch_bounds(len(ids), S) if S else []):
            if end - begin >= options.shortest:
                pieces.append(ids[begin:end])
                places.append((number, 1 + s))
    words = tokenizer.batch_decode([piece.tolist() for piece in pieces], skip_special_tokens=True)
    found = np.zeros((len(texts), 1 + S, teacher.width), dtype=np.float32)
    found[tuple(np.array(places).T)] = teacher.embed(words)
    return found
