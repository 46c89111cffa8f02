"""The rows of a task's data: Parquet, JSONL (plain, gzip, or in a zip), in a folder or from the hub.

Scripts that come with data sets are never run; zips are read as they lie.
"""

import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import InputError
from .task import Source, Task

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz")
Row = dict[str, Any]


class Place(NamedTuple):
    file: Path
    member: str = ""  # of a zip

    def __str__(self) -> str:
        return f"{self.file}!{self.member}" if self.member else str(self.file)


def read_split(task: Task, split: str, data: Path | None, limit: int | None = None) -> list[Row]:
    """The rows of a split, of the first ``limit`` of them only.

    Args:
        data: a folder that holds the task's ``source.local`` (or is that folder); None: the hub.

    Raises:
        InputError: one line: no such folder, file or split, or a file that is broken.
    """
    place = on_disk(task, split, data) if data is not None else on_hub(task.source, split, task.name)
    rows = read(place)
    if not rows:
        raise InputError(f"{place}: split {split!r} of {task.name} has no rows")
    return rows[:limit]


def on_disk(task: Task, split: str, data: Path) -> Place:
    """Where a split lies under ``data``, which is the root of all tasks' folders or the folder of this one."""
    if not data.is_dir():
        raise InputError(f"data={data}: no such folder")
    source = task.source
    local = Path(source.local)
    archive = [Place(folder / source.file, source.member.format(split=split)) for folder in (data / local, data)
               if source.member]  # fmt: skip
    if local.suffix:  # one file, which is the split that is reported
        wanted = [Place(data / local), Place(data / local.name)] if split in task.splits.report else []
    else:
        wanted = [Place(folder / f"{split}{suffix}") for folder in (data / local, data) for suffix in SUFFIXES]
    for place in wanted + archive:
        if place.file.is_file():
            return place
    base = data / local if (data / local).is_dir() else data
    found = ", ".join(sorted(path.name for path in base.iterdir())[:8])
    names = f"{data / local}" if local.suffix else f"{data / local}/{split}.parquet or .jsonl"
    raise InputError(
        f"data={data}: {task.name} has no split {split!r} there; expected {names}"
        + (f", or {source.file}" if source.member else "") + f" (found {found or 'nothing'})"
    )  # fmt: skip


def on_hub(source: Source, split: str, name: str) -> Place:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not source.hub:
        raise InputError(f"{name}: is not on the hub; give data=DIR")
    file = source.file.format(split=split)
    try:
        path = hf_hub_download(source.hub, file, repo_type="dataset", revision=source.revision)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        line = " ".join(str(error).split())[:160]
        remedy = f"give data=DIR with {source.local}"
        raise InputError(f"{name}: {source.hub}/{file} cannot be had ({line}); {remedy}") from error
    return Place(Path(path), source.member.format(split=split))


def read(place: Place) -> list[Row]:
    """
    Raises:
        InputError: the file is broken, or a zip lacks the member.
    """
    name = place.member or place.file.name
    try:
        if place.member:
            with zipfile.ZipFile(place.file) as archive:
                if place.member not in archive.namelist():
                    raise InputError(f"{place.file}: has no {place.member}, only {', '.join(archive.namelist()[:6])}")
                content = archive.read(place.member)
        else:
            content = place.file.read_bytes()
        if name.endswith(".gz"):
            content = gzip.decompress(content)
        if name.endswith(".parquet"):
            return pq.read_table(io.BytesIO(content)).to_pylist()
    except (OSError, EOFError, zipfile.BadZipFile, pa.ArrowException) as error:
        line = " ".join(str(error).split())[:120]
        raise InputError(f"{place}: broken, or not what its name says ({line}); fetch it again") from error
    rows = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: line {number} is not JSON ({error}); fetch it again") from error
        if row is not None:
            if not isinstance(row, dict):
                raise InputError(f"{place}: line {number}: expected an object, got {type(row).__name__}")
            rows.append(row)
    return rows
