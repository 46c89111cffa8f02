"""A model fine-tuned before it is scored: a grid of learning rates, several seeds, chosen on held-out training.

Every run is one of the training engine, in a folder of its own; a run that is there is gone on with or taken as it is.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from ...engine.errors import InputError
from ...engine.labelled.task import Task
from ...engine.telemetry import read_history
from ...engine.trainer import train
from .protocol import Settings

PEER = ("model={}", "task.states_gb=null")  # what a recipe asks of a concept encoder is nothing to another encoder
FIGURES = ("accuracy", "pearson")  # of held-out examples; one of them says which learning rate is best


class Chosen(NamedTuple):
    """The runs of the best learning rate, one a seed."""

    lr: float
    folders: list[Path]
    held_out: dict[float, float]  # learning rate -> mean figure over seeds


def tuned(
    recipe: str, task: Task, model: str, settings: Settings, out: Path, rates: Sequence[float],
    overrides: Sequence[str] = (),
) -> Chosen:  # fmt: skip
    """Trains each learning rate with each seed, which also draws the part that is held out, on the splits that the
    settings name. The reported split is not opened. ``overrides``: of the recipe; PEER among them where ``model`` is
    none of this package.

    Raises:
        InputError: what `conceptron train` refuses, or a run that measured nothing on its held-out part.
    """
    figures: dict[float, list[float]] = {rate: [] for rate in rates}
    folders: dict[float, list[Path]] = {rate: [] for rate in rates}
    for rate in rates:
        for seed in range(settings.seeds):
            given = {
                "source": json.dumps(model, allow_nan=False), "task.name": task.name, "optim.lr": rate,
                "run.seed": seed, "task.fold": seed, "run.folder": json.dumps(str(out), allow_nan=False),
                "run.name": f"lr{rate:g}-seed{seed}",
                "resume": "auto",
            }  # fmt: skip
            given |= {"task.data": json.dumps(str(settings.data), allow_nan=False)} if settings.data else {}
            given |= {"task.train": json.dumps(settings.train, allow_nan=False)} if settings.train else {}
            given |= {"task.limit": settings.limit} if settings.limit else {}
            folder = train(recipe, [*(f"{name}={value}" for name, value in given.items()), *overrides])
            folders[rate].append(folder)
            figures[rate].append(held_out(folder))
    means = {rate: fmean(values) for rate, values in figures.items()}
    best = max(means, key=means.__getitem__)
    return Chosen(best, folders[best], means)


def held_out(folder: Path) -> float:
    """The last figure of a run on what it did not learn from."""
    last = [entry for entry in read_history(folder / "metrics.jsonl") if entry["kind"] == "eval"][-1]
    figure = next((last[name] for name in FIGURES if last.get(name) is not None), None)
    if figure is None:
        raise InputError(f"{folder}: its answers on held-out examples are all alike; train it longer or lower optim.lr")
    return figure
