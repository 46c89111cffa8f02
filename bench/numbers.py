"""Measured numbers into documents, and two measurements against each other.

    conceptron bench report DIR [--paste FILE ...]      tables and plots of a folder of results
    conceptron bench compare OLD NEW                    what got slower beyond the noise of both

A document holds its tables between two markers,

    <!-- numbers: bench/results/cpu/scaling/exponents.json encoder phase of exponent -->
    ...
    <!-- end -->

where the first names a result file (from the checkout's root) and, if wanted, the columns. What stands between them is
written from the file, or "Not measured." when there is none; ``tests/bench/test_numbers.py`` fails when the two differ.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .charts import draw_kernels, draw_memory, draw_scaling
from .exponents import write_tables
from .harness import markdown_table, read_results, write_results, write_text
from .kernels.best import COLUMNS, best_peers
from .table import write_tables as write_ablation

CHECKOUT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- numbers: (?P<path>\S+)(?P<columns>[^>]*?) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
STAMP = ("gpu", "cpu", "torch", "triton", "date", "commit", "command")  # said under a table


def render(rows: Sequence[dict], environment: dict[str, Any], columns: Sequence[str]) -> str:
    """The Markdown between two markers: the table, and on one line where and how it was measured."""
    where = "; ".join(f"{name} {environment[name]}" for name in STAMP if environment.get(name))
    return f"\n{markdown_table(rows, columns or list(rows[0]))}\n{where}\n\n"


def fill(text: str, root: Path) -> str:
    """``text`` with every marked table written anew from its result file.

    Raises:
        ValueError: a marker names a column that the file does not have.
    """

    def table(match: re.Match) -> str:
        if not (root / match["path"]).exists():
            return f"{match[1]}\nNot measured.\n\n{match[5]}"
        rows, environment = read_results(root / match["path"])
        columns = match["columns"].split()
        known = {column.replace(" ", "_"): column for row in rows for column in row}
        missing = [column for column in columns if column not in known]
        if missing:
            raise ValueError(f"{match['path']}: no column {missing[0]!r}; it has {', '.join(sorted(known))}")
        return match[1] + render(rows, environment, [known[column] for column in columns]) + match[5]

    return BLOCK.sub(table, text)


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


def read_rows(path: Path) -> list[dict]:
    """The rows of a result file; none of a JSON file of another kind."""
    content = json.loads(path.read_text())
    return content["rows"] if isinstance(content, dict) and "rows" in content else []


MEASURED = {  # result file -> its figures
    "kernels.json": ("speedup", "roofline"), "scaling.json": ("time", "memory", "speedup"), "memory.json": ("memory",),
    "cells.json": ("ablation",),
}  # fmt: skip


def derive(path: Path) -> None:
    """Writes anew what follows from a measured file: derived tables and figures."""
    rows, environment = read_results(path)
    if path.name == "kernels.json":
        write_results(path.parent, "kernels", rows, environment, title="Operators beside their peers", columns=COLUMNS)
        best = best_peers(rows)
        write_results(path.parent, "best", best, environment, title="Against the fastest accurate peer")
        draw_kernels(path.parent, best)
    elif path.name == "scaling.json":
        write_tables(path.parent, rows, environment)
        draw_scaling(path.parent)
    elif path.name == "cells.json":
        write_ablation(path.parent, rows, environment)
    else:
        draw_memory(path.parent)


def report(folder: Path) -> Path:
    """Writes ``folder``/report.md, and anew what follows from the measured rows: derived tables, figures.

    Raises:
        FileNotFoundError: the folder holds no result file.
    """
    for path in (path for path in sorted(folder.rglob("*.json")) if path.name in MEASURED):
        derive(path)
    files = [path for path in folder.rglob("*.json") if read_rows(path)]
    if not files:
        raise FileNotFoundError(f"{folder}: no result files; run conceptron bench kernels, scaling or memory first")
    parts = ["# Results\n"]
    for path in sorted(files, key=lambda path: (path.parent, path.name in MEASURED, path)):  # short tables first
        table = path.with_suffix(".md").read_text()
        parts.append(f"## {path.relative_to(folder).with_suffix('')}\n\n{table.removeprefix('# ')}")
        images = (path.with_name(f"{name}.png") for name in MEASURED.get(path.name, ()))
        parts += [f"![{image.stem}]({image.relative_to(folder)})\n" for image in images if image.exists()]
    write_text(folder / "report.md", "\n".join(parts))
    return folder / "report.md"


def report_main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="conceptron bench report", description="Tables and plots of results.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--paste", type=Path, nargs="*", default=[], metavar="FILE", help="documents with tables")
    options = parser.parse_args(argv)
    try:
        print(f"written to {report(options.folder)}")
        for document in options.paste:
            write_text(document, fill(document.read_text(), CHECKOUT))
            print(f"tables of {document} written anew")
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    return 0


def compare_main(argv: Sequence[str]) -> int:
    """Exit code 1 when something got slower."""
    parser = argparse.ArgumentParser(prog="conceptron bench compare", description="What got slower, beyond the noise.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(argv)
    try:
        found, num_compared = compare_folders(options.old, options.new)
    except FileNotFoundError as error:
        parser.error(str(error))
    if not found:
        print(f"{num_compared} results compared, none slower beyond the noise")
        return 0
    print(markdown_table(found, list(found[0])))
    print(f"{num_compared} results compared, {len(found)} slower beyond the noise: {found[0]['what']} first")
    return 1
