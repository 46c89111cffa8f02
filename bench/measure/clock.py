"""One sample of how long a call takes: the clock on a CPU, the replay of a CUDA graph or a pair of events on a GPU.

A GPU's sample is one replay of a graph of many calls that walk over several copies of the inputs, so that L2 is cold,
timed by events behind a kernel that keeps the GPU busy until the host has queued the round, so that no launch gap is
timed. A call that waits for the device inside, or takes longer than ``LONG_S``, is not captured; its samples are timed
by events, launch gaps included, and say so. The GPU path has not been run on a GPU yet.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ...engine.errors import InputError

Call = Callable[[], object]
LONG_S = 0.1  # on a GPU: launch gaps are nothing beside it, and a graph would hold its memory twice
_streams: dict[int, torch.cuda.Stream] = {}


class Sampler(NamedTuple):
    run: Callable[[], float]  # CPU: one sample in ms a call; CUDA: queues one sample
    num_calls: int
    method: str


def prepare_cpu(
    copies: Sequence[Call], known_s: float = 0.0, sample_s: float = 1e-3, warm_up_s: float = 0.05
) -> Sampler:
    """``known_s``: what a call was just seen to take; one of a second or more is then not called to warm up."""
    start, durations = time.perf_counter(), [known_s] if known_s >= 1 else []

    def is_warm() -> bool:
        # the first call may build caches, so a quick one is warmed up twice; a long one has better uses for its time
        if len(durations) < 2:
            return bool(durations) and durations[0] >= 1
        return durations[0] >= 1 or time.perf_counter() - start >= warm_up_s or len(durations) >= 1000

    while not is_warm():
        before = time.perf_counter()
        copies[len(durations) % len(copies)]()
        durations.append(time.perf_counter() - before)
    num_calls = max(len(copies), math.ceil(sample_s / max(min(durations), 1e-7)))

    def sample() -> float:
        begin = time.perf_counter()
        for i in range(num_calls):
            copies[i % len(copies)]()
        return (time.perf_counter() - begin) * 1e3 / num_calls

    return Sampler(sample, num_calls, "clock")


def device_named(name: str | None) -> torch.device:
    """"cpu" or "cuda"; None takes a GPU where there is one.

    Raises:
        InputError: "cuda", and torch sees no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise InputError("--device: torch sees no CUDA device here; leave it out to measure the CPU")
    return torch.device(name or ("cuda" if has_gpu else "cpu"))


@contextmanager
def own_stream(device: torch.device | str) -> Iterator[None]:
    """Everything of a comparison on a GPU runs inside, its inputs and its forward passes too: the graph of a backward
    pass can only be captured on the stream that ran the forward pass, and that must not be the default stream."""
    if torch.device(device).type != "cuda":
        yield
        return
    with torch.cuda.stream(capture_stream()):
        yield
        torch.cuda.synchronize()


def capture_stream() -> torch.cuda.Stream:
    device = torch.cuda.current_device()
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def prepare_cuda(copies: Sequence[Call], sample_s: float = 1e-3) -> Sampler:
    for call in (*copies, copies[0]):  # compiles, fills caches
        call()
    once_s = elapsed_ms(copies[0]) * 1e-3
    num_calls = len(copies) * max(1, math.ceil(sample_s / max(once_s, 1e-6) / len(copies)))

    def body() -> None:
        for i in range(num_calls):
            copies[i % len(copies)]()

    if once_s < LONG_S and not waits_for_device(copies[0]):
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=capture_stream()):
                body()
            graph.replay()
            torch.cuda.synchronize()
            return Sampler(lambda: graph.replay() or 0.0, num_calls, "graph")
        except RuntimeError:  # cannot be captured; told by the method in the result
            torch.cuda.synchronize()
    return Sampler(lambda: body() or 0.0, num_calls, "events")


def waits_for_device(call: Call) -> bool:
    """Whether a call waits for the GPU inside. Found out before a capture, which it would break half-way."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def time_round_cuda(order: Sequence[str], ready: Mapping[str, Sampler], samples: Mapping[str, list[float]]) -> None:
    events = {name: (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for name in order}
    torch.cuda._sleep(2_000_000)  # about 1 ms: the host queues ahead of the GPU
    for name in order:
        events[name][0].record()
        ready[name].run()
        events[name][1].record()
    torch.cuda.synchronize()
    for name in order:
        samples[name].append(events[name][0].elapsed_time(events[name][1]) / ready[name].num_calls)


def elapsed_ms(call: Call) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def num_cold_copies(bytes_per_call: int, limit: int = 64) -> int:
    """Copies of the inputs that push a call's own out of L2 before its turn: three times L2, at most ``limit``."""
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(limit, 1 + math.ceil(3 * l2_bytes / max(1, bytes_per_call)))
