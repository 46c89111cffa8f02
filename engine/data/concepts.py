"""How many concepts the texts of a micro-batch are read into, where that is not the same for all of a run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STREAM = 0x72  # keeps these draws apart from others of (seed, step)


@dataclass(frozen=True)
class Drawn:
    """C = N / r, with an r of ``ratios`` that each step draws anew.

    r is a function of (seed, step), so it is the same on every rank, for all micro-batches of a step, and in a resumed
    run. N is the longest text of the micro-batch.
    """

    ratios: tuple[float, ...]  # tokens per concept, at least 1
    most: int
    seed: int

    def ratio(self, step: int) -> float:
        if len(self.ratios) == 1:
            return self.ratios[0]
        sequence = np.random.SeedSequence((self.seed, step, STREAM))
        return self.ratios[np.random.Generator(np.random.Philox(sequence)).integers(len(self.ratios))]

    def at(self, step: int, longest: int) -> int:
        return fitting(longest, self.ratio(step), self.most)


@dataclass(frozen=True)
class Fixed:
    """The same C in every step, such as that of a stage."""

    count: int

    def at(self, step: int, longest: int) -> int:
        return self.count


def fitting(num_tokens: int, ratio: float, most: int) -> int:
    """C of a text of N tokens: one for so many of them, rounded up, from 1 to ``most``."""
    return max(1, min(most, math.ceil(num_tokens / ratio)))


def largest(windows: Sequence[int], ratios: Sequence[float]) -> int:
    """The largest C that such texts ask for."""
    return fitting(max(windows), min(ratios), max(windows))
