"""Checkpoints written beside training: the loop waits for a copy into memory, a thread for the disk.

A save has two parts. Every rank writes its file; when all have, the first one gives the folder its manifest and its
name. Both run in a thread. Between them ranks tell each other what came of it, in the loop (`advance`), because a
thread must not talk to other ranks while the loop does. The loop counts `is_ready` over ranks with every step's loss,
so it never waits for a disk, and a fault is raised within a step of its being known, on every rank.
"""

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ..launching.launch import World
from . import checkpoint
from .checkpoint import Progress
from .retention import Retention


class Writer:
    """One save at a time; inside `with`, its thread has ended at the end."""

    def __init__(self, world: World, parent: Path, retention: Retention, is_async: bool = True) -> None:
        self.world, self.parent, self.retention, self.is_async = world, parent, retention, is_async
        self.host: dict[str, Tensor] = {}  # kept from save to save: fresh memory costs more than the copy
        self.step = self.num_saved = 0  # of the newest save; how many have succeeded
        self.num_waits = 0  # how often the loop has waited for a disk
        self._unfinished, self._progress = Path(), Progress()
        self._next: Callable[[], None] | None = None  # what `advance` does
        self._thread: threading.Thread | None = None
        self._outcome: tuple[Any, str] = None, ""  # of the thread: a result, or what went wrong

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.join()

    @property
    def is_busy(self) -> bool:
        return self._next is not None

    @property
    def is_ready(self) -> bool:
        """Whether `advance` would not wait on this rank."""
        return self.is_busy and (self._thread is None or not self._thread.is_alive())

    def save(self, engine: Any, progress: Progress) -> None:
        """Begins `parent/step-XXXXXXXX`, after the end of the one before; without ``is_async`` waits. Collective.

        The folder appears under its name only when every rank has written and synced its file; if one fails, the
        unfinished folder is removed and the earlier checkpoints are left alone. Afterwards what need not stay goes.

        Raises:
            OSError: on every rank, with the first failing rank's message: of this save, or of the one before.
        """
        self.finish()
        self.step = progress.step
        self._unfinished = self.world.first_then_share(lambda: checkpoint.begin(self.parent, progress.step))
        self._progress = replace(progress)
        checkpoint.capture(engine, self.host, self.world.is_first)
        file = self._unfinished / f"state-{self.world.rank:05d}-of-{self.world.size:05d}.safetensors"
        self._run(lambda: checkpoint.write_state(self.host, file), self._when_written)
        if not self.is_async:
            self.finish()

    def advance(self) -> None:
        """The next part of a save, when all ranks have done theirs. Collective.

        Raises:
            OSError: as `save`.
        """
        if self._thread is not None:
            self.num_waits += self._thread.is_alive()
            self._thread.join()
            self._thread = None
        self._next()

    def finish(self) -> None:
        """Waits until nothing is being saved. Collective.

        Raises:
            OSError: as `save`.
        """
        while self.is_busy:
            self.advance()

    def _when_written(self) -> None:
        outcomes = self.world.gather(self._outcome)
        failed = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(outcomes) if problem]
        if failed:
            self._end(failed[0])
        files, size = dict(entry for entry, _ in outcomes), self.world.size
        self._run(lambda: self._publish(files, size) if self.world.is_first else None, self._when_published)

    def _publish(self, files: dict[str, Any], size: int) -> None:
        checkpoint.publish(self._unfinished, self._progress, files, size)
        self.retention.apply(checkpoint.list_checkpoints(self.parent), self._progress.best)

    def _when_published(self) -> None:
        self._end(self.world.first_then_share(lambda: self._outcome[1]))

    def _end(self, problem: str) -> None:
        self._next = None
        if problem:
            self.world.first_then_share(lambda: shutil.rmtree(self._unfinished, ignore_errors=True))
            raise OSError(problem)
        self.num_saved += 1

    def _run(self, part: Callable[[], Any], then: Callable[[], None]) -> None:
        def run() -> None:
            try:
                self._outcome = part(), ""
            except (OSError, SafetensorError, MemoryError) as error:
                self._outcome = None, str(error) or type(error).__name__

        self._next, self._outcome = then, (None, "its writer ended without a result")
        if self.is_async:
            self._thread = threading.Thread(target=run, name="checkpoint")
            self._thread.start()
        else:
            run()


def save(world: World, parent: Path, engine: Any, progress: Progress, keep_last: int) -> Path:
    """One checkpoint, written before this returns. Collective. Raises OSError as `Writer.save`."""
    Writer(world, parent, Retention(keep_last), is_async=False).save(engine, progress)
    return parent / f"step-{progress.step:08d}"
