"""Folders that are built once: written beside their place, renamed when complete, checked when opened.

A folder's name carries a fingerprint of everything that went into it, so what is found is never out of date.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import InputError, Interrupted

INDEX = "index.json"
UNUSABLE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST,
)  # fmt: skip
DELAY_S = 1.0
CHECKED_BYTES = 1 << 30  # larger folders are checked by the sizes of their files only


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def progress(items: Iterable[Any], unit: str, total: int | None = None) -> Iterator[Any]:
    """The same items, with a bar on a terminal where they take longer than a second; elsewhere nothing is said."""
    return iter(tqdm(
        items, total=total, unit=unit, delay=DELAY_S, leave=False, dynamic_ncols=True, file=sys.stderr,
        disable=not sys.stderr.isatty(),
    ))  # fmt: skip


def bar(unit: str, total: int | None = None, begun: int = 0) -> tqdm:
    """A bar on a terminal, to be told how far it has come; elsewhere nothing is said."""
    return tqdm(
        total=total, initial=begun, unit=unit, delay=DELAY_S, leave=False, dynamic_ncols=True, file=sys.stderr,
        disable=not sys.stderr.isatty(),
    )  # fmt: skip


def cache_folder(cache: str | None) -> Path:
    """Where built data is kept: ``cache``, else $XDG_CACHE_HOME/conceptron, else ~/.cache/conceptron."""
    if cache:
        return Path(cache).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "conceptron"


def fingerprint(value: Any) -> str:
    """Sixteen hexadecimal digits that change with a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def built(folder: Path, build: Callable[[Path], dict[str, Any]], goes_on: bool = False) -> dict[str, Any]:
    """The index of ``folder``, which is built if it is missing and rebuilt if it is damaged.

    Of several processes that ask at once, one builds and the others wait for it.

    Args:
        folder: where the result is, or will be.
        build: writes files into the empty folder it is given, and returns what the index shall say.
        goes_on: the folder it is given may hold what a process left that was stopped, from which it can go on.

    Raises:
        InputError: the disk is full, or the cache cannot be written.
    """
    index, problem = read_index(folder)
    if index is not None:
        return index
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(folder.name + ".lock")):
            index, problem = read_index(folder)
            if index is not None:
                return index
            if problem:
                say(f"{folder}: damaged ({problem}); building it again")
            return _build(folder, build, goes_on)
    except OSError as error:
        if error.errno not in UNUSABLE:
            raise
        raise InputError(
            f"{error.filename or folder}: cannot write the data cache ({error.strerror}); "
            "make room there or set data.cache to another folder"
        ) from error


def read_index(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """(index, "") of a complete folder, (None, "") when there is none, (None, what is wrong) of a damaged one."""
    if not folder.exists():
        return None, ""
    try:
        index = json.loads((folder / INDEX).read_text())
        files = index["files"]
        whole = sum(entry["bytes"] for entry in files.values()) <= CHECKED_BYTES
        for name, entry in files.items():
            if (folder / name).stat().st_size != entry["bytes"]:
                return None, f"{name}: {(folder / name).stat().st_size} bytes instead of {entry['bytes']}"
            if whole and digest(folder / name) != entry["sha256"]:
                return None, f"{name}: its contents have changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return None, f"{type(error).__name__}: {error}"
    return index, ""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock; the kernel frees it when the process ends, however it ends."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(folder: Path, build: Callable[[Path], dict[str, Any]], goes_on: bool) -> dict[str, Any]:
    unfinished = folder.with_name(folder.name + ".unfinished")
    if not goes_on:
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed: who writes holds the lock
    unfinished.mkdir(exist_ok=True)
    keeps = False
    try:
        index = build(unfinished)
        names = sorted(path.name for path in unfinished.iterdir())
        index["files"] = {
            name: {"bytes": (unfinished / name).stat().st_size, "sha256": digest(unfinished / name)} for name in names
        }
        (unfinished / INDEX).write_text(json.dumps(index, indent=1, allow_nan=False) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(unfinished, folder)
    except BaseException as error:
        keeps = goes_on and (isinstance(error, Interrupted) or not isinstance(error, Exception))  # Ctrl-C, SystemExit
        raise
    finally:
        if not keeps:
            shutil.rmtree(unfinished, ignore_errors=True)
    return index
