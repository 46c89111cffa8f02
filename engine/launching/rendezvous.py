"""How ranks find each other, and what is said while some are missing.

Rank 0 keeps a store (under torchrun its agent does), every rank leaves its number there, and rank 0 tells the others
when all have come. Everything here is a loop in Python, so that Ctrl-C ends it.
"""

import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch.distributed as dist

from ..errors import InputError, LaunchError
from .place import Place

NOTICE_S = 20.0  # of silence, before a line says what is waited for
PAUSE_S = 0.2
ANSWER_S = 30.0  # of an open port, which is rank 0's or another program's
CALL = timedelta(seconds=30)  # for one answer of the store
EVERYONE, COME = "everyone", "yes"


def meet(place: Place, minutes: float) -> dist.Store:
    """Waits for all ranks; returns the store that they share.

    Raises:
        InputError: some did not come in time; all that came raise it.
        LaunchError: this rank cannot keep or reach the store.
    """
    wait = Wait(minutes)
    keeps = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = keep(place) if keeps else reach(place, wait)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # an agent keeps its store
    room = dist.PrefixStore(f"conceptron/{attempt}", store)
    try:
        room.set(str(place.rank), COME)
        if place.rank == 0:
            await_others(room, place, wait)
        else:
            await_word(room)
    except dist.DistError as error:
        problem = f"rank {place.rank}: rank 0 at {place.host}:{place.port} went away ({first_line(error)})"
        raise LaunchError(problem) from error
    return store


class Wait:
    """Up to so many minutes; says one line when it becomes long."""

    def __init__(self, minutes: float) -> None:
        self.minutes, self.started, self.is_told = minutes, time.monotonic(), False

    def pauses(self) -> Iterator[float]:
        """Once each pause, until the time is over; the seconds that have passed."""
        while (passed := time.monotonic() - self.started) < 60 * self.minutes:
            yield passed
            time.sleep(PAUSE_S)

    def tell(self, passed: float, problem: str) -> None:
        if passed >= NOTICE_S and not self.is_told:
            self.is_told = True
            left = f"giving up after {self.minutes:g} minutes (run.join_minutes)"
            print(f"conceptron: waiting: {problem}; {left}", file=sys.stderr, flush=True)


def keep(place: Place) -> dist.Store:
    """The store itself, on this machine, whatever name the others call it by."""
    try:
        return dist.TCPStore("127.0.0.1", place.port, place.size, True, CALL, wait_for_workers=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            problem = "is in use on this machine; set it to a free one for all ranks"
        else:
            problem = f"cannot be opened ({first_line(error)})"
        raise LaunchError(f"environment: MASTER_PORT: {place.port} {problem}") from error


def reach(place: Place, wait: Wait) -> dist.Store:
    """A way to the store of rank 0, which may come later than this rank."""
    where, problem = f"{place.host}:{place.port}", ""
    for passed in wait.pauses():
        try:
            socket.create_connection((place.host, place.port), timeout=5).close()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            problem = (
                f"rank {place.rank} cannot reach rank 0 at {where} ({reason}); see that it runs, and that MASTER_ADDR "
                "and MASTER_PORT are those of its machine"
            )
            wait.tell(passed, problem)
            continue
        return greet(place, where)
    raise LaunchError(f"{problem}; gave up after {wait.minutes:g} minutes (run.join_minutes)")


def greet(place: Place, where: str) -> dist.Store:
    """The store behind an open port. In a thread: another program would let torch wait for its answer without end."""
    answers: queue.Queue = queue.Queue()

    def open_store() -> None:
        try:
            limit = timedelta(seconds=ANSWER_S)
            answers.put(dist.TCPStore(place.host, place.port, place.size, False, limit))
        except dist.DistError as error:
            answers.put(error)

    threading.Thread(target=open_store, daemon=True).start()
    try:
        answer = answers.get(timeout=ANSWER_S)
    except queue.Empty:
        answer = TimeoutError("no answer")
    if isinstance(answer, Exception):
        raise LaunchError(
            f"rank {place.rank}: what answers at {where} is not rank 0 ({first_line(answer)}); set MASTER_ADDR and "
            "MASTER_PORT to those of rank 0, and a port that nothing else uses"
        )
    return answer


def await_others(room: dist.Store, place: Place, wait: Wait) -> None:
    missing = list(range(place.size))
    problem = ""
    for passed in wait.pauses():
        missing = [rank for rank in missing if not room.check([str(rank)])]
        if not missing:
            room.set(EVERYONE, COME)
            return
        problem = absence(missing, place)
        wait.tell(passed, problem)
    problem = f"{problem}; gave up after {wait.minutes:g} minutes (run.join_minutes)"
    room.set(EVERYONE, problem)
    time.sleep(5 * PAUSE_S)  # for those that came to read it; the store ends with this process
    raise InputError(problem)


def await_word(room: dist.Store) -> None:
    """Until rank 0 says that all have come, or who has not. It gives up, not this rank, as long as it is there."""
    while not room.check([EVERYONE]):
        time.sleep(PAUSE_S)
    said = room.get(EVERYONE).decode()
    if said != COME:
        raise InputError(said)


def absence(missing: Sequence[int], place: Place) -> str:
    """Who is missing, and why that may be."""
    named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    ranks = f"{len(missing)} of {place.size} ranks have not come (rank{'s' * (len(missing) > 1)} {named})"
    if place.by_slurm:
        return (
            f"{ranks}: sbatch starts a script once, srun would start it {place.size} times; put srun before the "
            "command, or unset SLURM_PROCID to run alone"
        )
    return f"{ranks}: start them, or correct WORLD_SIZE; they look for rank 0 at {place.host}:{place.port}"


def first_line(error: BaseException) -> str:
    return " ".join((str(error).splitlines() or [""])[0].split())
