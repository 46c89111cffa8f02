"""Text that is read as a run needs it: a block after the other, of which no more than a few are kept.

A block is some megabytes of documents, tokenised and put into the cache like a whole corpus. Its windows are dealt to
steps as those of a corpus are, for as many steps as they last. What a step trains on is a function of the step, as it
is of a stored corpus, whatever the number of ranks: with each block the cache keeps where in its source the next one
begins (the state of a ``datasets.IterableDataset``), so a run goes on without reading what is behind it. Without these
states, on another machine, the same blocks are made again from the first.

Of the processes of a machine one reads ahead; the others find what it has put there.
"""

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import write_text
from .cache import built, fingerprint, say
from .encoder_process import hash_of
from .encoders import encoded
from .loader import Loader
from .sources import Documents
from .store import FORMAT, Store, Writer, opened, type_of
from .tokenizer import Vocabulary
from .windows import Windows

MB = 10**6  # characters
BEGINNING = {"epoch": 0, "dataset": None}
ORDER_SEED = 0  # of the shards of a source
AHEAD = 1  # blocks before the one in use that are kept, for ranks and steps that are a little behind


class SourceStream:
    """The documents of one source, in blocks; again and again from its beginning, its shards in another order."""

    def __init__(
        self, documents: Documents, num_chars: int, held_out: float, vocabulary: Vocabulary, cache: Path,
        num_processes: int | None,
    ) -> None:  # fmt: skip
        """
        Args:
            num_chars: of a block, which ends with the document that makes it so long.
            held_out: the share of documents that are left out, by a hash of their text.
        """
        if documents.stream is None:
            raise InputError(f"data.stream_mb: {documents.name} is not streamed; leave it out of data.source")
        self.documents, self.num_chars, self.held_out = documents, num_chars, held_out
        self.vocabulary, self.num_processes = vocabulary, num_processes
        key = [FORMAT, documents.identity, vocabulary.fingerprint, num_chars, held_out]
        self.folder = cache / f"stream-{fingerprint(key)}"
        self._at: tuple[dict[str, Any], Any, Iterator[str]] | None = None  # a state, and what is open there
        self._reading = threading.Lock()

    def block(self, number: int) -> Store:
        """
        Raises:
            InputError: the source cannot be read.
        """
        def build(unfinished: Path) -> dict[str, Any]:
            before = self.state(number)
            with self._reading:
                return self._write(unfinished, before, number)

        folder = self.folder / f"block-{number:06d}"
        index = built(folder, build)
        if not self._state_file(number + 1).exists():
            write_text(self._state_file(number + 1), json.dumps(index["after"], allow_nan=False))
        return opened(folder, index)

    def state(self, number: int) -> dict[str, Any]:
        """Where block ``number`` begins: it is kept for every block that there ever was."""
        known = number
        while known > 0 and not self._state_file(known).exists():
            known -= 1
        for behind in range(known, number):
            self.block(behind)
            self.forget(behind)
        return json.loads(self._state_file(number).read_text()) if number else BEGINNING

    def forget(self, number: int) -> None:
        """Removes a block; not the first, which stands for the text where it is looked at."""
        if number > 0:
            shutil.rmtree(self.folder / f"block-{number:06d}", ignore_errors=True)

    def validation(self) -> Documents:
        """What is held out of the first block."""
        count = self.block(0).index["documents_read"]
        identity = [self.documents.identity, self.held_out, count, "held out"]

        def read() -> Iterator[str]:
            _, texts = self._open(BEGINNING)
            num_found = 0
            for _, text in zip(range(count), texts, strict=False):
                if self.is_held_out(text):
                    num_found += 1
                    yield text
            if not num_found:
                problem = "nothing of the first block is held out; raise it, or data.stream_mb"
                raise InputError(f"data.validation: {problem}")

        return Documents(f"what is held out of {self.documents.name}", identity, read)

    def is_held_out(self, text: str) -> bool:
        return hash_of(text.encode()) < self.held_out * 2**64

    def _state_file(self, number: int) -> Path:
        return self.folder / f"state-{number:06d}.json"

    def _open(self, state: dict[str, Any]) -> tuple[Any, Iterator[str]]:
        stream = self.documents.stream
        dataset = stream.start(ORDER_SEED, state["epoch"])
        if state["dataset"] is not None:
            dataset.load_state_dict(state["dataset"])
        return dataset, stream.texts(dataset)

    def _write(self, folder: Path, before: dict[str, Any], number: int) -> dict[str, Any]:
        at, self._at = self._at, None
        dataset, texts = at[1:] if at is not None and at[0] == before else self._open(before)
        num_read, after = 0, before

        def documents() -> Iterator[str]:
            nonlocal num_read, after, dataset, texts
            epoch, num_chars, num_found = before["epoch"], 0, 0
            while num_chars < self.num_chars:
                text = next(texts, None)
                if text is None:
                    if num_read == num_found and epoch > before["epoch"]:
                        raise InputError(f"data.source: {self.documents.name}: no text in it")
                    epoch, num_found = epoch + 1, num_read
                    dataset, texts = self._open({"epoch": epoch, "dataset": None})
                    continue
                num_read += 1
                num_chars += len(text)
                if not self.is_held_out(text):
                    yield text
            after = json.loads(json.dumps({"epoch": epoch, "dataset": dataset.state_dict()}, allow_nan=False))
            self._at = after, dataset, texts

        with Writer(folder, type_of(self.vocabulary)) as writer:
            for count, batch in encoded(documents(), self.vocabulary.plain, writer.dtype.name, self.num_processes):
                writer.add(count, batch)
            if not writer.done["kept"]:
                raise InputError(f"data.stream_mb: {self.documents.name}: block {number} has no text; raise it")
            index = writer.finish()
        return index | {"documents_read": num_read, "after": after}


class Blocks:
    """The blocks of all sources together: number n of each, cut into windows."""

    def __init__(self, streams: Sequence[SourceStream], cut: Callable[[list[Store]], Windows], key: Any) -> None:
        """``key``: JSON, of how ``cut`` cuts."""
        self.streams, self.cut, self.key = tuple(streams), cut, key

    def windows(self, number: int) -> Windows:
        return self.cut([stream.block(number) for stream in self.streams])

    def forget(self, number: int) -> None:
        for stream in self.streams:
            stream.forget(number)


class Streamed:
    """The steps of a stage from a stream: a loader for each block, which has as many steps as its windows last."""

    def __init__(
        self, blocks: Blocks, read: Callable[[Windows, int, int], Loader], first_step: int, stop: int, key: Any,
        reads_ahead: bool,
    ) -> None:  # fmt: skip
        """
        Args:
            read: makes the loader of a block from its windows, its first step and its number.
            first_step, stop: of the stage.
            key: JSON, of all that decides how many steps a block lasts.
            reads_ahead: this process makes the next block while one is trained on, and removes those behind it.
        """
        self.blocks, self.read, self.first_step, self.stop = blocks, read, first_step, stop
        self.reads_ahead = reads_ahead
        file = blocks.streams[0].folder / f"steps-{fingerprint([blocks.key, key])}.json"
        self._steps: list[int] = json.loads(file.read_text()) if file.exists() else []  # how many each block lasts
        self._steps_file = file
        self._loaders: dict[int, Loader] = {}  # of the newest blocks
        self._lock = threading.RLock()

    def at(self, step: int) -> Loader:
        """The loader of a step of the run."""
        with self._lock:
            number, first = 0, self.first_step
            while True:
                if number == len(self._steps):
                    self._open(number, first)
                if step < first + self._steps[number]:
                    return self._open(number, first)
                first += self._steps[number]
                number += 1

    def _open(self, number: int, first: int) -> Loader:
        known = self._loaders.get(number)
        if known is not None:
            return known
        loader = self.read(self.blocks.windows(number), first, number)
        if loader.windows.num_tokens < 2 * loader.tokens_per_step or loader.steps_without_repeat < 1:
            raise InputError(
                f"data.stream_mb: block {number} holds {loader.windows.num_tokens:,} tokens, not enough for two steps "
                f"of batch.tokens = {loader.tokens_per_step:,}; raise data.stream_mb"
            )
        if number == len(self._steps):
            self._steps.append(loader.steps_without_repeat)
            write_text(self._steps_file, json.dumps(self._steps, allow_nan=False))
        self._loaders = {**dict(list(self._loaders.items())[-AHEAD:]), number: loader}
        if self.reads_ahead:
            self.blocks.forget(number - AHEAD - 1)
            if first + self._steps[number] < self.stop:
                threading.Thread(target=self._prepare, args=(number + 1,), daemon=True).start()
        return loader

    def _prepare(self, number: int) -> None:
        try:
            self.blocks.windows(number)
        except (InputError, OSError) as error:  # who needs it will try again, and say so
            say(f"warning: block {number} could not be read ahead ({error})")


def seed_of(seed: int, number: int) -> int:
    """Of what is random in a block."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> 1)
