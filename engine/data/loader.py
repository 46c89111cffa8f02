"""The order of training: which windows make up which step, and whose micro-batch they belong to.

Everything here is a pure function of (seed, step), so the whole state of the data is one integer, and what a step
trains on does not depend on the number of ranks or the size of a micro-batch.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch

from ...models.objectives import Contrastive, Lesson, Mixed, Pair, SampleKey, SpecialTokens, View
from ...models.packing import Packed, pack_flat, positions_within
from ..errors import InputError
from .concepts import Drawn, Fixed
from .lessons import Lessons
from .mixture import Schedule
from .order import Samples, Stream, deal, deal_by_length, fewest_bins, raw
from .states import StateStore
from .windows import Windows

EVALUATION_SEED = 0


class Batches:
    """Deals windows to the micro-batches of each step; a subclass says in `batch` what a micro-batch is.

    A step holds at most ``tokens_per_step`` tokens over all ranks, and every window of a source is in exactly one step
    of each of its epochs. Windows are dealt to steps like cards, longest first, so all steps of all epochs have nearly
    the same number of tokens, and no short step is left at the end of an epoch.

    Within a step, windows are dealt in the same way to ``world_size * num_micro_batches`` micro-batches. These hold
    about ``micro_tokens`` tokens, and never more than ``micro_tokens`` plus the longest window; some may be empty when
    the text is small.
    """

    def __init__(
        self, windows: Windows, *, seed: int, tokens_per_step: int, micro_tokens: int, rank: int = 0,
        world_size: int = 1, first_step: int = 0, by_length: bool = False,
    ) -> None:  # fmt: skip
        """
        Args:
            windows: what to read.
            seed: decides the order, and with it everything random in the batches.
            tokens_per_step: budget of one optimizer step, all ranks together.
            micro_tokens: budget of one forward and backward pass on one rank.
            rank, world_size: this process among those that share the step.
            first_step: of the run in which the order of these windows begins.
            by_length: micro-batches of a step hold windows of similar lengths, the longest first; a step holds the
                same windows either way.

        Raises:
            InputError: a budget is smaller than the longest window.
        """
        longest = int(windows.lengths.max())
        for field, budget in (("batch.tokens", tokens_per_step), ("batch.micro_tokens", micro_tokens)):
            if budget < longest:
                raise InputError(
                    f"{field}: expected room for the longest window, {longest} tokens, got {budget}; "
                    f"raise {field} or lower data.window"
                )
        self.windows, self.seed = windows, seed
        self.tokens_per_step, self.micro_tokens = tokens_per_step, micro_tokens
        self.rank, self.world_size, self.first_step = rank, world_size, first_step
        self.share = deal_by_length if by_length else deal  # of a step's windows among micro-batches
        self.num_micro_batches = -(-tokens_per_step // (world_size * micro_tokens))  # of one rank, in every step

    def at(self, step: int) -> Self:
        """The loader of a step of the run."""
        return self

    def batch(self, step: int, samples: Samples) -> Any:
        """The micro-batch of these windows, on the CPU."""
        raise NotImplementedError

    def step(self, step: int) -> list[Any]:
        """This rank's micro-batches of a step of the run (counted from 0), in any order of asking."""
        samples = self.samples(step)
        bins, _ = self.share(self.windows.lengths[samples.windows], self.num_micro_batches * self.world_size)
        mine = [np.flatnonzero(bins == i * self.world_size + self.rank) for i in range(self.num_micro_batches)]
        return [self.batch(step, samples.take(rows)) for rows in mine]

    def prefetch(self, start: int, stop: int) -> Iterator[list[Any]]:
        """``step(start)``, ..., ``step(stop - 1)``, made ahead by a thread."""
        return prefetch(self.step, start, stop)

    def samples(self, step: int) -> Samples:
        """The windows of a step over all ranks, with their keys."""
        slots = self._schedule.slots(step - self.first_step)
        bins = [self._streams[source].bin(number) for source, number in slots]
        return Samples(*(np.concatenate(columns) for columns in zip(*bins, strict=True)))

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which as many windows pass as there are (with several sources: by weight, not each once)."""
        return -(-sum(stream.num_bins for stream in self._streams) // self._schedule.slots_per_step)

    @property
    def steps_without_repeat(self) -> int:
        """Steps in which no window passes a second time. With one source all have passed then, with several nearly."""
        schedule = self._schedule
        per_step = schedule.shares * schedule.slots_per_step
        return min(int(stream.num_bins / share) for stream, share in zip(self._streams, per_step, strict=True))

    @property
    def efficiency(self) -> float:
        """Tokens of an average step over its budget."""
        full = [stream.lengths.sum() / (stream.num_bins * stream.capacity) for stream in self._streams]
        return float(np.dot(self._schedule.shares, full))

    def evaluation_rows(self, max_tokens: int) -> np.ndarray:
        """The windows an evaluation reads: the first of a fixed shuffle, up to ``max_tokens``, at least one.

        They depend on nothing but the windows, so that runs with different seeds are compared on the same text.
        """
        order = np.argsort(raw(EVALUATION_SEED, len(self.windows)), kind="stable")
        count = int(np.searchsorted(np.cumsum(self.windows.lengths[order], dtype=np.int64), max_tokens, side="right"))
        return order[: max(1, count)]

    def evaluation_bins(self, max_tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """This rank's batches of ``evaluation_rows``, as many on every rank: places in that order, and windows."""
        rows = self.evaluation_rows(max_tokens)
        lengths = self.windows.lengths[rows]
        num_bins = fewest_bins(lengths, self.micro_tokens)
        num_bins = -(-num_bins // self.world_size) * self.world_size
        bins, _ = deal(lengths, num_bins)
        for mine in range(self.rank, num_bins, self.world_size):
            members = np.flatnonzero(bins == mine)
            yield members, rows[members]

    @cached_property
    def _schedule(self) -> Schedule:
        weights = [part.weight for part in self.windows.parts]
        return Schedule(weights, self.tokens_per_step // int(self.windows.lengths.max()))

    @cached_property
    def _streams(self) -> list[Stream]:
        capacity = self.tokens_per_step // self._schedule.slots_per_step
        parts = range(len(self.windows.parts))
        return [Stream(self.windows, part, capacity, self.seed) for part in parts]


class Loader(Batches):
    """Micro-batches of text as an objective's views."""

    def __init__(
        self, windows: Windows, objective: Any, tokens: SpecialTokens, *, contrastive: Contrastive | None = None,
        contrastive_from: int = 0, lessons: Lessons | None = None, states: StateStore | None = None,
        concepts: Drawn | Fixed | None = None, part: Callable[[View], View] | None = None, **order: Any,
    ) -> None:  # fmt: skip
        """
        Args:
            windows: what to read.
            objective: makes a `View` of a packed batch, see models/objectives; `Mixed` makes one a step.
            tokens: the special tokens of the windows' tokenizer.
            contrastive: adds a pair to each view, from step `contrastive_from` on.
            lessons: adds to each view what a teacher says of its texts.
            states: adds to the texts what a frozen backbone makes of them, where they are read whole.
            concepts: how many concepts texts are read into; None: as many as the model has.
            part: makes of a view what this rank holds of it, where ranks share texts.
            order: what `Batches` asks for.
        """
        super().__init__(windows, **order)
        self.objective, self.tokens = objective, tokens
        self.contrastive, self.contrastive_from = contrastive, contrastive_from
        self.lessons, self.states, self.concepts, self.part = lessons, states, concepts, part

    def batch(self, step: int, samples: Samples) -> View:
        batch = self.texts(samples.windows)
        places = zip(samples.epochs.tolist(), samples.places.tolist(), strict=True)
        keys = [SampleKey(self.seed, *place) for place in places]
        objective = self.objective.at(step) if isinstance(self.objective, Mixed) else self.objective
        view = objective.view(batch, keys, self.tokens)
        view = self.share_of(view, self.num_concepts(step, batch))
        if self.lessons is not None:
            texts = None if reads(view.encoder, batch) else batch
            view = replace(view, lesson=self.lessons.lesson(samples.windows, texts))
        if self.contrastive is None or step < self.contrastive_from:
            return view
        documents = self.windows.documents(samples.windows)
        return replace(view, pair=self.contrastive.pair(batch, keys, self.tokens, documents, objective))

    def num_concepts(self, step: int, batch: Packed) -> int | None:
        return None if self.concepts is None else self.concepts.at(step, batch.max_seqlen)

    def share_of(self, view: View, num_concepts: int | None) -> View:
        """What this rank holds of a view whose texts are read into so many concepts."""
        view = view if num_concepts is None else replace(view, num_concepts=num_concepts)
        return view if self.part is None else self.part(view)

    def reading_into(self, concepts: Drawn | Fixed) -> Self:
        """A loader of the same text that is read into other numbers of concepts."""
        other = copy(self)
        other.concepts = concepts
        return other

    def texts(self, rows: np.ndarray) -> Packed:
        """These windows, whole. An objective that hides tokens makes a batch of its own, without states."""
        ids, lengths = self.windows.ids(rows)
        batch = pack_flat(ids, positions_within(lengths), lengths)
        return batch if self.states is None or not len(rows) else self.states.attach(batch, rows)

    def evaluation(self, max_tokens: int) -> Iterator[dict[str, View]]:
        """This rank's evaluation views of ``evaluation_rows(max_tokens)``, as many on every rank."""
        for batch, keys, _ in self._evaluation_batches(max_tokens):
            C = self.num_concepts(0, batch)
            views = self.objective.evaluation_views(batch, keys, self.tokens)
            yield {name: self.share_of(view, C) for name, view in views.items()}

    def evaluation_pairs(self, max_tokens: int) -> Iterator[tuple[Pair, int | None]]:
        """The same texts in pairs, and how many concepts they are read into. Where dropout alone would tell two views
        apart, adjacent spans take their place."""
        is_blind = self.contrastive.pairs == "dropout"
        contrastive = replace(self.contrastive, pairs="adjacent") if is_blind else self.contrastive
        for batch, keys, rows in self._evaluation_batches(max_tokens):
            pair = contrastive.pair(batch, keys, self.tokens, self.windows.documents(rows))
            yield pair, self.num_concepts(0, batch)

    def evaluation_lessons(self, max_tokens: int) -> Iterator[tuple[Lesson, int | None]]:
        """What the teacher says of the same texts, and how many concepts they are read into."""
        for batch, _, rows in self._evaluation_batches(max_tokens):
            yield self.lessons.lesson(rows, batch), self.num_concepts(0, batch)

    def _evaluation_batches(self, max_tokens: int) -> Iterator[tuple[Packed, list[SampleKey], np.ndarray]]:
        """This rank's batches, their keys and the numbers of their windows; as many batches on every rank."""
        for members, rows in self.evaluation_bins(max_tokens):
            batch = self.texts(rows)
            yield batch, [SampleKey(EVALUATION_SEED, 0, i) for i in members.tolist()], rows


def reads(encoder: Packed, batch: Packed) -> bool:
    """Whether the encoder is given the texts as they are."""
    fields = zip(encoder[:2], batch[:2], strict=True)  # ids and positions
    return encoder.num_tokens == batch.num_tokens and all(torch.equal(a, b) for a, b in fields)


def prefetch(make: Callable[[int], list[Any]], start: int, stop: int, depth: int = 2) -> Iterator[list[Any]]:
    """``make(start)``, ..., ``make(stop - 1)``, made up to ``depth`` steps ahead by a thread."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as thread:
        ahead = [thread.submit(make, step) for step in range(start, min(start + depth, stop))]
        try:
            for step in range(start, stop):
                views = ahead.pop(0).result()
                if step + depth < stop:
                    ahead.append(thread.submit(make, step + depth))
                yield views
        finally:
            thread.shutdown(wait=False, cancel_futures=True)
