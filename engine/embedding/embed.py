"""`conceptron embed`: files of text -> one parquet file of vectors.

Documents are read, embedded and written window by window. Each window is a part of its own, renamed when it is
complete, so that a command that was stopped goes on where it stopped, and several ranks divide the windows without a
word to each other: window k is of rank k modulo their number. Who writes the last part joins them.
"""

import argparse
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from .. import compat
from ..data.cache import UNUSABLE, fingerprint, locked
from ..errors import InputError
from ..files import write_json
from ..launching.place import MOST, number
from .documents import Document, Survey, files_of, report_faults, survey, surveyed, windows
from .model import ConceptModel

MANIFEST = "manifest.json"
SOME_LEFT_OUT = 1  # exit code where files could not be read


def main(options: argparse.Namespace) -> int:
    """``options``: files, model, out, concepts, text_column.

    Returns 0; 1 where some files could not be read and the others are embedded; 130 after Ctrl-C.
    """
    out: Path = options.out
    if out.suffix != ".parquet":
        raise InputError(f"--out: expected a file that ends in .parquet, got {options.out}")
    if out.exists():
        if rank_and_size()[0] > 0:
            return 0  # the others have joined the parts before this rank, which has none, came to look
        raise InputError(f"--out: {out}: is there already; remove it, or name another file")
    try:
        return embed(options.files, options.model, out, options.concepts, options.text_column)
    except KeyboardInterrupt:
        print(f"\nconceptron: stopped; the same command goes on from {parts_of(out)}", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (*UNUSABLE, errno.ENOENT):
            raise
        problem = f"cannot be written ({error.strerror or error}); make room, and the same command goes on"
        raise InputError(f"--out: {out}: {problem}") from error


def embed(paths: Sequence[str], place: str, out: Path, with_concepts: bool = False, column: str = "text") -> int:
    """Writes ``out``; see ``main``.

    Raises:
        InputError: no file or model can be used, or parts of another command lie beside ``out``.
    """
    rank, size = rank_and_size()
    files = [survey(file, column) for file in files_of(paths)]
    num_left_out = report_faults(files if rank == 0 else [], len(files))
    if not any(each.documents for each in files):
        raise InputError(f"FILES: none of {len(files)} files has text that can be read")
    model = ConceptModel.from_pretrained(place, own_device())
    about = {
        "model": str(model.folder.resolve()), "fingerprint": model.fingerprint, "width": model.width,
        "concepts": model.config.num_concepts if with_concepts else 0,
    }  # fmt: skip
    parts = claim(out, about | {"text": fingerprint([each.digest for each in files])})
    num_windows = write_parts(model, files, column, parts, with_concepts, rank, size, schema(about))
    join(parts, num_windows, out, schema(about))
    if rank == 0:
        where = f"written to {out}" if out.exists() else f"what is missing in {parts} is another rank's"
        documents = sum(each.documents for each in files)
        print(f"{documents} documents, vectors of {model.width} numbers; {where}")
    return SOME_LEFT_OUT if num_left_out else 0


def write_parts(
    model: ConceptModel, files: Sequence[Survey], column: str, parts: Path, with_concepts: bool, rank: int, size: int,
    columns: pa.Schema,
) -> int:  # fmt: skip
    """Embeds this rank's windows that are not there yet; returns the number of all."""
    total, number = sum(each.chars for each in files), 0
    with tqdm(
        total=total, unit="char", unit_scale=True, desc="embed", disable=rank > 0, dynamic_ncols=True, file=sys.stderr
    ) as bar:
        for number, window in enumerate(windows(surveyed(files, column)), start=1):
            part = parts / f"{number - 1:08d}.parquet"
            if (number - 1) % size == rank and not part.exists():
                write_part(model, window, part, with_concepts, columns, bar.update)
            else:
                bar.update(sum(len(document.text) for document in window))
    return number


def write_part(
    model: ConceptModel, window: Sequence[Document], part: Path, with_concepts: bool, columns: pa.Schema,
    progress: Callable[[int], object],
) -> None:  # fmt: skip
    readings = list(model.read([document.text for document in window], None, progress))
    rows: dict[str, Any] = {
        "id": [document.id for document in window], "vector": [reading.vector for reading in readings]
    }  # fmt: skip
    if with_concepts:
        rows["concepts"] = [list(reading.concepts) for reading in readings]
        rows["spans"] = [list(reading.spans.astype("int32")) for reading in readings]
    unfinished = part.with_name(f".{part.name}")
    pq.write_table(pa.table(rows, schema=columns), unfinished)
    unfinished.replace(part)


def schema(about: dict[str, Any]) -> pa.Schema:
    """Columns of the file; what made it stands in its metadata under "conceptron"."""
    vector = pa.list_(pa.float32(), about["width"])
    fields = [("id", pa.string()), ("vector", vector)]
    if about["concepts"]:
        fields += [("concepts", pa.list_(vector)), ("spans", pa.list_(pa.list_(pa.int32(), 2)))]
    return pa.schema(fields, metadata={"conceptron": json.dumps(about, allow_nan=False)})


def parts_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


def claim(out: Path, manifest: dict[str, Any]) -> Path:
    """The folder of the parts, which belong to this command.

    Raises:
        InputError: they were made of other text, by another model or with other columns.
    """
    parts = parts_of(out)
    parts.mkdir(parents=True, exist_ok=True)
    file = parts / MANIFEST
    with locked(parts.with_name(f".{parts.name}.lock")):
        if not file.exists():
            write_json(file, manifest)
        found = json.loads(file.read_text())
    different = [name for name, value in manifest.items() if found.get(name) != value]
    if different:
        raise InputError(
            f"{parts}: begun with another {' and '.join(different)}; go on with the same command, or remove the folder"
        )
    return parts


def join(parts: Path, num_windows: int, out: Path, columns: pa.Schema) -> None:
    """Joins the parts to one file, in the order of the documents, if all are there; they go when it is complete."""
    with locked(parts.with_name(f".{parts.name}.lock")):
        files = [parts / f"{number:08d}.parquet" for number in range(num_windows)]
        if out.exists() or not all(file.exists() for file in files):
            return
        unfinished = out.with_name(f".{out.name}")
        with pq.ParquetWriter(unfinished, columns) as writer:
            for file in files:
                writer.write_table(pq.read_table(file, schema=columns))
        unfinished.replace(out)
        shutil.rmtree(parts)
    parts.with_name(f".{parts.name}.lock").unlink(missing_ok=True)


def rank_and_size() -> tuple[int, int]:
    """This process among those that torchrun started; alone without it."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", **os.environ}
    size = number(variables, "WORLD_SIZE", 1, MOST)
    return number(variables, "RANK", 0, size - 1), size


def own_device() -> torch.device | None:
    if not compat.uses_cuda():
        return None
    return torch.device("cuda", number({"LOCAL_RANK": "0", **os.environ}, "LOCAL_RANK", 0, MOST))
