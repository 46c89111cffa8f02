"""Concepts of documents on disk, to be searched: float16, mapped into memory, made again only for files that changed.

    FOLDER/index.json        the model, the files with their sizes, times and digests, the parts
    FOLDER/part-000000/      vectors.npy [n, d] float16 of norm 1, spans.npy [n, 2] int32; firsts.npy [D + 1] int64, the
                             rows of each document; files.npy [D] int32, rows.npy [D] int64 and ids.json, whose it is

A part is written once and renamed when it is complete; a document counts as long as its file's number is in the index.

n concepts of D documents, d width of a vector, q queries.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ..data.cache import UNUSABLE, locked
from ..errors import InputError
from ..files import write_json
from .documents import Document, Survey, survey, surveyed, windows
from .model import ConceptModel, Reading

FORMAT = 1
INDEX = "index.json"
TOKENS_PER_CONCEPT = 64  # of a passage; a document gets at most as many concepts as the model has
ROWS = 65536  # of vectors that are compared at one time


class Hit(NamedTuple):
    score: float  # cosine of the query and the document's best concept
    id: str
    file: Path
    row: int  # in its file
    span: tuple[int, int]  # the characters that the concept stands for


class Part(NamedTuple):
    """Documents that were written together."""

    vectors: np.ndarray  # mapped
    spans: np.ndarray
    firsts: np.ndarray
    files: np.ndarray
    rows: np.ndarray
    ids: list[str]


class Index:
    """See above. ``update`` before ``search``."""

    def __init__(self, folder: Path, model: ConceptModel, column: str = "text") -> None:
        """
        Raises:
            InputError: the folder is no index, was made by another model, or is damaged.
        """
        self.folder, self.model, self.column = folder, model, column
        self.made_by = {"model": str(model.folder.resolve()), "fingerprint": model.fingerprint}
        self.content: dict[str, Any] = {
            "format": FORMAT, **self.made_by, "text_column": column, "next": 0, "files": {}, "parts": []
        }  # fmt: skip
        if (folder / INDEX).is_file():
            self.content = self.opened()
        elif folder.exists() and any(path.suffix != ".lock" for path in folder.iterdir()):
            raise InputError(f"--index: {folder}: not empty and no index; name another folder")

    def opened(self) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            made_by, number, column = content["fingerprint"], content["format"], content["text_column"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"--index: {self.folder}: damaged ({error}); remove it") from error
        if made_by != self.made_by["fingerprint"]:
            raise InputError(
                f"--index: {self.folder}: made by another model, {content['model']}; search with that one, or name "
                "another folder"
            )
        if (number, column) != (FORMAT, self.column):
            raise InputError(f"--index: {self.folder}: of another format or text column; name another folder")
        return content

    def update(self, files: Sequence[Path]) -> list[Survey]:
        """Makes the index one of these files: those that are new or have changed are read, those that are gone go.

        Every window of documents that is embedded is noted, so that what was stopped goes on from there. Returns the
        surveys of what was read.

        Raises:
            InputError: no file has text that can be read, or the index cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder / ".lock"):
                return self._update(files)
        except OSError as error:
            if error.errno not in UNUSABLE:
                raise
            raise InputError(f"--index: {self.folder}: cannot be written ({error.strerror})") from error

    def _update(self, files: Sequence[Path]) -> list[Survey]:
        if (self.folder / INDEX).is_file():
            self.content = self.opened()  # another process may have gone on with it
        known = self.content["files"]
        names = {str(file.resolve()): file for file in files}
        has_fewer = any(name not in names for name in known)
        changed = [survey(file, self.column) for name, file in names.items() if not is_unchanged(known.get(name), file)]
        self.content["files"] = known = {name: entry for name, entry in known.items() if name in names}
        for each in changed:
            self.enter(each)
        if not self.num_documents:
            raise InputError(f"PATH: none of {len(files)} files has text that can be read")
        missing = [each for each in changed if self.entry(each.file)["done"] < each.documents]
        if missing:
            self.embed(missing)
        if has_fewer or changed:
            self.tidy()
            self.note()
        return changed

    def entry(self, file: Path) -> dict[str, Any]:
        return self.content["files"][str(file.resolve())]

    def enter(self, each: Survey) -> None:
        """A file with other documents than before gets a new number, and what was made of it counts no more."""
        files, name = self.content["files"], str(each.file.resolve())
        entry = files.get(name)
        if entry is None or entry["digest"] != each.digest:
            entry = {"number": self.content["next"], "done": 0}
            self.content["next"] += 1
        files[name] = entry | {
            "size": each.size, "mtime_ns": each.mtime_ns, "digest": each.digest, "documents": each.documents,
            "fault": each.fault,
        }  # fmt: skip

    def embed(self, files: Sequence[Survey]) -> None:
        stream = surveyed(files, self.column, lambda file: self.entry(file)["done"])
        total = sum(each.chars for each in files)
        with tqdm(
            total=total, unit="char", unit_scale=True, desc="index", dynamic_ncols=True, file=sys.stderr,
            leave=False, disable=None,
        ) as bar:  # fmt: skip
            for window in windows(stream):
                readings = list(self.model.read([each.text for each in window], TOKENS_PER_CONCEPT, bar.update))
                self.write(window, readings)
                for document in window:
                    self.entry(document.file)["done"] += 1
                self.note()

    def write(self, window: Sequence[Document], readings: Sequence[Reading]) -> None:
        self.write_part(Part(
            np.concatenate([reading.concepts for reading in readings]).astype(np.float16),
            np.concatenate([reading.spans for reading in readings]).astype(np.int32),
            np.cumsum([0, *(len(reading.concepts) for reading in readings)], dtype=np.int64),
            np.array([self.entry(document.file)["number"] for document in window], dtype=np.int32),
            np.array([document.row for document in window], dtype=np.int64),
            [document.id for document in window],
        ))  # fmt: skip

    def write_part(self, part: Part) -> None:
        number = 1 + max((int(name.removeprefix("part-")) for name in self.content["parts"]), default=-1)
        name = f"part-{number:06d}"
        unfinished = self.folder / f".{name}"
        for path in (unfinished, self.folder / name):  # the second: written, but never noted
            shutil.rmtree(path, ignore_errors=True)
        unfinished.mkdir()
        for field in ("vectors", "spans", "firsts", "files", "rows"):
            np.save(unfinished / f"{field}.npy", getattr(part, field))
        write_json(unfinished / "ids.json", part.ids)
        unfinished.rename(self.folder / name)
        self.content["parts"].append(name)

    def note(self) -> None:
        write_json(self.folder / INDEX, self.content)

    def tidy(self) -> None:
        """Writes parts again without documents that count no more, where these are most of a part."""
        stale = []
        for name in list(self.content["parts"]):
            part = self.part(name)
            lives = self.lives(part)
            if 2 * lives.sum() >= len(lives):
                continue
            stale.append(name)
            if lives.any():
                self.write_part(select(part, lives))
        if stale:
            self.content["parts"] = [name for name in self.content["parts"] if name not in stale]
            self.note()
            for name in stale:
                shutil.rmtree(self.folder / name)

    def part(self, name: str) -> Part:
        folder = self.folder / name
        try:
            arrays = [np.load(folder / f"{field}.npy", mmap_mode="r") for field in Part._fields[:-1]]
            return Part(*arrays, json.loads((folder / "ids.json").read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise InputError(f"--index: {folder}: damaged ({error}); remove {self.folder}") from error

    def lives(self, part: Part) -> np.ndarray:
        """[D] bool: the documents that count."""
        return np.isin(part.files, [entry["number"] for entry in self.content["files"].values()])

    @property
    def num_documents(self) -> int:
        return sum(entry["documents"] for entry in self.content["files"].values())

    def search(self, queries: np.ndarray, top: int) -> list[list[Hit]]:
        """The ``top`` best documents for each query [q, d] of norm 1, by their best concept, best first."""
        places = {entry["number"]: Path(name) for name, entry in self.content["files"].items()}
        found: list[list[Hit]] = [[] for _ in queries]
        for name in self.content["parts"]:
            part = self.part(name)
            lives = self.lives(part)
            scores = compare(queries, part.vectors)
            best = np.maximum.reduceat(scores, part.firsts[:-1], axis=1)
            best[:, ~lives] = -np.inf
            for hits, row, of_document in zip(found, scores, best, strict=True):
                for i in np.argsort(-of_document, kind="stable")[:top]:
                    if lives[i]:
                        first, end = part.firsts[i : i + 2]
                        where = first + int(row[first:end].argmax())
                        begin, stop = (int(edge) for edge in part.spans[where])
                        file = places[int(part.files[i])]
                        hits.append(Hit(float(of_document[i]), part.ids[i], file, int(part.rows[i]), (begin, stop)))
        return [sorted(hits, key=lambda hit: -hit.score)[:top] for hits in found]


def is_unchanged(entry: dict[str, Any] | None, file: Path) -> bool:
    """Whether a file is the one that was read to its end, by its size and time."""
    if entry is None or entry["fault"] or entry["done"] < entry["documents"]:
        return False
    stat = file.stat()
    return (stat.st_size, stat.st_mtime_ns) == (entry["size"], entry["mtime_ns"])


def compare(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """[q, d] with [n, d] float16 -> [q, n] float32."""
    scores = np.empty((len(queries), len(vectors)), dtype=np.float32)
    for begin in range(0, len(vectors), ROWS):
        scores[:, begin : begin + ROWS] = queries @ vectors[begin : begin + ROWS].astype(np.float32).T
    return scores


def select(part: Part, keep: np.ndarray) -> Part:
    """The documents where ``keep`` [D] is true."""
    sizes = np.diff(part.firsts)
    rows = np.repeat(keep, sizes)
    ids = [name for name, kept in zip(part.ids, keep, strict=True) if kept]
    firsts = np.cumsum([0, *sizes[keep]], dtype=np.int64)
    return Part(part.vectors[rows], part.spans[rows], firsts, part.files[keep], part.rows[keep], ids)
