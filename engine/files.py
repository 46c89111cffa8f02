"""Files and figures as this program writes them: whole or not at all, and no NaN and no infinity in either.

JSON knows neither, and what is not a number is no result. Where a figure is not finite, its place says null and the key
``not_finite`` beside it says which these are; in a line for people it reads "not finite".
"""

import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOST = "not_finite"


def as_json(content: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """The one way in which figures become JSON, see `finite`.

    Raises:
        ValueError, TypeError: something in it is no JSON.
    """
    return json.dumps(finite(content), indent=indent, sort_keys=sort_keys, allow_nan=False)


def finite(value: Any) -> Any:
    """The same with None for what is NaN or infinite; a mapping then has ``not_finite``: the names of such figures."""
    if isinstance(value, Mapping):
        kept = {name: finite(inside) for name, inside in value.items()}
        lost = [name for name, inside in value.items() if is_lost(inside)]
        return {**kept, LOST: lost} if lost else kept
    if isinstance(value, list | tuple):
        return [finite(inside) for inside in value]
    return None if is_lost(value) else value


def is_lost(value: Any) -> bool:
    """Whether it is NaN or infinite, or a list with such a number in it."""
    if isinstance(value, list | tuple):
        return any(is_lost(inside) for inside in value)
    return isinstance(value, float) and not math.isfinite(value)


def in_words(value: float, how: str) -> str:
    """A figure in a line for people; ``how`` as `format` has it."""
    return "not finite" if is_lost(value) else format(value, how)


def write_json(path: Path, content: Any) -> None:
    write_text(path, as_json(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Atomic: a reader finds the old file or the new one, never a part."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")  # others may write it now, too
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
