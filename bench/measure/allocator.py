"""Peak memory that torch's own allocator handed out during one call, on either kind of device.

On a CPU torch keeps no such count; the profiler reports every allocation and release, and the peak of their running sum
is the peak of the call. What libraries allocate behind torch's back is not in it; ``resident.resident_peak`` has that.
"""

import gc
import os
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from .resident import Memory

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells standard error of every start and stop
Call = Callable[[], object]


def allocator_peak(call: Call, device: torch.device | str) -> Memory:
    """``extra_bytes`` is what the call needs on top of what already lived; on a CPU the baseline is not known and is 0.

    What the call returns is kept until it ends, as a caller would.
    """
    return observe(call, device)[1]


def observe(call: Call, device: torch.device | str) -> tuple[float, Memory]:
    """(seconds, peak memory) of one call; a GPU makes another before it, which does not count."""
    if torch.device(device).type == "cuda":
        return observe_cuda(call)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
    del result
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    living = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        living += event.nbytes()
        peak = max(peak, living)
    return seconds, Memory(0, peak)


def observe_cuda(call: Call) -> tuple[float, Memory]:
    call()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    baseline, start = torch.cuda.memory_allocated(), time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del result
    return seconds, Memory(baseline, torch.cuda.max_memory_allocated())
