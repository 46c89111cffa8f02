"""Which checkpoints stay: the newest, those of every so many steps, and that of the best evaluation.

    RUN/checkpoints/best.json    metric, value, step and folder of the best one, where a run keeps it
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import write_json

LOWER = ("loss", "nll_unseen", "nll_seen", "contrastive", "state_error")  # figures of an evaluation; less is better
HIGHER = ("retrieval", "alignment", "alignment_of_stretches", "accuracy", "pearson")
METRICS = LOWER + HIGHER
MANIFEST, BEST = "MANIFEST.json", "best.json"


class Retention(NamedTuple):
    last: int  # the newest so many stay
    every: int = 0  # and those of steps that are multiples of it; 0: no others
    best: str | None = None  # and that of the best evaluation by this metric

    def improved(self, before: dict[str, Any], step: int, figures: dict[str, Any]) -> dict[str, Any]:
        """What is best after an evaluation: ``before`` itself, or a new record. Only a finite figure can be better."""
        value = figures.get(self.best) if self.best else None
        if value is None or not math.isfinite(value):
            return before
        sign = 1 if self.best in LOWER else -1
        if before and before["metric"] == self.best and sign * before["value"] <= sign * value:
            return before
        return {"metric": self.best, "value": value, "step": step}

    def apply(self, folders: Sequence[Path], best: dict[str, Any]) -> None:
        """Removes what need not stay. ``folders``: every checkpoint, newest first. ``best``: of the newest; or {}."""
        parent = folders[0].parent
        if best and (named := [folder for folder in folders if step_of(folder) == best["step"]]):
            write_json(parent / BEST, {**best, "checkpoint": named[0].name})
        kept = best_step(parent) if self.best and (parent / BEST).is_file() else None
        for old in folders[self.last :]:
            step = step_of(old)
            if step == kept or (self.every and step % self.every == 0):
                continue
            (old / MANIFEST).unlink(missing_ok=True)  # first, so that half a folder is never taken for a checkpoint
            shutil.rmtree(old)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def best_step(parent: Path) -> int:
    """
    Raises:
        InputError: no checkpoint there is known to be the best.
    """
    file = parent / BEST
    if not file.is_file():
        raise InputError(f"--best: {file} is not there: the run was not told to keep one (checkpoint.keep_best)")
    try:
        return int(json.loads(file.read_text())["step"])
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise InputError(f"--best: {file}: damaged ({type(error).__name__}); use --step") from error
