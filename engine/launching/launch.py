"""How a process learns its place: plain python, the `deepspeed` launcher, torchrun or srun."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .. import compat
from ..errors import InputError, LaunchError
from .place import VARIABLES, Place, find_place
from .rendezvous import first_line, meet

SETUP_TIMEOUT = timedelta(hours=24)  # rank 0 may tokenise a large corpus while the others wait
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among its peers: a grid of ``size / sequence_ranks`` groups, each of which reads the same texts.

    The ranks of a group follow each other, so that they are on one machine where it has room for them.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device
    sequence_ranks: int = 1  # that hold a part of each text
    sequence_group: dist.ProcessGroup | None = None  # this rank's; None where it is alone in it

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """The number of this rank's group."""
        return self.rank // self.sequence_ranks

    @property
    def data_size(self) -> int:
        """How many groups there are."""
        return self.size // self.sequence_ranks

    @property
    def sequence_rank(self) -> int:
        """This rank's number in its group: which part of a text it holds."""
        return self.rank % self.sequence_ranks

    def divided(self, sequence_ranks: int) -> "World":
        """The same ranks, so many of which share each text. Collective.

        DeepSpeed is not told: it averages gradients over all ranks, which the losses are made for (`models/sharding`).

        Raises:
            InputError: they are no divisor of the ranks.
        """
        if self.size % sequence_ranks:
            raise InputError(
                f"train.sequence_ranks: expected a divisor of the {self.size} ranks of this run, got {sequence_ranks}"
            )
        if sequence_ranks == 1:
            return self
        firsts = range(0, self.size, sequence_ranks)
        groups = [dist.new_group(list(range(first, first + sequence_ranks))) for first in firsts]
        return replace(self, sequence_ranks=sequence_ranks, sequence_group=groups[self.rank // sequence_ranks])

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place, on whatever device `values` is."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The small Python object of every rank, on every rank."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def first_then_share(self, action: Callable[[], T]) -> T:
        """Runs `action` on rank 0 and gives every rank its (picklable) result, or raises its error on every rank."""
        result: Any = None
        error: BaseException | None = None
        if self.is_first:
            try:
                result = action()
            except (InputError, OSError) as caught:
                error = caught
        if self.size > 1:
            box = [(result, error)]
            dist.broadcast_object_list(box, src=0)
            result, error = box[0]
        if error is not None:
            raise error
        return result

    def first_then_others(self, action: Callable[[], T]) -> T:
        """Runs `action` on rank 0, which may fill a cache, then on the others; an error of one is raised on all."""
        result: Any = None

        def run() -> None:
            nonlocal result
            result = action()

        self.first_then_share(run)
        error: BaseException | None = None
        if not self.is_first:
            try:
                run()
            except (InputError, OSError) as caught:
                error = caught
        errors = [each for each in self.gather(error) if each is not None]
        if errors:
            raise errors[0]
        return result


@contextlib.contextmanager
def world(join_minutes: float = 10.0) -> Iterator[World]:
    """Joins the process group that the environment describes, or makes a group of one; leaves it at the end.

    A group that exists already is used as it is and left alone. ``join_minutes``: how long other ranks are waited for.

    Raises:
        InputError: the launcher's variables are incomplete or wrong, or other ranks did not come in time.
    """
    check_accelerator()
    compat.choose_accelerator()
    compat.quiet()
    if dist.is_initialized():
        yield _world(int(os.environ.get("LOCAL_RANK", 0)))
        return
    before = {name: os.environ.get(name) for name in VARIABLES}  # whoever comes after us reads them too
    place = find_place(os.environ)
    local_rank = choose_device(place)
    backend = "nccl" if compat.uses_cuda() else "gloo"
    try:
        if place is None:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            connect(place, backend, join_minutes)
            os.environ.update(place.variables())
            share_cores(place.local_size)
        os.environ.setdefault("LOCAL_RANK", str(local_rank))  # DeepSpeed reads it
        yield _world(local_rank)
    except LaunchError:
        raise
    except InputError as error:
        error.of_all = True
        raise
    finally:
        if dist.is_initialized():
            compat.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def check_accelerator() -> None:
    """DS_ACCELERATOR, DeepSpeed's own variable: what is asked for is there."""
    wanted = os.environ.get("DS_ACCELERATOR", "cpu")
    if wanted not in ("cpu", "cuda"):
        raise InputError(f"environment: DS_ACCELERATOR: expected cpu or cuda, got {wanted!r}")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("environment: DS_ACCELERATOR: cuda, but torch finds no GPU here; leave it out, or use cpu")


def choose_device(place: Place | None) -> int:
    """This rank's number on its machine, whose GPU, if it uses one, becomes the current one."""
    local_rank = place.local_rank if place else 0
    if compat.uses_cuda():
        num_gpus = torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise LaunchError(
                f"environment: LOCAL_RANK: expected one of the {num_gpus} GPUs of this machine, 0 to {num_gpus - 1}, "
                f"got {local_rank}; start fewer ranks here, or set DS_ACCELERATOR=cpu"
            )
        torch.cuda.set_device(local_rank)
    return local_rank


def connect(place: Place, backend: str, join_minutes: float) -> None:
    """The process group of all ranks."""
    store = meet(place, join_minutes)
    store.set_timeout(SETUP_TIMEOUT)
    try:
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.size, timeout=timedelta(minutes=join_minutes)
        )
    except RuntimeError as error:
        raise LaunchError(
            f"rank {place.rank}: found the others, but cannot connect to all of them ({first_line(error)}); "
            "name the network that they share in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from error
    compat.set_timeouts(SETUP_TIMEOUT.total_seconds())


def _world(local_rank: int) -> World:
    device = torch.device("cuda", local_rank) if compat.uses_cuda() else torch.device("cpu")
    return World(dist.get_rank(), local_rank, dist.get_world_size(), device)


def share_cores(num_local_ranks: int) -> None:
    """Ranks on one CPU each take their part of the cores, unless OMP_NUM_THREADS says otherwise."""
    if not compat.uses_cuda() and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // num_local_ranks))


class StopRequest:
    """Inside `with`, SIGTERM, SIGINT or a vanished launcher ask the run to save and end; a second signal ends it now.

    The trainer sums `pending` over ranks with every step's loss, so all ranks stop after the same step.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signum = 0
        self._launcher = compat.deepspeed_launcher()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        with contextlib.suppress(ValueError):  # only the main thread may install handlers
            self._before = {signum: signal.signal(signum, self._on_signal) for signum in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, _frame: object) -> None:
        self.signum = signum
        for each, handler in self._before.items():
            signal.signal(each, handler)

    @property
    def pending(self) -> bool:
        if not self.signum and compat.is_gone(self._launcher):
            self.signum = signal.SIGTERM
        return self.signum != 0
