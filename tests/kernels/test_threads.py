"""Pieces of work on several threads: in order, each on one, with the same results and the same errors."""

import threading
import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from conceptron.kernels.threads import in_order

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, params=[1, 2, 3])
def num_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


def results(items, work, device=CPU):
    found = []
    in_order(work, items, device, lambda item, part: found.append((item, part)))
    return found


@pytest.mark.parametrize("count", [0, 1, 2, 30])
def test_results_come_in_order(count):
    def slow_at_first(i):
        time.sleep(0.002 * (i % 3 == 0))
        return i * i

    assert results(range(count), slow_at_first) == [(i, i * i) for i in range(count)]


def test_each_piece_has_one_thread_and_no_gradient(num_threads):
    weight = torch.ones(3, requires_grad=True)
    found = results(range(8), lambda i: (torch.get_num_threads(), torch.is_grad_enabled(), threading.get_ident()))
    assert {part[0] for _, part in found} == {1}
    assert num_threads == 1 or not any(part[1] for _, part in found)
    assert num_threads == 1 or threading.get_ident() not in {part[2] for _, part in found}
    assert weight.grad is None


def test_no_more_results_wait_than_a_few(num_threads):
    """Or the parts of a long text would all be there at once."""
    made, held = [], []
    in_order(made.append, iter(range(100)), CPU, lambda *_: held.append(len(made) - len(held)))
    assert max(held) <= 3 * num_threads + 1


@pytest.mark.parametrize("place", ["work", "add", "items"])
def test_an_error_is_the_callers_and_nobody_works_on(place):
    running, after = [], []

    def fail(name, i):
        if place == name and i == 3:
            raise RuntimeError("four")

    def work(i):
        fail("work", i)
        time.sleep(0.001)
        (after if running else []).append(i)
        return i

    def items():
        for i in range(50):
            fail("items", i)
            yield i

    with pytest.raises(RuntimeError, match="four"):
        in_order(work, items(), CPU, lambda i, _: fail("add", i))
    running.append(True)
    time.sleep(0.01)
    assert after == []
    assert results(range(3), lambda i: i) == [(0, 0), (1, 1), (2, 2)]  # and the next call is as if nothing was


def test_in_inference_mode():
    total = torch.zeros(2)
    with torch.inference_mode():
        in_order(lambda i: torch.full((2,), float(i)), range(5), CPU, lambda _, part: total.add_(part))
    assert total.tolist() == [10.0, 10.0]


def test_whoever_watches_sees_all_of_it():
    me = threading.get_ident()
    with FakeTensorMode():
        assert all(part == me for _, part in results(range(4), lambda i: threading.get_ident()))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        results(range(4), lambda i: torch.empty(1000 + i).sum())
    assert sum(event.key == "aten::sum" and event.count == 4 for event in profile.key_averages()) == 1


def test_not_for_another_device():
    me = threading.get_ident()
    assert all(part == me for _, part in results(range(4), lambda i: threading.get_ident(), torch.device("cuda")))
