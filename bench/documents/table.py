"""The table of an ablation: mean and spread over seeds, and what is better or worse beyond them."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from ..figures.plot import BLUE, GREY, INK, canvas
from ..measure.environment import device_of
from ..measure.results import write_results

BETTER, WORSE = "▲", "▼"
LEVEL = 0.05  # of the test; of 100 changes that do nothing about 5 are then marked


class Column(NamedTuple):
    title: str
    key: str  # of a cell's figures
    sense: int  # 1: more is better; -1: less is; 0: neither
    scale: float = 1.0
    digits: int = 3


COLUMNS = (
    Column("hidden NLL", "heldout_nll", -1),
    Column("concept nats", "concept_nats", 1),
    Column("kept right %", "accuracy_kept", 1, 100, 1),
    Column("deleted right %", "accuracy_deleted", 1, 100, 1),
    Column("adjacent R@1 %", "retrieval_pooled", 1, 100, 1),
    Column("by slots R@1 %", "retrieval_slots", 1, 100, 1),
    Column("seeds' rank", "effective_rank", 1, 1, 1),
    Column("static share", "static_fraction", -1),
    Column("dynamic rank", "rank_dynamic", 1, 1, 1),
    Column("M parameters", "num_parameters", 0, 1e-6, 2),
    Column("train s", "train_seconds", 0, 1, 0),
)
SHOWN = ("heldout_nll", "accuracy_deleted", "retrieval_pooled", "rank_dynamic")  # of the plot


class Row(NamedTuple):
    name: str
    against: str | None  # the name of the row that it changes
    change: str  # in words


def rows_of(cells: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The rows that the cells belong to, in their order."""
    return list(dict.fromkeys(Row(cell["row"], cell["against"], cell["change"]) for cell in cells))


def values_of(cells: Sequence[Mapping[str, Any]], row: str | None, key: str) -> list[float]:
    """A figure of every cell of a row that was measured."""
    found = [cell.get(key) for cell in cells if cell["row"] == row]
    return [value for value in found if isinstance(value, int | float) and math.isfinite(value)]


def summarize(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line a row: "mean ± standard deviation" of each column, marked where it differs from the row against."""
    lines = []
    for row in rows_of(cells):
        mine = [cell for cell in cells if cell["row"] == row.name]
        line: dict[str, Any] = {
            "row": row.name, "against": row.against or "", "change": row.change,
            "seeds": sum(cell["status"] == "measured" for cell in mine),
        }  # fmt: skip
        marks: dict[str, list[str]] = {BETTER: [], WORSE: []}
        for column in COLUMNS:
            values = values_of(cells, row.name, column.key)
            mark = verdict(values, values_of(cells, row.against, column.key), column.sense)
            line[column.title] = text_of(values, column, mark)
            if mark:
                marks[mark].append(column.title)
        line |= {"better": ", ".join(marks[BETTER]), "worse": ", ".join(marks[WORSE])}
        failed = [f"seed {cell['seed']}: {cell['status']}" for cell in mine if cell["status"] != "measured"]
        lines.append({**line, "missing": "; ".join(failed)})
    return lines


def text_of(values: Sequence[float], column: Column, mark: str) -> str | None:
    if not values:
        return None
    scaled = [value * column.scale for value in values]
    text = f"{statistics.mean(scaled):.{column.digits}f}"
    if len(scaled) > 1 and column.sense:
        text += f" ± {statistics.stdev(scaled):.{column.digits}f}"
    return f"{text} {mark}".strip()


def verdict(values: Sequence[float], before: Sequence[float], sense: int) -> str:
    """▲ or ▼ when the means differ at the 5 % level of Welch's t-test (two-sided), else nothing.

    Fewer than two seeds on either side say nothing.
    """
    if sense == 0 or min(len(values), len(before)) < 2:
        return ""
    means, spreads = ([of(side) for side in (values, before)] for of in (statistics.mean, statistics.stdev))
    change = means[0] - means[1]
    if max(spreads) > 0:
        sides = (means[0], spreads[0], len(values)), (means[1], spreads[1], len(before))
        differs = stats.ttest_ind_from_stats(*sides[0], *sides[1], equal_var=False).pvalue < LEVEL
    else:
        differs = change != 0
    return (BETTER if change * sense > 0 else WORSE) if differs else ""


def write_tables(folder: Path, cells: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]) -> list[dict]:
    """``ablation`` as JSON, CSV, Markdown and a figure, from the cells; returns its lines."""
    lines = summarize(cells)
    title = f"One change at a time: {BETTER} better, {WORSE} worse than the row against; {floors(cells)}"
    columns = ["row", "against", "change", "seeds", *(column.title for column in COLUMNS), "missing"]
    write_results(folder, "ablation", lines, environment, title=title, columns=columns)
    plot(folder / "ablation.png", cells, environment)
    return lines


def floors(cells: Sequence[Mapping[str, Any]]) -> str:
    """What a guess without any model reaches; the held-out text is the same for all cells."""
    measured = next((cell for cell in cells if cell["status"] == "measured"), None)
    if measured is None:
        return "nothing measured"
    guess = measured["chance"] and f", R@1 of a guess {100 * measured['chance']:.1f} %"
    return f"unigram entropy {measured['unigram_entropy']:.3f}{guess or ''}"


def plot(path: Path, cells: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]) -> None:
    """Four figures side by side: every seed a dot, the mean a bar; rows from top to bottom."""
    columns = [column for column in COLUMNS if column.key in SHOWN]
    rows = rows_of(cells)
    note = f"every seed a dot, the mean a line; {floors(cells)}; {device_of(environment)}"
    size = (11.0, 1.5 + 0.34 * len(rows))
    with canvas(path, "One change at a time", note, size=size, columns=len(columns)) as panels:
        for axes, column in zip(panels, columns, strict=True):
            for place, row in enumerate(rows):
                values = [value * column.scale for value in values_of(cells, row.name, column.key)]
                axes.plot(values, [place] * len(values), "o", color=GREY, markersize=4)
                if values:
                    axes.plot([statistics.mean(values)], [place], "|", color=BLUE, markersize=14, markeredgewidth=2.5)
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_yticks(range(len(rows)), [row.name for row in rows] if axes is panels[0] else [""] * len(rows))
            axes.tick_params(axis="y", labelsize=9, length=0, labelcolor=INK)
            axes.set_xlabel(f"{column.title} ({'more' if column.sense > 0 else 'less'} is better)", fontsize=9.5)
            axes.grid(axis="both")
