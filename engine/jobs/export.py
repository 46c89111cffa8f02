"""A model folder from a checkpoint of a run, also of one that is still training."""

import argparse
from pathlib import Path
from typing import Any

from ..checkpoints import checkpoint
from ..checkpoints.retention import best_step
from ..errors import InputError
from ..launching import launch
from ..launching.launch import World
from ..optimizing import ema
from ..recipe.load import load_recipe
from ..telemetry import read_history
from .pretraining import PretrainingJob


def export_step(
    run: Path, step: int | None, out: Path, world: World, is_average: bool = False
) -> tuple[Path, int]:  # fmt: skip
    """Writes what the run's weights were after ``step`` (None: in its newest valid checkpoint) as a model folder.

    ``is_average``: their average instead, of a run with ``ema.decay``. Returns the folder and the step.

    Raises:
        InputError: no such run or checkpoint, it is damaged, or has no averages.
    """
    recipe_file, saved = run / "recipe.yaml", run / "checkpoints"
    if not recipe_file.is_file():
        raise InputError(f"{run}: no recipe.yaml, so this is no run folder; give runs/NAME")
    if step is None:
        folder, _ = checkpoint.find(world, saved)
    else:
        folder = saved / f"step-{step:08d}"
    kept = sorted(checkpoint.step_of(each) for each in checkpoint.list_checkpoints(saved))
    if folder is None or not folder.is_dir():
        there = f"there are {', '.join(map(str, kept))}" if kept else "there is no checkpoint"
        raise InputError(f"--step: {saved} has no step {step}; {there}" if step is not None else f"{saved}: {there}")
    if fault := checkpoint.verify(folder):
        raise InputError(f"{folder}: {fault}; choose another --step of {', '.join(map(str, kept))}")
    job = PretrainingJob(load_recipe(recipe_file), world)
    module = job.build(is_new=False)
    if is_average and not checkpoint.has(folder, ema.KEY):
        raise InputError(f"--average: {folder} has no averaged weights; leave it out, or train with ema.decay")
    checkpoint.load_weights(folder, module, ema.KEY if is_average else checkpoint.WEIGHT)
    progress, of = checkpoint.load_progress(folder), job.recipe.ema
    if is_average == (of.decay is not None and of.use):  # else they are figures of other weights
        job.figures = figures_at(run / "metrics.jsonl", progress.step)
    return job.export(module, out), progress.step


def figures_at(file: Path, step: int) -> dict[str, Any]:
    """Of the evaluation after this very step; empty if there was none."""
    found = [record for record in read_history(file) if record["kind"] == "eval" and record["step"] == step]
    return {name: value for name, value in found[-1].items() if name not in ("kind", "step")} if found else {}


def main(options: argparse.Namespace) -> None:
    """The command line."""
    step = options.step
    if options.best:
        if step is not None:
            raise InputError("--best: expected without --step: it chooses the step itself")
        step = best_step(options.run / "checkpoints")
    named = "best" if options.best else "newest" if step is None else str(step)
    out = options.out or options.run / f"model-{named}{'-average' if options.average else ''}"
    with launch.world() as world:
        folder, step = export_step(options.run, step, out, world, options.average)
        if world.is_first:
            print(f"step {step} of {options.run}: the model is in {folder}")
