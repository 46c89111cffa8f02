"""``conceptron bench report``: a folder of results as one document with its derived tables and figures."""

import argparse
from pathlib import Path

from ..engine.errors import InputError
from ..engine.files import write_text
from .documents.paste import fill
from .documents.table import write_tables as write_ablation
from .figures.charts import draw_kernels, draw_overview, draw_scaling
from .figures.memory import draw_memory
from .kernels.best import COLUMNS, best_peers
from .measure.exponents import write_tables
from .measure.results import read_results, read_rows, write_results

CHECKOUT = Path(__file__).parent.parent
MEASURED = {  # result file -> its figures
    "kernels.json": ("speedup", "roofline"), "scaling.json": ("time", "memory", "speedup"), "memory.json": ("memory",),
    "encoders.json": ("encoders",), "cells.json": ("ablation",),
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
    elif path.name == "memory.json":
        draw_memory(path.parent)


def report(folder: Path) -> Path:
    """Writes ``folder``/report.md, and anew what follows from the measured rows: derived tables, figures.

    Raises:
        FileNotFoundError: the folder holds no result file.
    """
    for path in (path for path in sorted(folder.rglob("*.json")) if path.name in MEASURED):
        derive(path)
    short, long = (folder / name / "scaling.json" for name in ("scaling", "long"))
    if short.exists():
        draw_overview(folder, short, long)
    files = [path for path in folder.rglob("*.json") if read_rows(path)]
    if not files:
        raise FileNotFoundError(f"{folder}: no result files; run conceptron bench kernels, scaling or memory first")
    parts = ["# Results\n"]
    if (folder / "overview.png").exists():
        parts.append("![overview](overview.png)\n")
    for path in sorted(files, key=lambda path: (path.parent, path.name in MEASURED, path)):  # short tables first
        table = path.with_suffix(".md").read_text()
        parts.append(f"## {path.relative_to(folder).with_suffix('')}\n\n{table.removeprefix('# ')}")
        images = (path.with_name(f"{name}.png") for name in MEASURED.get(path.name, ()))
        parts += [f"![{image.stem}]({image.relative_to(folder)})\n" for image in images if image.exists()]
    write_text(folder / "report.md", "\n".join(parts))
    return folder / "report.md"


def main(options: argparse.Namespace) -> int:
    """The command line."""
    try:
        print(f"written to {report(options.folder)}")
        for document in options.paste:
            write_text(document, fill(document.read_text(), CHECKOUT))
            print(f"tables of {document} written anew")
    except (FileNotFoundError, ValueError) as error:
        raise InputError(str(error)) from error
    return 0
