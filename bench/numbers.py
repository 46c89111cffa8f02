"""Measured numbers into documents, and two measurements against each other.

    conceptron bench report DIR [--paste FILE ...]      tables and plots of a folder of results
    conceptron bench compare OLD NEW                    what got slower beyond the noise of both

A document holds its tables between two markers,

    <!-- numbers: bench/results/cpu/exponents.json encoder phase of exponent -->
    ...
    <!-- end -->

where the first names a result file (from the checkout's root) and, if wanted, the columns. What stands between them is
written from the file; ``tests/bench/test_numbers.py`` fails when the two differ.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .harness import device_of, markdown_table, read_results, write_results, write_text
from .plot import BLUE, GREY, INK, canvas
from .suite import BEST_COLUMNS, best_peers

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
        FileNotFoundError: a marker names a file that is not there.
        ValueError: a marker names a column that the file does not have.
    """

    def table(match: re.Match) -> str:
        rows, environment = read_results(root / match["path"])
        columns = match["columns"].split()
        known = {column.replace(" ", "_"): column for row in rows for column in row}
        missing = [column for column in columns if column not in known]
        if missing:
            raise ValueError(f"{match['path']}: no column {missing[0]!r}; it has {', '.join(sorted(known))}")
        return match[1] + render(rows, environment, [known[column] for column in columns]) + match[5]

    return BLOCK.sub(table, text)


def key_of(row: dict) -> tuple:
    return tuple(row.get(name) for name in ("operator", "case", "mode", "provider", "encoder", "phase", "N"))


def times_of(row: dict) -> tuple[float, float] | None:
    """(median ms, noise as a share of it), if the row holds a time."""
    for column in ("ms", "time_ms", "step_ms"):
        if isinstance(row.get(column), (int, float)):
            low, high = row.get(f"{column}_p20"), row.get(f"{column}_p80")
            return row[column], 0.0 if low is None or high is None else (high - low) / row[column]
    return None


def slower(old: Sequence[dict], new: Sequence[dict], least: float = 0.05) -> list[dict]:
    """Rows of ``new`` whose time grew by more than the noise of both measurements together, and than ``least``."""
    before = {key_of(row): times for row in old if (times := times_of(row)) is not None}
    found = []
    for row in new:
        times = times_of(row)
        if times is None or key_of(row) not in before:
            continue
        (was, noise), (now, noise_now) = before[key_of(row)], times
        change = now / was - 1
        if change > max(least, noise + noise_now):
            name = " ".join(str(part) for part in key_of(row) if part is not None)
            found.append({"what": name, "was ms": was, "is ms": now, "slower by": f"{100 * change:.0f} %",
                          "noise": f"{100 * (noise + noise_now):.0f} %"})  # fmt: skip
    return found


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
        known = {key_of(row) for row in pair[0] if times_of(row)}
        num_compared += sum(key_of(row) in known for row in pair[1] if times_of(row))
        found += slower(*pair)
    if not num_compared:
        raise FileNotFoundError(f"{old} and {new}: no result of the one is also in the other")
    return found, num_compared


def read_rows(path: Path) -> list[dict]:
    """The rows of a result file; none of a JSON file of another kind."""
    content = json.loads(path.read_text())
    return content["rows"] if isinstance(content, dict) and "rows" in content else []


def plot_roofline(path: Path, rows: Sequence[dict], environment: dict[str, Any]) -> None:
    """Measured rate of our operators against their intensity, under the two ceilings of the same run."""
    copy, matmul = environment["copy_gb_s"], environment["matmul_tflops"]
    ours = [row for row in rows if row["provider"].startswith("conceptron") and row.get("tflops")]
    note = f"{device_of(environment)}; copy {copy:.0f} GB/s, matmul {matmul:.3g} TF/s, both measured in this run"
    with canvas(path, "Operators under the roofline", note) as (axes,):
        intensity = [row["tflops"] * 1e3 / row["gb_s"] for row in ours]
        low, high = min([*intensity, 1.0]) / 2, max([*intensity, 100.0]) * 2
        ridge = matmul * 1e3 / copy
        axes.plot([low, ridge, high], [low * copy / 1e3, matmul, matmul], color=INK, linewidth=1.2)
        for mode, marker, colour in (("forward", "o", BLUE), ("backward", "s", GREY), ("both", "^", INK)):
            kept = [(x, row["tflops"]) for x, row in zip(intensity, ours, strict=True) if row["mode"] == mode]
            if kept:
                axes.plot(*zip(*kept, strict=True), marker, color=colour, label=mode, markersize=5)
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
        axes.legend(loc="lower right")


def plot_speedups(path: Path, rows: Sequence[dict], environment: dict[str, Any]) -> None:
    """Our time against the fastest accurate peer's, one bar a case; left of 1 is a loss."""
    table = [row for row in best_peers(rows) if row["ours is faster by"]]
    note = f"forward and backward, {device_of(environment)}; right of 1 ours is faster"
    with canvas(path, "Against the fastest accurate peer", note, size=(8.6, 1.4 + 0.36 * len(table))) as (axes,):
        names = [f"{row['operator']}  {row['case']}" for row in table][::-1]
        values = [row["ours is faster by"] for row in table][::-1]
        axes.barh(names, values, color=[BLUE if value >= 1 else GREY for value in values], height=0.6)
        for i, (value, row) in enumerate(zip(values, table[::-1], strict=True)):
            axes.text(max(value, 1.0), i, f" {value:.2f}x  {row['best peer']}", va="center", fontsize=8.5)
        axes.axvline(1, color=INK, linewidth=1)
        axes.set(xlabel="peer's time / ours", xlim=(0, max([*values, 1.0]) * 1.5))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", labelsize=8.5)


def report(folder: Path) -> Path:
    """Writes ``folder``/report.md and, for operators, their plots.

    Raises:
        FileNotFoundError: the folder holds no result file.
    """
    files = [path for path in sorted(folder.rglob("*.json")) if path.name != "best.json" and read_rows(path)]
    if not files:
        raise FileNotFoundError(f"{folder}: no result files; run conceptron bench kernels, scaling or memory first")
    parts = ["# Results\n"]
    for path in files:
        rows, environment = read_results(path)
        if path.name == "kernels.json":
            for suffix in ("png", "svg"):
                plot_roofline(path.with_name(f"roofline.{suffix}"), rows, environment)
                plot_speedups(path.with_name(f"speedup.{suffix}"), rows, environment)
            best = best_peers(rows)
            write_results(path.parent, "best", best, environment, title="Against the fastest accurate peer")
            parts.append(f"## Against the fastest accurate peer\n{render(best, environment, BEST_COLUMNS)}")
        table = (path.with_suffix(".md").read_text() if path.with_suffix(".md").exists()
                 else render(rows, environment, ()))  # fmt: skip
        parts.append(f"## {path.relative_to(folder).with_suffix('')}\n\n{table.removeprefix('# ')}")
        parts += [
            f"![{image.stem}]({image.relative_to(folder)})\n" for image in sorted(path.parent.glob("*.png"))
            if image.stem.startswith({"kernels": ("roofline", "speedup"), "scaling": ("time", "peak"),
                                      "memory": ("memory",)}.get(path.stem, ("-",)))
        ]  # fmt: skip
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
