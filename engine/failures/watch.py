"""Ranks that die or hang: noticed, named in one line, and none left behind.

A rank that has taken no step for `run.hang_minutes`, or whose connection to another has broken, calls the roll in the
store that all ranks share. A thread of every rank looks there each second and answers with where training stands. Who
does not answer has died, or is stopped; who answers from outside of a collective is the one that the others wait for.
The first that answers says so, processes of this machine that do not answer are killed, and all end with code 1.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..launching.launch import World

POLL_S = 1.0
GRACE_S = 5.0  # for answers
NO_STORE_S = 10.0  # more, after which the store itself does not answer
FAILED = 1  # the exit code
CALL = "call"
COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")
PACKAGE = str(Path(__file__).parents[2]) + os.sep


class Watch:
    """Inside `with`, of several ranks. ``advice``: what to do, at the end of the line."""

    def __init__(self, world: World, minutes: float, advice: Callable[[], str]) -> None:
        self.world, self.minutes, self.advice = world, minutes, advice
        self._step, self._moved = 0, time.monotonic()
        self._done, self._called = threading.Event(), threading.Event()
        self._main = threading.get_ident()
        self._threads: list[threading.Thread] = []
        self._people: list[dict[str, Any]] = []
        self._rolls: queue.Queue[dict[int, dict[str, Any]]] = queue.Queue()

    def pulse(self, step: int) -> None:
        """Training goes on: ``step`` is done."""
        self._step, self._moved = step, time.monotonic()

    def __enter__(self) -> "Watch":
        if self.world.size > 1:
            self._people = self.world.gather(myself())
            self.pulse(self._step)
            store = dist.PrefixStore(f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", shared_store())
            self._threads = [threading.Thread(target=self._attend, args=(store,), daemon=True)]
            self._threads += [threading.Thread(target=self._look, daemon=True)]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.world.size > 1 and is_lost(error):
            self._called.set()
            time.sleep(GRACE_S + 2 * NO_STORE_S)  # the threads end this process
        self._done.set()
        for thread in self._threads:
            thread.join(timeout=2 * POLL_S)

    def _look(self) -> None:
        """Calls the roll when there is no step for too long, and acts on what comes of it."""
        while not self._done.wait(POLL_S):
            if time.monotonic() - self._moved > 60 * self.minutes:
                self._called.set()
            if self._called.is_set():
                break
        if self._done.is_set():
            return
        try:
            present = self._rolls.get(timeout=GRACE_S + NO_STORE_S)
        except queue.Empty:
            present = {}
        if not present:  # the store itself does not answer, which is rank 0's
            present = {rank: {} for rank in range(1, self.world.size)} if self.world.rank else {0: self._state()}
        self._end(present)

    def _attend(self, store: dist.Store) -> None:
        """Answers the roll, and gathers the answers of all."""
        present: dict[int, dict[str, Any]] = {}
        try:
            while not self._called.is_set():
                if self._done.wait(POLL_S):
                    return
                if store.check([CALL]):
                    self._called.set()
            store.set(CALL, "")
            store.set(str(self.world.rank), json.dumps(self._state(), allow_nan=False))
            until = time.monotonic() + GRACE_S
            while len(present) < self.world.size and time.monotonic() < until:
                for rank in set(range(self.world.size)) - present.keys():
                    if store.check([str(rank)]):
                        present[rank] = json.loads(store.get(str(rank)))
                time.sleep(POLL_S / 10)
        except dist.DistError:  # who kept the store is gone, which matters only if training is in trouble
            present = {}
        self._rolls.put(present)

    def _state(self) -> dict[str, Any]:
        where, is_waiting = position(self._main)
        return {"step": self._step, "where": where, "is_waiting": is_waiting}

    def _end(self, present: Mapping[int, dict[str, Any]]) -> None:
        missing = [rank for rank in range(self.world.size) if rank not in present]
        if self.world.rank == min(present):
            said = self._absence(missing) if missing else self._hang(present)
            print(f"conceptron: error: {said}; {self.advice()}", file=sys.stderr, flush=True)
        me = self._people[self.world.rank]
        for rank in missing:
            other = self._people[rank]
            if other["machine"] == me["machine"] and state_of(other):
                os.kill(other["pid"], signal.SIGKILL)
        sys.stdout.flush()
        os._exit(FAILED)

    def _absence(self, missing: list[int]) -> str:
        words = []
        for rank in missing[:8]:
            other = self._people[rank]
            is_here = other["machine"] == self._people[self.world.rank]["machine"]
            state = state_of(other) if is_here else "?"
            how = {"": "has died", "T": "is stopped", "?": "has died or hangs"}.get(state, "does not answer")
            words.append(f"rank {rank} (process {other['pid']} on {other['host']}) {how}")
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        return f"{', '.join(words)}{more}, after step {self._step}"

    def _hang(self, present: Mapping[int, dict[str, Any]]) -> str:
        """All answer, and none goes on."""
        busy = [rank for rank, state in present.items() if not state["is_waiting"]]
        if len(busy) in (0, self.world.size):
            busy = list(present)
        where = ", ".join(f"rank {rank} is in {present[rank]['where']}" for rank in sorted(busy)[:8])
        return f"no step for {self.minutes:g} minutes (run.hang_minutes) after step {self._step}: {where}"


def shared_store() -> dist.Store:
    """A connection of its own to the store of the process group, for a thread."""
    return dist.distributed_c10d._get_default_store().clone()


def is_lost(error: BaseException | None) -> bool:
    """Whether another rank is behind it: a connection that broke, or an answer that did not come in time."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def position(thread: int) -> tuple[str, bool]:
    """Where a thread is in our code, or at all; whether it is in a collective."""
    frame, ours, is_waiting = sys._current_frames().get(thread), "", False
    innermost = ""
    while frame is not None:
        file, line = frame.f_code.co_filename, f":{frame.f_lineno} ({frame.f_code.co_name})"
        innermost = innermost or f"{file}{line}"
        is_waiting |= any(folder in file for folder in COLLECTIVES)
        if not ours and file.startswith(PACKAGE):
            ours = f"{file.removeprefix(PACKAGE)}{line}"
        frame = frame.f_back
    return ours or innermost, is_waiting


def myself() -> dict[str, Any]:
    """This process, so that another of the same machine knows it again."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    machine = f"{os.uname().nodename} {boot.read_text().strip() if boot.exists() else ''}"
    return {"host": os.uname().nodename, "machine": machine, "pid": os.getpid(), "started": stat(os.getpid())[1]}


def state_of(process: Mapping[str, Any]) -> str:
    """A letter of the kernel, such as T for stopped; "" where it has ended and another may have its number."""
    state, started = stat(process["pid"])
    return "" if state in ("Z", "X") or started != process["started"] else state


def stat(pid: int) -> tuple[str, str]:
    """(state, when it was started) of a process; empty where there is none, or no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # behind the command's name
        return fields[0], fields[19]
    except (FileNotFoundError, ProcessLookupError):
        return "", ""
