"""Several objectives in one run: each step belongs to one of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from ..packing import Packed
from ..ranges import LEAST, is_number
from .view import SampleKey, SpecialTokens, View, build_view, check_option, clean_text

ROOT = 2**0.5 - 1  # frac(k * ROOT) fills [0, 1) as evenly as the golden ratio, which times use, and independently of it


@dataclass(frozen=True)
class Mixed:
    """Step k is trained on the part into whose share of [0, 1) the number frac(k * (sqrt(2) - 1)) falls.

    Any run of n steps holds each part n times its share, but for a few: with two equal parts they nearly take turns.
    All ranks and micro-batches of a step have the same part.
    """

    parts: tuple[Any, ...]  # objectives
    weights: tuple[float, ...]
    names: tuple[str, ...]  # all different

    def __post_init__(self):
        check_option("parts", self.parts, "at least two objectives", len(self.parts) >= 2)
        holds = len(self.parts) == len(self.weights) == len(self.names)
        holds = holds and all(is_number(weight, LEAST) for weight in self.weights)
        check_option("weights", self.weights, "a number above 0 for each part", holds)
        check_option("names", self.names, "another name for each part", len(set(self.names)) == len(self.parts))

    def place(self, step: int) -> int:
        """The number of the part that ``step``, counted from 0, is trained on."""
        aim = (step + 0.5) * ROOT % 1.0 * sum(self.weights)
        ends = list(accumulate(self.weights))
        return next((i for i, end in enumerate(ends) if aim < end), len(ends) - 1)

    def at(self, step: int) -> Any:
        return self.parts[self.place(step)]

    def evaluation_views(self, batch: Packed, keys: Sequence[SampleKey], tokens: SpecialTokens) -> dict[str, View]:
        """Those of every part, as "part/view"."""
        return {
            f"{name}/{view}": made
            for name, part in zip(self.names, self.parts, strict=True)
            for view, made in part.evaluation_views(batch, keys, tokens).items()
        }


@dataclass(frozen=True)
class NoTask:
    """Nothing is predicted, and no decoder is trained: a contrastive loss is all there is."""

    def view(self, batch: Packed, keys: Sequence[SampleKey], tokens: SpecialTokens) -> View:
        """The whole text for the encoder, and no target."""
        nothing = np.zeros(0, dtype=np.int64)
        return build_view(
            encoder=batch, text=clean_text(batch, keys, tokens), rows=nothing, decoder_ids=nothing, weights=nothing,
            seen=nothing, timesteps=None, divisor=0.0,
        )  # fmt: skip

    def evaluation_views(self, batch: Packed, keys: Sequence[SampleKey], tokens: SpecialTokens) -> dict[str, View]:
        """None."""
        return {}
