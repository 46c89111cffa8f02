"""Result files: JSON, CSV and Markdown of the same rows, each written whole or not at all.

A column of numbers holds numbers or nothing; why there is nothing says the row's ``status``, which is "measured"
otherwise.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...engine.errors import InputError
from ...engine.files import LOST, finite, is_lost, write_json, write_text
from .resident import Memory
from .timing import Refusal, Timing

MEASURED = "measured"
TIMED = ("ms", "time_ms", "measured_GiB", "allocator_peak", "bytes_per_token")  # whose rows have a status
EARLIER_NAMES = {"failed": "status", "ended": "status"}


def write_results(
    folder: Path, name: str, rows: Sequence[Mapping[str, Any]], environment: Mapping[str, Any], *, title: str = "",
    columns: Sequence[str] | None = None,
) -> Path:  # fmt: skip
    """``name``.json (environment and rows), ``name``.csv (rows) and ``name``.md (a table); returns the JSON's path.

    A row maps columns to text, numbers, None (an empty cell), a ``Timing``, a ``Memory`` or a ``Refusal``. ``columns``
    picks and orders those of the Markdown table; the other two files have all. A number that is not finite is no
    result: its place is empty, and the row's column ``not_finite`` names it.
    """
    kept = [finite(flatten(row)) for row in rows]
    every = list(dict.fromkeys(column for row in kept for column in row))
    shown = list(dict.fromkeys([*(columns or every), *(column for column in every if column == LOST)]))
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, every, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(kept)
    write_text(folder / f"{name}.csv", text.getvalue())
    heading = f"# {title}\n\n" if title else ""
    table = markdown_table(kept, shown)
    write_text(folder / f"{name}.md", f"{heading}{table}\n{environment_lines(environment)}")
    path = folder / f"{name}.json"
    write_json(path, {"environment": dict(environment), "rows": kept})
    return path


def read_results(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows, environment) of a file that ``write_results`` wrote, now or in an earlier version."""
    content = json.loads(Path(path).read_text())
    return [with_status(row) for row in content["rows"]], content["environment"]


def read_rows(path: Path) -> list[dict]:
    """The rows of a result file; none of a JSON file of another kind."""
    content = json.loads(path.read_text())
    return [with_status(row) for row in content["rows"]] if isinstance(content, dict) and "rows" in content else []


def with_status(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it is written now. Earlier versions put the reason into the column of the number, or named the column
    otherwise."""
    now = {EARLIER_NAMES.get(column, column): value for column, value in row.items()}
    words = [column for column in TIMED if isinstance(now.get(column), str)]
    if words:
        now |= {"status": now[words[0]], words[0]: None}
    elif any(column in now for column in TIMED):
        now.setdefault("status", MEASURED)
    return now


SAME = ("commit", "gpu", "cpu", "threads", "torch", "triton", "dtype")  # of two results in one table


def rows_to_resume(path: Path, stamp: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that an interrupted run left in ``path``; none when it left no file.

    Raises:
        InputError: they were measured with other code or elsewhere, so they do not belong in the table of ``stamp``.
    """
    if not path.exists():
        return []
    rows, before = read_results(path)
    for name in SAME:
        if before.get(name) != stamp.get(name):
            raise InputError(f"--resume: {path} has {name} {before.get(name)}, this is {stamp.get(name)}; "
                             "choose another --out")  # fmt: skip
    return rows


def flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for column, value in row.items():
        if isinstance(value, Timing):
            flat |= {column: value.median_ms, f"{column}_p20": value.p20_ms, f"{column}_p80": value.p80_ms}
            flat |= {f"{column}_samples": value.num_samples, f"{column}_method": value.method}
            flat.setdefault("status", MEASURED)
        elif isinstance(value, Memory):
            flat |= {column: value.peak_bytes, f"{column}_extra": value.extra_bytes}
        elif isinstance(value, Refusal):
            flat |= {column: None, "status": value.reason}
        else:
            flat[column] = value
    return flat


def markdown_table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A Markdown table, numbers to the right; a missing value or None is an empty cell."""
    rows = list(rows)
    numeric = [all(isinstance(row.get(c), (int, float, type(None))) for row in rows) for c in columns]
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join("---:" if n else "---" for n in numeric) + "|"]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    if value is None:
        return ""
    if is_lost(value):
        return "not finite"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def environment_lines(environment: Mapping[str, Any]) -> str:
    known = {name: in_words(value) for name, value in environment.items() if value is not None}
    return "".join(f"- {name}: {text}\n" for name, text in known.items() if text)


def in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items() if item is not None)
    return "; ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
