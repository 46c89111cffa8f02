"""One change at a time: each row of a table is a recipe, trained with several seeds and measured like all the others.

    conceptron bench ablation recipes/ablation/defaults.yaml [section.field=value ...] [--workers 2] [--out DIR]

The file holds

    base      a recipe, without `run`
    seeds     of every row
    minutes   no training starts later than this; what is left starts when the command is given again
    measure   how much held-out text the yardsticks read
    rows      name; change, in words; set: dotted field -> value, on top of the row before, or of the one `against`

A cell is a row with a seed: a training run of its own below ``OUT/runs``, then the figures of ``yardsticks.measure`` in
``OUT/cells``. A finished cell is not run again, an interrupted one goes on from its checkpoint, and one that fails is a
line of the table that says why. Overrides on the command line change the base.
"""

import argparse
import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from copy import deepcopy
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field

from ..engine.errors import InputError
from ..engine.files import as_json, write_json
from ..engine.recipe.checker import Checker
from ..engine.recipe.load import apply_override, find_recipe, load_recipe
from ..engine.recipe.reader import dump, read_yaml
from ..engine.recipe.schema import Count, CountOrZero, Recipe, Section, flatten
from .documents.table import COLUMNS, write_tables
from .measure.environment import environment
from .measure.results import markdown_table, write_results
from .measure.timing import refusal

WAITING = "not started"


class Measure(Section):
    tokens: Count = 32768  # held-out tokens of the losses and of the reconstruction
    texts: Count = 256  # held-out windows of the geometry and of the retrieval


class RowSection(Section):
    name: Annotated[str, Field(pattern=r"^[\w.+-]+$")]
    change: str
    against: str | None = None  # the row that it changes; left out: the one before
    set: dict[str, Any] = Field(default_factory=dict)


class TableSection(Section):
    base: dict[str, Any]
    seeds: Annotated[list[CountOrZero], Field(min_length=1)]
    minutes: Annotated[float, Field(gt=0)] = 120.0
    measure: Measure = Measure()
    rows: Annotated[list[RowSection], Field(min_length=1)]


class Row(NamedTuple):
    name: str
    change: str
    against: str | None  # the name of the row that it is held against
    path: Path  # its recipe, without a seed


class Cell(NamedTuple):
    row: Row
    seed: int
    overrides: list[str]  # of the row's recipe
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"{self.row.name}-seed{self.seed}"


def read_table(path: Path) -> TableSection:
    """
    Raises:
        InputError: the file cannot be read, a field is unknown or wrong, or a row has the name of another or is
            against one that does not come before it.
    """
    table = Checker(str(path), {}).check(TableSection, read_yaml(path))
    names: list[str] = []
    for i, row in enumerate(table.rows):
        if row.name in names:
            raise InputError(f"{path}: rows.{i}.name: {row.name!r} is the name of an earlier row; choose another")
        if row.against is not None and row.against not in names:
            before = ", ".join(names) or "none"
            raise InputError(f"{path}: rows.{i}.against: expected an earlier row ({before}), got {row.against!r}")
        names.append(row.name)
    return table


def write_recipes(table: TableSection, overrides: Sequence[str], folder: Path) -> list[Row]:
    """The recipe of each row as a file of its own in ``folder``, which ``conceptron train`` takes too."""
    base = deepcopy(table.base)
    for text in overrides:
        apply_override(base, text)
    folder.mkdir(parents=True, exist_ok=True)
    trees: dict[str | None, dict[str, Any]] = {None: base}
    rows: list[Row] = []
    for section in table.rows:
        against = section.against or (rows[-1].name if rows else None)
        tree = trees[section.name] = deepcopy(trees[against])
        for field, value in section.set.items():
            apply_override(tree, f"{field}={json.dumps(value, allow_nan=False)}")
        row = Row(section.name, section.change, against, folder / f"{section.name}.yaml")
        row.path.write_text(f"# {section.change}\n{dump(tree)}", encoding="utf-8")
        rows.append(row)
    return rows


def cells_of(rows: Sequence[Row], seeds: Sequence[int], out: Path) -> list[Cell]:
    """The first seed of every row, then the second: a table that is cut short has all its rows.

    Raises:
        InputError: the recipe of a row is wrong.
    """
    cells = []
    for seed in seeds:
        for row in rows:
            place = [f"run.seed={seed}", f"run.name={row.name}-seed{seed}", f"run.folder={out / 'runs'}", "resume=auto"]
            cells.append(Cell(row, seed, place, load_recipe(row.path, place)))
    return cells


# --- one cell ---------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell, out: Path, measured_on: Measure, deadline: float, threads: int | None) -> dict[str, Any]:
    """Trains, measures and writes the cell's file; what training says goes into a log beside its folder.

    Returns a row: its figures, or under ``status`` why there are none. ``deadline``: of ``time.time()``.
    """
    from ..engine.telemetry import read_history
    from ..engine.trainer import train
    from .analysis import yardsticks
    from .analysis.findings import num_parameters, training_of
    from .analysis.subject import open_subject

    if time.time() > deadline:
        return {"status": WAITING}
    if threads:
        torch.set_num_threads(threads)
    (out / "runs").mkdir(parents=True, exist_ok=True)
    log = (out / "runs" / f"{cell.name}.log").open("a", encoding="utf-8")
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        folder = train(cell.row.path, cell.overrides)
        subject = open_subject(folder)
        figures = yardsticks.measure(subject, measured_on.tokens, measured_on.texts)
    training = training_of(read_history(folder / "metrics.jsonl"))
    figures |= {"num_parameters": num_parameters(subject), "train_seconds": training.train_seconds,
                "train_tokens": training.tokens}  # fmt: skip
    (out / "cells").mkdir(exist_ok=True)
    write_json(cell_file(out, cell), {"made_with": made_with(cell, measured_on), "figures": figures})
    shutil.rmtree(folder / "checkpoints")  # the finished model stays
    return {"status": "measured", **figures}


def cell_file(out: Path, cell: Cell) -> Path:
    return out / "cells" / f"{cell.name}.json"


def made_with(cell: Cell, measured_on: Measure) -> dict[str, Any]:
    """What decides a cell's figures."""
    return {**cell.recipe.trajectory(), **flatten({"measure": measured_on.model_dump()})}


def finished(out: Path, cell: Cell, measured_on: Measure) -> dict[str, Any] | None:
    """The figures of a cell that was run before.

    Raises:
        InputError: it was run with something else than the table says now.
    """
    path = cell_file(out, cell)
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    before, now = content["made_with"], json.loads(as_json(made_with(cell, measured_on)))
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            raise InputError(
                f"{path}: was made with {key} = {before.get(key)!r}, now it is {now.get(key)!r}; "
                "choose another --out, or remove this file to run the cell again"
            )
    return {"status": "measured", **content["figures"]}


# --- all cells --------------------------------------------------------------------------------------------------------


class InProcess(Executor):
    """Runs what it is given at once, here."""

    def submit(self, function, /, *arguments, **options) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*arguments, **options))
        except Exception as error:  # handed to whoever asks for the result, as other executors do
            future.set_exception(error)
        return future


def run_cells(
    cells: Sequence[Cell], out: Path, measured_on: Measure, *, workers: int, threads: int | None, minutes: float
) -> list[dict[str, Any]]:
    """One row for each cell, in their order. ``workers``: processes that take cells in turn; 0: none but this one."""
    done = {cell.name: finished(out, cell, measured_on) for cell in cells}
    left = [cell for cell in cells if done[cell.name] is None]
    print(f"{len(cells) - len(left)} of {len(cells)} cells are finished", flush=True)
    deadline = time.time() + 60 * minutes
    executor = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers else InProcess()
    with executor:
        futures = {executor.submit(run_cell, cell, out, measured_on, deadline, threads): cell for cell in left}
        for future in as_completed(futures):
            cell = futures[future]
            try:
                done[cell.name] = future.result()
            except Exception as error:  # a failed cell is a result: the table says so, and the exit code
                done[cell.name] = {"status": refusal(error).reason}
            print(f"{cell.name}: {done[cell.name]['status']}", flush=True)
    return [
        {"row": cell.row.name, "against": cell.row.against, "change": cell.row.change, "seed": cell.seed,
         **done[cell.name]}
        for cell in cells
    ]  # fmt: skip


def main(options: argparse.Namespace) -> int:
    """The command line; exit code 1 when a cell failed or was not started."""
    table = read_table(find_recipe(options.table))
    unknown = set(options.rows or ()) - {row.name for row in table.rows}
    if unknown:
        raise InputError(f"--rows: no row {min(unknown)!r}; there are {', '.join(row.name for row in table.rows)}")
    rows = write_recipes(table, options.overrides, options.out / "recipes")
    rows = [row for row in rows if not options.rows or row.name in options.rows]
    seeds = options.seeds or table.seeds
    cells = cells_of(rows, seeds, options.out)
    results = run_cells(
        cells, options.out, table.measure, workers=options.workers, threads=options.threads,
        minutes=table.minutes if options.minutes is None else options.minutes,
    )  # fmt: skip
    stamp = environment()
    title = f"Ablation: {Path(options.table).stem}"
    figures = [column.key for column in COLUMNS]
    write_results(options.out, "cells", results, stamp, title=title, columns=["row", "seed", "status", *figures])
    lines = write_tables(options.out, results, stamp)
    print(markdown_table(lines, ["row", *(column.title for column in COLUMNS)]))
    bad = [f"{row['row']} seed {row['seed']}: {row['status']}" for row in results if row["status"] != "measured"]
    print("\n".join([*bad, f"written to {options.out}"]))
    return 1 if bad else 0
