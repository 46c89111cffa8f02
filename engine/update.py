"""One update of the weights: all micro-batches of a step, forward and backward, then the optimizer."""

from typing import Any

import numpy as np
import torch

from ..models.objectives.view import View
from ..models.pretraining import Cached, Totals, cache
from ..models.recursion import draw_iterations
from .launch import StopRequest, World
from .recipe.schema import Recipe


def update(
    engine: Any, world: World, recipe: Recipe, step: int, views: list[View], lr: float, stop: StopRequest
) -> tuple[dict[str, float], bool]:
    """This rank's micro-batches ``views`` of a step, forward and backward, then one step of the optimizer. Collective.

        loss = sum of weight * nll over the targets of all ranks and micro-batches, / sum of their divisors
               + what is added to the task, each also a mean over all texts of the step

    DeepSpeed averages gradients over ranks and adds them up over micro-batches, which `Totals` is made for.
    Returns the figures of the step for the log, "loss" among them, and whether any rank wants to stop.
    """
    views = [view.to(world.device, non_blocking=True) for view in views]
    totals = Totals.of(views, world.sum, world.size)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    num_iterations = draw_iterations(engine.module.model.config, (recipe.run.seed, step))
    ahead = look_ahead(engine, world, recipe, step, views, totals, num_iterations)
    sums: dict[str, torch.Tensor] = {}
    for i, view in enumerate(views):
        torch.manual_seed(dropout_seed(recipe.run.seed, step, i, world.rank))
        engine.set_gradient_accumulation_boundary(i == len(views) - 1)
        output = engine(
            view=view, totals=totals, step=step, label_smoothing=recipe.train.label_smoothing,
            num_iterations=num_iterations, cached=ahead[i],
        )  # fmt: skip
        engine.backward(output.loss)
        figures = dict(output.figures)
        if engine.module.cap_scale is not None:
            figures["cap_scale"] = engine.module.cap_scale / len(views)
        for name, figure in figures.items():
            sums[name] = sums.get(name, 0) + figure.double() / world.size
    engine.step()
    sums["stopping"] = torch.tensor(float(stop.pending), dtype=torch.float64, device=world.device)
    values = dict(zip(sums, world.sum(torch.stack(list(sums.values()))).tolist(), strict=True))
    is_stopping = values.pop("stopping") > 0
    return values, is_stopping


def look_ahead(
    engine: Any, world: World, recipe: Recipe, step: int, views: list[View], totals: Totals, num_iterations: int | None
) -> list[Cached | None]:
    """The gradient of a contrastive loss over all micro-batches, for each, if there are several. Collective."""
    contrastive = engine.module.contrastive
    pairs = [view.pair for view in views]
    if contrastive is None or contrastive.negatives != "step" or len(views) == 1 or pairs[0] is None:
        return [None] * len(views)
    compared = []
    with torch.no_grad():
        for i, view in enumerate(views):
            torch.manual_seed(dropout_seed(recipe.run.seed, step, i, world.rank))
            compared.append(engine(pair=view.pair, encoder=view.encoder, num_iterations=num_iterations))
    return cache(compared, [pair.ids for pair in pairs], contrastive, totals)


def dropout_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """Dropout as a pure function of the step, so that there is no generator state to save."""
    return int(np.random.SeedSequence((seed, step, micro_batch, rank)).generate_state(1, np.uint64)[0] >> 1)
