"""``conceptron bench compare OLD NEW``: what got slower between two folders of results, beyond the noise of both; and
``conceptron compare RUN RUN ...``: what was trained, side by side.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..engine.errors import InputError
from .documents.beside import beside, column_of, in_text, published, told_apart, warnings, write
from .measure.results import markdown_table, read_rows

KEY = ("operator", "case", "mode", "provider", "encoder", "phase", "N", "recipe")
FEW_SAMPLES = 3  # fewer say nothing about their noise


def key_of(row: dict) -> tuple:
    return tuple(row.get(name) for name in KEY)


def times_of(rows: Sequence[dict]) -> dict[tuple, tuple[float, float]]:
    """key -> (median ms, noise as a share of it) of the rows that hold a time.

    The noise is (p80 - p20) / median. A row of too few samples gets the largest noise of the others, as does one that
    has none at all (the phases of a training step); where no row has enough, it is 0.
    """
    found: dict[tuple, tuple[float, float | None]] = {}
    for row in rows:
        column = next((c for c in ("ms", "time_ms", "step_ms") if isinstance(row.get(c), int | float)), None)
        if column is not None:
            enough = f"{column}_p80" in row and row.get(f"{column}_samples", 0) >= FEW_SAMPLES
            spread = row[f"{column}_p80"] - row[f"{column}_p20"] if enough else None
            found[key_of(row)] = (row[column], None if spread is None else spread / row[column])
    largest = max((noise for _, noise in found.values() if noise is not None), default=0.0)
    return {key: (ms, largest if noise is None else noise) for key, (ms, noise) in found.items()}


def slower(old: Sequence[dict], new: Sequence[dict], least: float = 0.05) -> list[dict]:
    """Rows of ``new`` whose time grew by more than the noise of both measurements together, and than ``least``; the
    worst first."""
    before, after = times_of(old), times_of(new)
    found = []
    for key in (key for key in after if key in before):
        (was, noise), (now, noise_now) = before[key], after[key]
        change = now / was - 1
        if change > max(least, noise + noise_now):
            name = " ".join(str(part) for part in key if part is not None)
            found.append((change, {"what": name, "was ms": was, "is ms": now, "slower by": f"{100 * change:.0f} %",
                                   "noise": f"{100 * (noise + noise_now):.0f} %"}))  # fmt: skip
    return [row for _, row in sorted(found, key=lambda pair: -pair[0])]


def compare_folders(old: Path, new: Path) -> tuple[list[dict], int]:
    """(what got slower, how many rows were compared) over the result files that both folders hold.

    Raises:
        FileNotFoundError: the folders share no result file.
    """
    shared = sorted({path.relative_to(old) for path in old.rglob("*.json")}
                    & {path.relative_to(new) for path in new.rglob("*.json")})  # fmt: skip
    found, num_compared = [], 0
    for name in shared:
        pair = [read_rows(folder / name) for folder in (old, new)]
        num_compared += len(times_of(pair[0]).keys() & times_of(pair[1]).keys())
        found += slower(*pair)
    if not num_compared:
        raise FileNotFoundError(f"{old} and {new}: no result of the one is also in the other")
    return found, num_compared


def main(options: argparse.Namespace) -> int:
    """The command line; exit code 1 when something got slower."""
    try:
        found, num_compared = compare_folders(options.old, options.new)
    except FileNotFoundError as error:
        raise InputError(str(error)) from error
    if not found:
        print(f"{num_compared} results compared, none slower beyond the noise")
        return 0
    print(markdown_table(found, list(found[0])))
    print(f"{num_compared} results compared, {len(found)} slower beyond the noise: {found[0]['what']} first")
    return 1


def runs(options: argparse.Namespace) -> int:
    """``conceptron compare``: prints runs side by side.

    ``options``: runs, folders; seeds: also the planning documents' published values; out: a folder for the same as
    page, JSON, CSV and Markdown, or None.

    Raises:
        InputError: fewer than two columns, or a run without a report.
    """
    columns = told_apart([column_of(run) for run in options.runs], options.runs)
    columns += published() if options.seeds else []
    if len(columns) < 2:
        raise InputError(f"{options.runs[0]}: expected two runs or more, or --seeds beside it")
    lines = beside(columns)
    print(in_text(lines, columns))
    for warning in warnings(columns):
        print(f"\n{warning}")
    if options.out is not None:
        print("\nwritten: " + ", ".join(map(str, write(options.out, lines, columns))))
    return 0
