"""An average of the weights over the steps, kept beside them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from .. import compat
from ..recipe.schema import Ema

KEY = "average"  # of a flat partition, in the optimizer's state, where checkpoints find it


class Average:
    """Of the float32 weights that this rank holds, after each applied update:

        average <- d * average + (1 - d) * weights,   d = min(decay, (1 + n) / (10 + n)) after n updates

    With ``decay`` None there is none, and nothing here does anything. It begins at the weights of the first update, or
    of the checkpoint from which a run goes on that had none. Frozen weights and buffers do not move, and have none.

    Source: Polyak & Juditsky 1992; of the short memory at the beginning: TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, engine: Any, recipe: Ema) -> None:
        self.engine, self.recipe = engine, recipe

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Takes in the weights as they are after ``num_updates`` updates, 1 after the first."""
        if self.recipe.decay is None:
            return
        decay = min(self.recipe.decay, (1 + num_updates) / (10 + num_updates))
        for flat in compat.partitions(self.engine):
            state = self.engine.optimizer.optimizer.state[flat]
            if KEY in state:
                state[KEY].lerp_(flat, 1 - decay)
            else:
                state[KEY] = flat.detach().clone()

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        """The model has its average weights inside, where the recipe wants them used; collective. What is raised inside
        ends the run, so nothing is put back then."""
        is_swapped = self.recipe.decay is not None and self.recipe.use
        if is_swapped:
            self._swap()
        yield
        if is_swapped:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """By value: bit by bit what was there comes back. Before the first applied update there is nothing to swap."""
        for flat in compat.partitions(self.engine):
            average = self.engine.optimizer.optimizer.state[flat].get(KEY)
            if average is not None:
                weights = flat.detach().clone()
                flat.copy_(average)
                average.copy_(weights)
        compat.spread(self.engine)
