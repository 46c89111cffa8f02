"""The run folder: whose it is, what is in it, and whether it may be used.

RUN/recipe.yaml  environment.json  metrics.jsonl  tb/  checkpoints/  model/  report/
"""

import fcntl
import itertools
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checkpoints import checkpoint
from .environment import environment
from .errors import InputError
from .files import write_json
from .launching.launch import World
from .recipe.load import save_recipe
from .recipe.schema import Training
from .record import record, trajectory

OTHER_FOLDER = "choose another run.folder"


class RunFolder:
    """One run's folder. Nothing is written before `create`, which the trainer calls when all input has proved good."""

    def __init__(self, recipe: Training, world: World, typed: Sequence[str] = ()) -> None:
        """``typed``: what followed `conceptron train`, for the command that an error proposes."""
        self.recipe, self.world, self.path, self.typed = recipe, world, recipe.path, typed
        self.checkpoints, self.model = self.path / "checkpoints", self.path / "model"
        self.found: Path | None = None  # the checkpoint to go on from
        self.progress = checkpoint.Progress()
        self._lock: Any = None

    def inspect(self) -> list[str]:
        """Finds the checkpoint to go on from; returns what the user should know. Collective.

        Raises:
            InputError: the folder is in use, is no run, was started from another recipe, or holds no valid checkpoint.
        """
        is_used = self.world.first_then_share(self._open)
        if not is_used:
            return []
        self.found, warnings = checkpoint.find(self.world, self.checkpoints)
        if self.found is None:
            return [f"{self.path}: no checkpoint was saved yet; this run starts from the beginning"]
        self.progress = checkpoint.load_progress(self.found)
        self.compare("trajectory", trajectory(self.recipe))
        return [f"warning: {warning}" for warning in warnings]

    @property
    def is_finished(self) -> bool:
        return self.progress.step >= self.recipe.train.steps and self.model.is_dir()

    def compare(self, name: str, now: dict[str, Any]) -> None:
        """Refuses a difference to what the checkpoint was made with, in what decides the loss sequence."""
        if self.found is None:
            return
        before = self.progress.identity[name]
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                remedy = "go on with the old value, or start another run.name"
                if key == "train.steps" and self.model.is_dir():
                    remedy = f"the run is finished, its learning rate has come to its end; {self.next_command()}"
                raise InputError(
                    f"{self.found}: made with {key} = {before.get(key)!r}, now it is {now.get(key)!r}; {remedy}"
                )

    def next_command(self) -> str:
        """How to train a finished model further: another run that begins with its weights."""
        words = [word for word in self.typed if not word.startswith(("resume=", "run.name=", "init.source="))]
        names = (f"{self.path.name}-{number}" for number in itertools.count(2))
        name = next(name for name in names if not os.path.lexists(self.path.with_name(name)))
        words += [f"run.name={name}", f"init.source={self.model}"]
        return f"train its model further in another run: conceptron train {shlex.join(words)}"

    def create(self) -> None:
        """Makes the folder, takes possession of it, and writes the resolved recipe and the environment. Collective."""

        def write() -> None:
            is_new = not self.path.exists()
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._take_lock()
                save_recipe(record(self.recipe), self.path / "recipe.yaml")
                write_json(self.path / "environment.json", environment(self.world))
            except OSError as error:
                if is_new:
                    shutil.rmtree(self.path, ignore_errors=True)
                raise InputError(f"{self.path}: cannot be written ({error.strerror}); {OTHER_FOLDER}") from error

        self.world.first_then_share(write)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def _open(self) -> bool:
        """`_check_usable`, whose faults of the disk are the user's to mend."""
        try:
            return self._check_usable()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be a run folder ({error.strerror}); {OTHER_FOLDER}") from error

    def _check_usable(self) -> bool:
        """Whether there is a run to go on with; no other process can then touch it."""
        path = self.path
        if path.is_symlink() and not path.exists():
            raise InputError(f"{path}: a link to {path.readlink()}, where nothing is; remove it, or {OTHER_FOLDER}")
        parent = next(each for each in path.absolute().parents if os.path.lexists(each))
        if not parent.is_dir():
            raise InputError(f"{path}: {parent} is no folder; {OTHER_FOLDER}")
        if not path.exists() and not os.access(parent, os.W_OK | os.X_OK):
            raise InputError(f"{path}: {parent} cannot be written to; {OTHER_FOLDER}")
        if path.exists() and not path.is_dir():
            raise InputError(f"{path}: expected a run folder, got a file; use another run.name or run.folder")
        if not path.exists() or not any(path.iterdir()):
            return False
        if self.recipe.resume == "never":
            raise InputError(f"{path}: run folder already in use; go on with resume=auto, or choose another run.name")
        if not (path / "recipe.yaml").exists():
            raise InputError(f"{path}: not empty and not a run folder (no recipe.yaml); choose another run.name")
        self._take_lock()
        return True

    def _take_lock(self) -> None:
        """The lock is the kernel's: it ends with the process, however that ends."""
        self._lock = self._lock or (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{self.path}: another process is training here; choose another run.name") from error
