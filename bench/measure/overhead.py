"""What the engine adds to a step: the trainer's update beside a bare loop of torch, on two models of one recipe."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ...engine.jobs.job import Job
from ...engine.meter import synchronize
from ...engine.optimizing.optimizer import build_optimizer
from ...engine.recipe.schema import Training


class Bare:
    """A module and an optimizer, with what a job asks of an engine, and nothing between them."""

    def __init__(self, module: nn.Module, recipe: Training, device: torch.device) -> None:
        self.module, self.device = module, device
        self.optimizer = build_optimizer(self.module, recipe.optim)
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.clip, self.is_bf16 = recipe.optim.clip, recipe.train.precision == "bf16"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bf16):
            return self.module(*args, **kwargs)

    def step(self, job: Job, step: int, batches: list[Any], lr: float) -> float:
        """The update of a loop that somebody writes in an hour: forward, backward, clip, step. Returns the loss."""
        batches = [batch.to(self.device, non_blocking=True) for batch in batches]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = 0.0
        for given in job.prepare(self, step, batches, range(len(batches))):
            loss = job.loss(self, given).loss
            loss.backward()
            total += loss.detach()
        if self.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total)


def overhead(
    bare: Bare, job: Job, lr: float, steps: Iterable[tuple[int, list[Any]]],
    engine_step: Callable[[int, list[Any]], Any],
) -> dict[str, float]:  # fmt: skip
    """Takes every step twice, with the engine and with ``bare``, in turn and each first as often as the other.

    Returns the median milliseconds of both, and by which share the engine's is longer.
    """
    seconds: dict[str, list[float]] = {"engine": [], "bare": []}
    calls = {"engine": engine_step, "bare": lambda step, batches: bare.step(job, step, batches, lr)}
    for step, batches in steps:
        for name in ("engine", "bare") if step % 2 else ("bare", "engine"):
            synchronize(bare.device)
            start = time.perf_counter()
            calls[name](step, batches)
            synchronize(bare.device)
            seconds[name].append(time.perf_counter() - start)
    ms = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
    return {"step_alone_ms": ms["engine"], "bare_step_ms": ms["bare"], "engine_overhead": ms["engine"] / ms["bare"] - 1}
