"""Work on a CPU in pieces, as many at a time as torch has threads, with results that do not depend on how many.

OpenMP divides every single operation, and threads that sleep while they wait take about 30 us to begin: an operation of
20 to 80 us, which is what a piece that stays in the caches is made of, is faster on one thread. So each piece is worked
on by one thread from end to end; torch's operations let the others go on meanwhile.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from itertools import chain, islice
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

Item = TypeVar("Item")
Part = TypeVar("Part")


def in_order(
    work: Callable[[Item], Part], items: Iterable[Item], device: torch.device,
    add: Callable[[Item, Part], object] = lambda item, part: None,
) -> None:  # fmt: skip
    """``add(item, work(item))`` for every item; ``add`` in their order, by the caller's thread. The same bits on any
    number of threads, since what is one item's is one thread's. ``work`` runs without gradient, and writes to nothing
    that another item's reads.

    Of another device, whose operations do not wait, one after the other; so, too, where somebody watches operations (a
    profiler, tensors without content, a count of FLOPs), which torch does one thread at a time.
    """
    num_threads, is_inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    if num_threads == 1 or device.type != "cpu":
        for item in items:
            add(item, work(item))
        return
    items, waiting = iter(items), deque()
    first = list(islice(items, 2))
    with _one_thread_each(num_threads):
        if len(first) < 2 or is_watched():
            for item in chain(first, items):
                add(item, work(item))
            return
        pool = _pool(os.getpid(), num_threads)
        try:
            for item in chain(first, items):
                waiting.append((item, pool.submit(_alone, work, item, is_inference)))
                if len(waiting) > 2 * num_threads:  # no more results than these wait for their turn
                    _take(waiting, add)
            while waiting:
                _take(waiting, add)
        finally:  # after an error: nobody works on what the caller may free
            wait([future for _, future in waiting if not future.cancel()])


def is_watched() -> bool:
    return torch.autograd._profiler_enabled() or _get_current_dispatch_mode() is not None


def _take(waiting: "deque[tuple[Item, Future[Part]]]", add: Callable[[Item, Part], object]) -> None:
    item, future = waiting[0]
    add(item, future.result())
    waiting.popleft()


def _alone(work: Callable[[Item], Part], item: Item, is_inference: bool) -> Part:
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)  # of this thread
    with torch.inference_mode(is_inference), torch.no_grad():
        return work(item)


@contextmanager
def _one_thread_each(num_threads: int) -> Iterator[None]:
    """What torch and its libraries divide by belongs in part to the process, in part to each thread."""
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@cache
def _pool(pid: int, num_threads: int) -> ThreadPoolExecutor:
    """One for each process: a fork has the other's pool without its threads."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix="conceptron")
