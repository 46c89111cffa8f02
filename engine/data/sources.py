"""Where documents come from: text, jsonl and parquet files, folders and globs of them, and data sets on the hub."""

import glob
import gzip
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import InputError, Interrupted
from ..recipe.data import DEFAULT_VALIDATION, Source
from .cache import say

KNOWN = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.+-]+)?")
TRAIN_NAMES = ("train",)
SHOWN = 12  # names of columns in one line
VALIDATION_NAMES = ("validation", "valid", "val", "dev")


@dataclass(frozen=True)
class Documents:
    """Texts that can be read more than once."""

    name: str  # as the user wrote it
    identity: Any  # JSON; changes when the texts may have changed
    read: Callable[[], Iterator[str]]
    count: Callable[[], int | None] = lambda: None  # about how many, where that is quickly told
    stream: "Stream | None" = None  # the same, read piece by piece
    lost: list[str] = field(default_factory=list)  # files of which the rest could not be read, after they were

    def first(self, count: int | None) -> "Documents":
        """The first ``count`` of them; None: all."""
        if count is None:
            return self
        def fewer() -> int | None:
            known = self.count()
            return None if known is None else min(known, count)

        return Documents(self.name, [self.identity, count], lambda: islice(self.read(), count), fewer, lost=self.lost)


@dataclass(frozen=True)
class Stream:
    """Texts that are read from any place on, by `datasets`."""

    column: str
    open: Callable[[], Any]  # a datasets.IterableDataset
    where: str  # for errors
    is_remote: bool

    def start(self, seed: int, epoch: int) -> Any:
        """The rows from the beginning on: shards in an order of this epoch, several of them in turns.

        With a buffer of one row the state of the data set says exactly where it is; with more it would not.
        """
        try:
            dataset = self.open()
            names = dataset.column_names or list(next(iter(dataset), {}))
        except Exception as error:  # as in `read_hub`
            problem = f"cannot be streamed ({type(error).__name__}: {one_line(error)})"
            raise InputError(f"{self.where}: {problem}; correct data.source, go online or use local files") from error
        if self.column not in names:
            raise InputError(no_column(self.where, self.column, dict.fromkeys(names, True)))
        # it warns of what a larger buffer would lose
        logging.getLogger("datasets.iterable_dataset").setLevel(logging.ERROR)
        dataset = dataset.select_columns(self.column).shuffle(seed=seed, buffer_size=1)
        dataset.set_epoch(epoch)
        return dataset

    def texts(self, dataset: Any) -> Iterator[str]:
        number = 0
        try:
            for number, row in enumerate(dataset, start=1):
                text = check_text(f"{self.where}, row {number} from there on", row[self.column], self.column)
                if text.strip():
                    yield text
        except InputError:
            raise
        except Exception as error:  # as above: a shard that cannot be fetched or read
            problem = f"cannot be read on ({type(error).__name__}: {one_line(error)})"
            kind = Interrupted if self.is_remote else InputError
            raise kind(f"{self.where}: {problem}; correct it, or start again with resume=auto") from error


@dataclass(frozen=True)
class Split:
    train: Documents
    validation: Documents | float  # a number: this fraction of `train` is held out, chosen by a hash of the text


def open_source(source: Source) -> Split:
    """Finds the documents of a source other than `pydocs`, without reading them.

    Raises:
        InputError: there is no such file and it cannot be a hub id, or a folder holds nothing that can be read.
    """
    if is_local(source.path):
        return open_local(source)
    if HUB_ID.fullmatch(source.path):
        return open_hub(source)
    raise InputError(
        f"data.source: {source.path}: no such file or folder; give a path or a glob of {', '.join(KNOWN)} files, "
        "a folder of them, a hub id org/name[:config], or pydocs"
    )


# --- files


def is_local(path: str) -> bool:
    looks_local = path.startswith(("/", "./", "../", "~")) or path.endswith(KNOWN) or glob.has_magic(path)
    return looks_local or len(path) > 255 or Path(path).exists() or Path(path).is_symlink()


def open_local(source: Source) -> Split:
    files = find(source.path)
    validation: Documents | float = DEFAULT_VALIDATION
    if isinstance(source.validation, str):
        held_out = find(source.validation)
        both = sorted({file.resolve() for file in files} & {file.resolve() for file in held_out})
        if both and {file.resolve() for file in files} <= set(both):
            raise InputError(f"data.validation: {both[0]} would be both trained on and held out; name other files")
        files = [file for file in files if file.resolve() not in both]
        validation = read_later(source.validation, held_out, source)
    elif isinstance(source.validation, float):
        validation = source.validation
    elif Path(source.path).expanduser().is_dir():
        train = [file for file in files if file.name.startswith(TRAIN_NAMES)]
        held_out = [file for file in files if file.name.startswith(VALIDATION_NAMES)]
        if train:
            files = train
            validation = read_later(source.path, held_out, source) if held_out else DEFAULT_VALIDATION
    return Split(read_later(source.path, files, source), validation)


def find(path: str) -> list[Path]:
    """The files that a path, a folder or a glob means, sorted.

    Raises:
        InputError: there are none, or one has an unknown ending.
    """
    try:
        place = Path(path).expanduser()
        is_folder = place.is_dir()
    except (RuntimeError, OSError) as error:  # a home that nobody has, a name that no file can have
        raise InputError(f"data.source: {path[:200]}: not a path ({str(error)[:40]}); correct it") from error
    if is_folder:
        files = sorted(file for file in place.rglob("*") if file.name.endswith(KNOWN) and not file.is_dir())
        if lost := [file for file in files if not file.exists()]:
            raise InputError(f"{lost[0]}: a link to {os.readlink(lost[0])}, which is not there; mend or remove it")
        if not files:
            raise InputError(f"data.source: {path}: no {', '.join(KNOWN)} file in this folder")
        return files
    if place.is_symlink() and not place.exists():
        raise InputError(f"data.source: {path}: a link to {os.readlink(place)}, which is not there; mend the link")
    if place.exists():
        files = [place]
    else:
        files = sorted(Path(name) for name in glob.glob(str(place), recursive=True) if Path(name).is_file())
    if not files:
        what = "no file matches" if glob.has_magic(path) else "no such file or folder"
        raise InputError(f"data.source: {path}: {what} (looked in {Path.cwd()}); correct the path")
    for file in files:
        if not file.name.endswith(KNOWN):
            raise InputError(f"{file}: unknown kind of file {file.suffix!r}; convert it to one of {', '.join(KNOWN)}")
    return files


def read_later(name: str, files: list[Path], source: Source) -> Documents:
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    column, lost = source.text_column or "text", []
    identity: dict[str, Any] = {"files": stats, "text_column": column}
    read = partial(read_files, files, column)
    if source.on_unreadable == "skip":
        identity["on_unreadable"] = "skip"
        read = partial(read_what_can_be, files, column, lost)
    stream = Stream(column, lambda: open_stream(files), f"data.source: {name}", is_remote=False)
    return Documents(name, identity, read, lambda: num_rows(files), stream, lost).first(source.max_documents)


def open_stream(files: list[Path]) -> Any:
    import datasets

    endings = {".txt": "text", ".jsonl": "json", ".jsonl.gz": "json", ".parquet": "parquet"}
    kinds = {kind for ending, kind in endings.items() if any(file.name.endswith(ending) for file in files)}
    if len(kinds) > 1:
        raise ValueError(f"files of {len(kinds)} kinds, {' and '.join(sorted(kinds))}, where one is expected")
    whole = {"sample_by": "document"} if kinds == {"text"} else {}
    names = [str(file) for file in files]
    return datasets.load_dataset(*kinds, data_files=names, split="train", streaming=True, **whole)


def num_rows(files: list[Path]) -> int | None:
    """Of text and parquet files; None: of others one would have to read all, or one cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not all(file.name.endswith((".txt", ".parquet")) for file in files):
        return None
    try:
        return sum(pq.read_metadata(file).num_rows if file.suffix == ".parquet" else 1 for file in files)
    except (pa.ArrowException, OSError):  # which reading it will explain
        return None


def read_files(files: Iterable[Path], column: str) -> Iterator[str]:
    for file in files:
        count = 0
        for text in read_file(file, column):
            if text.strip():
                count += 1
                yield text
        if not count:
            raise InputError(f"{file}: no text in this file; remove it or leave it out of data.source")


def read_what_can_be(files: Iterable[Path], column: str, lost: list[str]) -> Iterator[str]:
    """The same, but a file that cannot be read ends there: it is named, and listed in ``lost``."""
    lost.clear()
    for file in files:
        try:
            yield from read_files([file], column)
        except InputError as error:
            lost.append(str(file))
            say(f"warning: {error}; skipped from there on (data.on_unreadable)")


def read_file(file: Path, column: str) -> Iterator[str]:
    return (text for text, _ in read_rows(file, column))


def read_rows(file: Path, column: str) -> Iterator[tuple[str, Any]]:
    """The text of every row, and what it has in its column "id"; None, where there is none.

    Raises:
        InputError: the file, or this row of it, cannot be read.
    """
    try:
        if file.name.endswith(".txt"):
            yield read_text(file), None
        elif file.name.endswith(".parquet"):
            yield from read_parquet(file, column)
        else:
            yield from read_jsonl(file, column)
    except OSError as error:  # a damaged .gz file raises one, too
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from error


def read_text(file: Path) -> str:
    """A UTF-8 text file, with or without a byte order mark.

    Raises:
        InputError: it is missing, not UTF-8, or not text.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file; correct the path")
    raw = file.read_bytes()
    if 0 in raw:
        line = raw.count(b"\n", 0, raw.index(0)) + 1
        raise InputError(f"{file}:{line}: a NUL byte, which no text holds; convert the file to UTF-8")
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{file}:{line}: byte {raw[error.start]:#04x} at offset {error.start} is not UTF-8; "
            "convert the file, for example with iconv -f latin1 -t utf-8"
        ) from error


def read_jsonl(file: Path, column: str) -> Iterator[tuple[str, Any]]:
    with gzip.open(file) if file.name.endswith(".gz") else file.open("rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield parse_line(f"{file}:{number}", line, column)
        except (EOFError, zlib.error) as error:
            raise InputError(f"{file}: damaged gzip file ({error}); copy or download it again") from error


def parse_line(where: str, line: bytes, column: str) -> tuple[str, Any]:
    try:
        text = line.decode("utf-8-sig")
        row = json.loads(text)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte {line[error.start]:#04x} at offset {error.start} of the line is not UTF-8; convert the file"
        ) from error
    except RecursionError:
        raise InputError(f"{where}: nested too deeply; correct or remove the line") from None
    except ValueError as error:
        raise InputError(f"{where}: not a line of JSON ({error}); correct or remove the line") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object such as {{\"{column}\": \"...\"}}, got {type(row).__name__}")
    if column not in row:
        raise InputError(no_column(where, column, {name: isinstance(value, str) for name, value in row.items()}))
    if text.count(json.dumps(column, allow_nan=False)) > 1:  # perhaps as a name, perhaps inside a text
        pairs = json.loads(text, object_pairs_hook=list)
        if sum(name == column for name, _ in pairs) > 1:
            raise InputError(f"{where}: column {column!r} is there more than once; correct the line")
    text = check_text(where, row[column], column)
    if not text.isprintable() and any("\ud800" <= char <= "\udfff" for char in text):
        raise InputError(f"{where}: half of a surrogate pair in column {column!r}; correct the line")
    return text, row.get("id")


def check_text(where: str, text: Any, column: str) -> str:
    if text is None:
        return ""
    if not isinstance(text, str):
        kind = type(text).__name__
        raise InputError(f"{where}: expected text in column {column!r}, got {kind}; set data.text_column")
    return text


def no_column(where: str, column: str, columns: dict[str, bool]) -> str:
    """The line that says so. ``columns``: those that are there, and whether they hold text. None is taken by itself."""
    texts = [name for name, holds_text in columns.items() if holds_text]
    only = f"no column {column!r}, only {', '.join(map(repr, list(columns)[:SHOWN]))}{', ...' * (len(columns) > SHOWN)}"
    if not columns:
        return f"{where}: no column {column!r}, and no other"
    if not texts:
        return f"{where}: {only}, none of which holds text"
    if len(texts) == 1:
        return f"{where}: {only}; set data.text_column={texts[0]}"
    return f"{where}: {only}; set data.text_column to that of {', '.join(map(repr, texts[:SHOWN]))} which is meant"


def read_parquet(file: Path, column: str) -> Iterator[tuple[str, Any]]:
    """The rows of a column of any type that Arrow has for text, and of bytes that are UTF-8."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        schema = table.schema_arrow
        if column not in schema.names:
            raise InputError(no_column(str(file), column, {field.name: holds_text(field.type) for field in schema}))
        if schema.names.count(column) > 1:
            raise InputError(f"{file}: {schema.names.count(column)} columns are named {column!r}; rename all but one")
        kind = schema.field(column).type
        if not holds_text(kind):
            raise InputError(f"{file}: expected text in column {column!r}, got {kind}; set data.text_column")
        row = 0
        names = list(dict.fromkeys((column, "id"))) if schema.names.count("id") == 1 else [column]
        for batch in table.iter_batches(batch_size=1024, columns=names):
            values = batch.column(column).cast(pa.large_binary()).to_pylist()
            own = batch.column("id").to_pylist() if "id" in names else [None] * len(values)
            for value, name in zip(values, own, strict=True):
                row += 1
                yield "" if value is None else decode(value, f"{file}, row {row}", column), name
    except pa.ArrowException as error:
        raise InputError(f"{file}: not a readable parquet file ({one_line(error)})") from error


def holds_text(kind: Any) -> bool:
    """Whether a column of this Arrow type can hold text: of characters, of bytes, or nothing but null."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    known = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in known)


def decode(value: bytes, where: str, column: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        byte = f"byte {value[error.start]:#04x} at offset {error.start} of column {column!r}"
        raise InputError(f"{where}: {byte} is not UTF-8; convert it, or set data.text_column") from error


# --- the hub


def open_hub(source: Source) -> Split:
    if source.on_unreadable == "skip":
        problem = "expected stop with a data set of the hub, whose files are downloaded whole and checked"
        raise InputError(f"data.on_unreadable: {problem}, got 'skip' for {source.path}")
    validation: Documents | float = DEFAULT_VALIDATION
    if isinstance(source.validation, float):
        validation = source.validation
    elif source.validation:
        validation = hub_documents(source, source.validation)
    return Split(hub_documents(source, source.split or "train"), validation)


def hub_documents(source: Source, split: str) -> Documents:
    identity = {
        "hub": source.path, "split": split, "revision": source.revision, "text_column": source.text_column,
        "max_documents": source.max_documents,
    }  # fmt: skip
    def open_it() -> Any:
        import datasets

        name, _, config = source.path.partition(":")
        return datasets.load_dataset(name, config or None, split=split, revision=source.revision, streaming=True)

    stream = Stream(source.text_column or "text", open_it, f"data.source: {source.path}", is_remote=True)
    return Documents(f"{source.path} {split}", identity, lambda: read_hub(source, split), stream=stream)


def read_hub(source: Source, split: str) -> Iterator[str]:
    """The texts of a data set, downloaded if need be; with `max_documents` only as much as is needed of it.

    Raises:
        InputError: `datasets` cannot load it (the hub is offline, the name is wrong, it needs code of its own), or it
            has no such column.
    """
    import datasets

    name, _, config = source.path.partition(":")
    column = source.text_column or "text"
    try:
        rows = datasets.load_dataset(
            name, config or None, split=split, revision=source.revision, streaming=source.max_documents is not None
        )
        features = getattr(rows, "features", None) or {}
        names = rows.column_names or list(next(iter(rows), {}))
    except Exception as error:  # datasets, huggingface_hub and the formats they read have dozens of kinds
        raise InputError(
            f"data.source: {name}: no such file or folder here, and the hub data set cannot be loaded "
            f"({type(error).__name__}: {one_line(error)}); correct data.source, go online or use local files"
        ) from error
    if column not in names:
        texts = {name: getattr(features.get(name), "dtype", "string").endswith("string") for name in names}
        raise InputError(no_column(f"data.source: {name}", column, texts))
    number = 0
    try:
        for number, row in enumerate(islice(rows.select_columns(column), source.max_documents), start=1):
            yield check_text(f"{source.path}, row {number}", row[column], column)
    except InputError:
        raise
    except Exception as error:  # as above: a file of it that cannot be fetched or read
        problem = f"cannot be read behind row {number} ({type(error).__name__}: {one_line(error)})"
        remedy = "start again, and it goes on there; or use local files"
        raise Interrupted(f"data.source: {source.path}: {problem}; {remedy}") from error


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
