"""The order of one source: its windows dealt into bins of a fixed number of tokens, anew in every epoch."""

from typing import NamedTuple

import numpy as np

from .windows import Windows

JITTER = 0.5  # by how much of itself a length is disguised when an epoch is dealt: enough to mix, and to stay balanced
ATTEMPTS = 4
SPARE = 100  # one bin more for so many, so that a disguised deal fits as well


class Samples(NamedTuple):
    """Windows in the order of training, [n] each."""

    windows: np.ndarray  # numbers in `Windows`
    epochs: np.ndarray  # of the window's source
    places: np.ndarray  # in that epoch's order; the windows of several sources are numbered one after the other

    def take(self, rows: np.ndarray) -> "Samples":
        return Samples(*(column[rows] for column in self))


class Epoch(NamedTuple):
    """One pass over a source. Bin b holds the windows ``order[starts[b] : starts[b + 1]]``."""

    order: np.ndarray  # [n] int64
    starts: np.ndarray  # [num_bins + 1] int64


class Stream:
    """An endless row of bins of one source, in which every epoch holds each window once.

    All epochs have the same number of bins, so bin ``number`` belongs to epoch ``number // num_bins``. The plan of an
    epoch costs O(n log n) for n windows; the last two are kept.
    """

    def __init__(self, windows: Windows, part: int, capacity: int, seed: int) -> None:
        self.first = int(windows.bounds[part])
        self.lengths = windows.lengths[self.first : windows.bounds[part + 1]].astype(np.int64)
        self.part, self.capacity, self.seed = part, capacity, seed
        self.num_bins = fewest_bins(self.lengths, capacity)
        self.num_bins = min(len(self.lengths), self.num_bins + self.num_bins // SPARE)
        self._epochs: dict[int, Epoch] = {}

    def bin(self, number: int) -> Samples:
        epoch, which = divmod(number, self.num_bins)
        known = self._epochs  # another thread may put a new dictionary in its place, but never changes this one
        if epoch not in known:
            known = self._epochs = {**dict(list(known.items())[-1:]), epoch: self._plan(epoch)}
        order, starts = known[epoch]
        places = np.arange(starts[which], starts[which + 1])
        return Samples(self.first + order[places], np.full(len(places), epoch), self.first + places)

    def _plan(self, epoch: int) -> Epoch:
        """Deals the windows in an order that is longest first only roughly, so that other ones meet in every epoch."""
        for attempt in range(ATTEMPTS + 1):
            # the last attempt is strictly by length, which is how `fewest_bins` made sure that everything fits
            jitter = JITTER if attempt < ATTEMPTS else 0.0
            random = raw(self.seed, len(self.lengths), epoch, self.part, attempt)
            disguised = self.lengths * (1.0 - jitter * (random >> 11) * 2.0**-53)
            bins, loads = deal(self.lengths, self.num_bins, np.lexsort((random, -disguised)))
            if loads.max() <= self.capacity:
                break
        shuffle = np.argsort(raw(self.seed, self.num_bins, epoch, self.part, ATTEMPTS + 1), kind="stable")
        place = np.empty_like(shuffle)
        place[shuffle] = np.arange(self.num_bins)
        bins = place[bins]
        return Epoch(np.argsort(bins, kind="stable"), np.searchsorted(np.sort(bins), np.arange(self.num_bins + 1)))


def deal(lengths: np.ndarray, num_bins: int, order: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Deals windows like cards, so that all bins end with nearly equal numbers of tokens.

    In every round those bins get one window each that are not yet a whole window ahead of the emptiest, the emptiest
    the longest. (One at a time this would be the LPT rule of Graham, 1969; by rounds it needs few steps of numpy.)

    Args:
        lengths: [n] tokens of each window.
        num_bins: how many bins.
        order: [n] in which order they are dealt; None: longest first.

    Returns:
        bins [n] int64, the bin of each window, and loads [num_bins] int64, the tokens in each bin.
    """
    lengths = lengths.astype(np.int64)
    order = np.argsort(-lengths, kind="stable") if order is None else order
    bins, loads = np.empty(len(lengths), dtype=np.int64), np.zeros(num_bins, dtype=np.int64)
    start = 0
    while start < len(order):
        behind = np.flatnonzero(loads < loads.min() + lengths[order[start]])
        cards = order[start : start + len(behind)]
        cards = cards[np.argsort(-lengths[cards], kind="stable")]
        emptiest = behind[np.argsort(loads[behind], kind="stable")[: len(cards)]]
        bins[cards] = emptiest
        loads[emptiest] += lengths[cards]
        start += len(cards)
    return bins, loads


def deal_by_length(lengths: np.ndarray, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """The same for bins of windows of similar lengths: the longest windows are in the first, the shortest in the last.

    A bin holds at most its equal share of the tokens and one window more.
    """
    lengths = lengths.astype(np.int64)
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    bins, loads = np.empty(len(lengths), dtype=np.int64), np.zeros(num_bins, dtype=np.int64)
    # the bin in which a window's middle lies, of tokens cut into equal shares
    bins[order] = (2 * ends - lengths[order]) * num_bins // (2 * max(1, int(ends[-1]) if len(ends) else 1))
    np.add.at(loads, bins, lengths)
    return bins, loads


def fewest_bins(lengths: np.ndarray, capacity: int) -> int:
    """About the smallest number of bins for which a deal, longest first, puts at most ``capacity`` into each."""
    num_bins = -(-int(lengths.sum(dtype=np.int64)) // capacity)
    while num_bins < len(lengths):
        fullest = int(deal(lengths, num_bins)[1].max())
        if fullest <= capacity:
            break
        num_bins = max(num_bins + 1, num_bins * fullest // capacity)
    return min(num_bins, len(lengths))


def raw(seed: int, count: int, *stream: int) -> np.ndarray:
    """[count] uint64 from Philox: the same on every machine and in every version of numpy."""
    words = np.random.SeedSequence((seed, *stream)).generate_state(2, np.uint64)
    return np.random.Philox(key=words).random_raw(count)
