"""Which source feeds which part of a step."""

from collections.abc import Sequence

import numpy as np

PERIOD = 1000  # slots after which the schedule repeats; weights are kept to one part in this many
ROOM = 4  # a slot of a mixture has room for this many of the longest windows, where the step allows it
MOST_SLOTS = 64


class Schedule:
    """Cuts steps into slots of equal size and gives each slot to a source, in proportion to the weights.

    In any run of slots every source has its share to within about one slot. With one source, a step is one slot.
    """

    def __init__(self, weights: Sequence[float], windows_per_step: int) -> None:
        """
        Args:
            weights: of the sources, in any unit.
            windows_per_step: how many of the longest windows a step has room for.
        """
        num_sources = len(weights)
        self.slots_per_step = 1 if num_sources == 1 else min(MOST_SLOTS, max(1, windows_per_step // ROOM))
        share = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        quota = np.maximum(1, np.floor(share * PERIOD)).astype(np.int64)
        by_remainder = np.argsort(-(share * PERIOD - quota), kind="stable")
        quota[by_remainder[: max(0, PERIOD - quota.sum())]] += 1
        # source s takes its k-th slot at time (k + 1/2) / quota[s]
        sources = np.repeat(np.arange(num_sources), quota)
        times = np.concatenate([(np.arange(count) + 0.5) / count for count in quota])
        self.sources = sources[np.lexsort((sources, times))]  # [period]
        self.quota = quota  # [num_sources] slots of a period
        self.shares = quota / quota.sum()
        taken = self.sources[:, None] == np.arange(num_sources)
        self.before = np.cumsum(taken, axis=0) - taken  # [period, num_sources] slots taken earlier in the period

    def slots(self, step: int) -> list[tuple[int, int]]:
        """(source, how many slots it had before) of each slot of a step."""
        found = []
        for slot in range(step * self.slots_per_step, (step + 1) * self.slots_per_step):
            period, place = divmod(slot, len(self.sources))
            source = int(self.sources[place])
            found.append((source, int(period * self.quota[source] + self.before[place, source])))
        return found
