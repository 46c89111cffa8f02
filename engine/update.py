"""One update of the weights: all micro-batches of a step, forward and backward, then the optimizer."""

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch

from ..models.parts import part_of
from . import compat
from .failures.spikes import Spikes
from .jobs.job import Job
from .launching.launch import World
from .optimizing import muon


def update(
    engine: Any, world: World, job: Job, step: int, batches: list[Any], *, lr: float, seed: int,
    asks: Callable[[], Mapping[str, bool]] = dict, spikes: Spikes | None = None,
    lap: Callable[[str], None] = lambda phase: None,
) -> tuple[dict[str, float], dict[str, int]]:  # fmt: skip
    """This rank's micro-batches of a step, forward and backward, then one step of the optimizer. Collective.

    A group of parameters with an "lr_ratio" takes that times ``lr``; beside Muon ``clip`` of `muon.py` clips.
    DeepSpeed averages gradients over ranks and adds them up over micro-batches, which a job's losses are made for.

    Args:
        seed: of the run; dropout is a function of it and of the step.
        asks: what this rank asks for at the end of the step, under the same names on every rank.
        spikes: attached to the engine's optimizer, told the loss before that is asked to step.
        lap: told at the end of each phase which it was: "data", then "forward" and "backward" of each micro-batch,
            "optimizer" last. What a job does ahead of a step's micro-batches is forward.

    Returns the figures of the step for the log, and how many ranks ask for what. Among the figures are "loss",
    "grad_norms/..." of each part, before clipping, and "flops" of one rank, where the job counts them.
    """
    batches = [batch.to(world.device, non_blocking=True) for batch in batches]
    lap("data")
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    seeds = [dropout_seed(seed, step, i, world.data_rank) for i in range(len(batches))]
    given = job.prepare(engine, step, batches, seeds)
    sums: dict[str, torch.Tensor] = {}
    if (flops := job.flops(engine, batches)) is not None:
        sums["flops"] = torch.tensor(flops / world.size, dtype=torch.float64, device=world.device)
    for i, of_batch in enumerate(given):
        torch.manual_seed(seeds[i])
        engine.set_gradient_accumulation_boundary(i == len(given) - 1)
        loss, figures = job.loss(engine, of_batch)
        lap("forward")
        engine.backward(loss)
        lap("backward")
        for name, figure in {**figures, **job.after_backward(engine, len(given))}.items():
            sums[name] = sums.get(name, 0) + figure.double() / world.size
    squares = squares_by_part(engine)
    sums |= squares
    for name, norm in muon.clip(engine, world).items():
        sums[name] = norm / world.size
    asked = asks()
    votes = [torch.tensor(float(each), dtype=torch.float64, device=world.device) for each in asked.values()]
    values = world.sum(torch.stack([*sums.values(), *votes])).tolist()
    figures = dict(zip(sums, values[: len(sums)], strict=True))
    figures |= {name: math.sqrt(figures[name]) for name in squares}
    counts = dict(zip(asked, map(int, values[len(sums) :]), strict=True))
    if spikes:
        spikes.expect(step + 1, str(job.labels(step).get("objective", "")), figures["loss"], figures.get("grad_norm"))
    engine.step()
    lap("optimizer")
    return figures, counts


def squares_by_part(engine: Any) -> dict[str, torch.Tensor]:
    """"grad_norms/PART" -> 0-d float64: this rank's share of the squared norm of each part's gradient, the same parts
    on every rank; nothing where the optimizer is offloaded."""
    found = compat.gradient_norms(engine)
    if found is None:
        return {}
    names, norms = found
    places, device = trained_parts(engine)
    squares = torch.zeros(len(places), dtype=torch.float64, device=device)
    if names:
        owners = torch.tensor([places[title(name)] for name in names], device=device)
        squares.index_add_(0, owners, torch.stack(norms).double().square())
    return dict(zip(places, squares.unbind(), strict=True))


@compat.once_per_engine
def trained_parts(engine: Any) -> tuple[dict[str, int], torch.device]:
    """The parts that are trained, numbered, and the device of the first."""
    trained = {title(name): p.device for name, p in engine.module.named_parameters() if p.requires_grad}
    return {part: i for i, part in enumerate(trained)}, next(iter(trained.values()))


@cache
def title(name: str) -> str:
    """Of the part that a parameter belongs to; what is only there to train a model is called as its module is."""
    name = name.removeprefix("model.")
    return f"grad_norms/{part_of(name) or name.partition('.')[0]}"


def dropout_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """Dropout as a pure function of the step, so that there is no generator state to save."""
    return int(np.random.SeedSequence((seed, step, micro_batch, rank)).generate_state(1, np.uint64)[0] >> 1)
