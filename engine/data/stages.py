"""Longer and longer windows: the steps of a run, each from the loader of its stage."""

from collections.abc import Iterator, Sequence
from typing import Any

from .loader import Batches, prefetch
from .stream import Streamed


class Stages:
    """Loaders of the same text cut into different windows, one after the other. A pure function of the step as well.

    Each stage begins to read its windows anew, in an order of its own.
    """

    def __init__(self, loaders: Sequence[Batches | Streamed]) -> None:
        """``loaders``: by rising ``first_step``, which is 0 in the first."""
        self.loaders = tuple(loaders)

    def at(self, step: int) -> Batches:
        return next(loader for loader in reversed(self.loaders) if loader.first_step <= step).at(step)

    def step(self, step: int) -> list[Any]:
        return self.at(step).step(step)

    def prefetch(self, start: int, stop: int) -> Iterator[list[Any]]:
        return prefetch(self.step, start, stop)

    def windows(self, step: int) -> list[int]:
        """The numbers of the windows of a step, over all ranks, among those of its stage."""
        return self.at(step).samples(step).windows.tolist()

    def num_tokens(self, step: int) -> int:
        """Tokens of a step, over all ranks."""
        loader = self.at(step)
        return int(loader.windows.lengths[loader.samples(step).windows].sum())
