"""Where the time of a step goes, how much of the machine it uses, and what it holds: of one rank, measured in training.

`conceptron bench step` reads the same `Stopwatch`.
"""

import resource
import sys
import time
from itertools import pairwise
from typing import Any

import torch

from .nvml import monitor_of

MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}  # of a product that shows what the machine can do
QUICK = 512  # of one on a CPU that shows nearly as much, where a run waits for it


class Stopwatch:
    """Seconds by phase. On a GPU phases end where they end on its stream, and only `take` waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.begin()

    def begin(self) -> None:
        """Forgets what was not taken."""
        self._marks = [("", self._now())]

    def lap(self, phase: str) -> None:
        """What has passed since the last call belongs to this phase."""
        self._marks.append((phase, self._now()))

    def take(self) -> dict[str, float]:
        """The seconds of each phase since the last call."""
        if self.on_cuda:
            self._marks[-1][1].synchronize()
        seconds: dict[str, float] = {}
        for (_, begin), (phase, end) in pairwise(self._marks):
            passed = begin.elapsed_time(end) / 1e3 if self.on_cuda else end - begin
            seconds[phase] = seconds.get(phase, 0.0) + passed
        del self._marks[:-1]
        return seconds

    def _now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Meter:
    """What the log says of the machine at every step; times are those of this rank, as memory and power are.

    seconds   of each phase: data (waiting for the loader, and the way to the device), forward, backward, optimizer
    mfu       model FLOPs utilisation: those counted in `models/flops.py`, over the seconds of the phases, over the rate
              of one large matrix product in the same precision, which is measured when the run starts
    tflops    the same as a rate, in 10^12 a second, of one rank
    memory    the largest so far, in bytes: resident on the host, and of the GPU's allocator
    gpu       power, clock and what slows it, as NVML has them; nothing without a GPU, or why it does not tell
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device, self.monitor = device, monitor_of(device)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        size = MATMUL_SIZE["cuda"] if device.type == "cuda" else QUICK
        self.rate = matmul_flops(device, dtype, size, 3)
        self.watch = Stopwatch(device)

    def figures(self, flops: float | None) -> dict[str, Any]:
        """Of the step whose last phase has ended. ``flops``: counted in it on one rank; None: not counted."""
        seconds = self.watch.take()
        total, gpu = sum(seconds.values()), self.monitor.reading()
        used = {}
        if flops is not None and total:
            used = {"tflops": flops / total / 1e12, "mfu": flops / total / self.rate}
        return {"seconds": seconds, **used, "memory": memory(self.device), **({"gpu": gpu} if gpu else {})}


def memory(device: torch.device) -> dict[str, int]:
    """Bytes: the most that this process has held so far."""
    held = {"host_peak_bytes": host_peak_bytes()}
    if device.type == "cuda":
        held["gpu_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return held


def host_peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: of the GPU's allocator, or of the process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else host_peak_bytes()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(call, device: torch.device, repeats: int = 10) -> float:
    """The shortest of ``repeats`` calls, after one that is not counted."""
    call()
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int | None = None, repeats: int = 10) -> float:
    """FLOP/s of one square product, the best of ``repeats``; ``size``: of its sides, ``MATMUL_SIZE`` by default."""
    size = size or MATMUL_SIZE[device.type]
    own = torch.Generator(device).manual_seed(0)  # nobody else's random numbers move
    a = torch.randn(size, size, device=device, generator=own).to(dtype)
    return 2 * size**3 / best_seconds(lambda: torch.mm(a, a), device, repeats)
