"""How everything in bench/ is timed: providers take turns, and medians are compared.

Providers take turns in a shuffled order, one sample each a round, so that a machine that slows down slows all of them;
medians and the 20th and 80th percentile. On a CPU a sample is the mean of enough calls to last a millisecond;
``clock.py`` has the samples, those of a GPU too.
"""

import gc
import random
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from .clock import Call, Sampler, prepare_cpu, prepare_cuda, time_round_cuda


class Timing(NamedTuple):
    """Milliseconds a call. ``method``: "clock" (CPU), "graph" or "events" (CUDA), or "once" (one call, no warm-up)."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    num_samples: int
    method: str

    @property
    def noise(self) -> float:
        """(p80 - p20) / median: a difference smaller than this is not a difference."""
        return (self.p80_ms - self.p20_ms) / self.median_ms


class Refusal(NamedTuple):
    """Why a provider did not run a case."""

    reason: str



def compare(
    providers: Mapping[str, Call | Sequence[Call]], *, device: torch.device | str = "cpu", budget_s: float = 2.0,
    min_rounds: int = 5, max_rounds: int = 200, seed: int = 0, known_s: Mapping[str, float] | None = None,
) -> dict[str, Timing | Refusal]:  # fmt: skip
    """Times every provider beside the others; one that raises is a ``Refusal`` and does not stop the rest.

    A provider is a call without arguments, or several that do the same on different copies of their inputs. Warm-up
    (compilation included) is not timed. Rounds go on until ``budget_s`` seconds a provider are spent, between
    ``min_rounds`` and ``max_rounds``. ``known_s``: seconds of a call that has just been made, for providers that need
    no other to warm up if it was a long one (CPU).
    """
    on_cuda = torch.device(device).type == "cuda"
    ready: dict[str, Sampler] = {}
    refused: dict[str, Refusal] = {}
    for name, calls in providers.items():
        copies = [calls] if callable(calls) else list(calls)
        try:
            ready[name] = prepare_cuda(copies) if on_cuda else prepare_cpu(copies, (known_s or {}).get(name, 0.0))
        except Exception as error:  # whatever a peer raises is its result here
            refused[name] = refusal(error)
    samples: dict[str, list[float]] = {name: [] for name in ready}
    order, deal = list(ready), random.Random(seed)
    deadline = time.perf_counter() + budget_s * len(ready)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for round_index in range(max_rounds if ready else 0):
            deal.shuffle(order)
            if on_cuda:
                time_round_cuda(order, ready, samples)
            else:
                for name in order:
                    samples[name].append(ready[name].run())
            if round_index + 1 >= min_rounds and time.perf_counter() > deadline:
                break
    finally:
        if collecting:
            gc.enable()
    timed = {name: summarize(samples[name], ready[name].method) for name in ready}
    return {name: timed.get(name) or refused[name] for name in providers}


def summarize(samples_ms: Sequence[float], method: str) -> Timing:
    values = torch.tensor(samples_ms, dtype=torch.float64)
    p20, median, p80 = values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Timing(median, p20, p80, len(samples_ms), method)


def refusal(error: Exception) -> Refusal:
    lines = str(error).strip().splitlines()
    return Refusal(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)
