"""The figures of a downstream table, drawn from its result files alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..figures.plot import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, canvas, length_axis
from ..measure.environment import device_of
from ..measure.results import read_results

SUFFIXES = ("png", "svg")
MARKS = {  # row -> marker, colour
    "majority": ("|", GREY), "first option": ("|", GREY), "first words": ("|", GREY), "BM25": ("x", ORANGE),
    "bag of embeddings": ("^", GREEN), "untrained encoder": ("v", PURPLE), "concepts zeroed": ("1", INK),
    "concepts shuffled": ("2", INK),
}  # fmt: skip
MODELS = ("concepts", "encoder")
BESIDE = " (beside)"  # behind the name of another model


def draw(folder: Path) -> None:
    rows, environment = read_results(folder / "downstream.json")
    for suffix in SUFFIXES:
        plot_scores(folder / f"downstream.{suffix}", rows, f"{environment['model']}; {device_of(environment)}")
    if (folder / "places.json").exists():
        places, _ = read_results(folder / "places.json")
        for suffix in SUFFIXES:
            plot_places(folder / f"places.{suffix}", places)


def plot_scores(path: Path, rows: Sequence[dict[str, Any]], note: str) -> None:
    """One line a task: the model with its interval, and what it is held against."""
    metrics = metrics_of(rows)
    tasks = list(metrics)
    labels = [f"{task}  ({metric})" for task, metric in metrics.items()]
    note = f"{note}; bars: 95 % of the bootstrap; quoted: published, on other data"
    with canvas(path, "Downstream scores, in percent", note, size=(9.6, 1.9 + 0.36 * len(tasks))) as (axes,):
        for row in rows:
            y, score = tasks.index(row["task"]), row.get("score")
            if score is None or row["metric"] != metrics[row["task"]]:  # a quoted one may be of another metric
                continue
            if row["row"] in MODELS:
                low, high = row.get("low") or score, row.get("high") or score
                axes.plot([low, high], [y, y], color=BLUE, linewidth=5, alpha=0.35, solid_capstyle="butt")
                axes.plot(score, y, "o", color=BLUE, markersize=7, label="this model", zorder=3)
            elif row["row"].endswith(BESIDE):
                axes.plot(score, y, "s", markerfacecolor="none", color=INK, markersize=7,
                          label=row["row"].removesuffix(BESIDE))
            elif row["row"] in MARKS:
                marker, colour = MARKS[row["row"]]
                axes.plot(score, y, marker=marker, color=colour, markersize=7, label=row["row"], linestyle="none")
            elif row["row"].endswith("(quoted)"):
                axes.plot(score, y, "D", markerfacecolor="none", color=GREY, markersize=5, label="quoted")
        axes.set_yticks(range(len(tasks)), labels)
        axes.set_ylim(len(tasks) - 0.4, -0.6)
        axes.grid(True, axis="x")
        found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.figure.legend(found.values(), found, loc="outside lower center", ncols=5, fontsize=9)


def metrics_of(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Task -> the metric of its line, which is that of the model's row."""
    found: dict[str, str] = {}
    for row in rows:
        found.setdefault(row["task"], row["metric"])
    return found


def plot_places(path: Path, places: Sequence[dict[str, Any]]) -> None:
    """Left: accuracy against length, a line each task. Right: against depth, where a task has one."""
    tasks = list(dict.fromkeys(row["task"] for row in places))
    colours = dict(zip(tasks, (BLUE, ORANGE, GREEN, PURPLE, GREY), strict=False))
    deep = [row for row in places if row["depth"] != "all"]
    with canvas(path, "Synthetic tasks", "accuracy in percent; left: by words of the text, right: by depth, over all "
                "lengths", size=(10.4, 4.3), columns=2) as (left, right):  # fmt: skip
        for task in tasks:
            mine = [row for row in places if row["task"] == task and row["depth"] == "all"]
            left.plot([row["length"] for row in mine], [row["accuracy"] for row in mine], "o-", color=colours[task],
                      label=task)  # fmt: skip
            depths = sorted({row["depth"] for row in deep if row["task"] == task}, key=lambda text: int(text[:-1]))
            means = []
            for depth in depths:
                some = [row for row in deep if row["task"] == task and row["depth"] == depth]
                means.append(sum(r["accuracy"] * r["examples"] for r in some) / sum(r["examples"] for r in some))
            if depths:
                right.plot(depths, means, "o-", color=colours[task])
        for axes in (left, right):
            axes.set_ylim(-3, 103)
        length_axis(left, [row["length"] for row in places])
        left.set_xlabel("words of the text")
        right.set_xlabel("where in the text the sentence stands")
        left.legend(fontsize=9)
