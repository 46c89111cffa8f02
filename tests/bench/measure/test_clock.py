"""How a GPU's samples are taken, on a stand-in for torch.cuda that runs calls at once: what is captured, and where."""

import contextlib
import time
import types

import pytest
import torch

from conceptron.bench.measure import clock, timing

log: list[str] = []


class Event:
    def __init__(self, enable_timing: bool):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class Graph:
    def replay(self):
        log.append("replay")


@contextlib.contextmanager
def capture(graph, stream):
    assert stream == "own stream", "the graph of a backward pass is captured where its forward pass ran"
    log.append("capture")
    yield


@pytest.fixture
def cuda(monkeypatch):
    state = types.SimpleNamespace(mode=0, current="default")

    @contextlib.contextmanager
    def stream(which):
        before, state.current = state.current, which
        yield
        state.current = before

    properties = types.SimpleNamespace(L2_cache_size=60 << 20)
    fakes = {
        "Event": Event, "CUDAGraph": Graph, "graph": capture, "synchronize": lambda *device: None,
        "_sleep": lambda cycles: None, "current_device": lambda: 0, "Stream": lambda device: "own stream",
        "stream": stream, "get_sync_debug_mode": lambda: state.mode,
        "set_sync_debug_mode": lambda mode: setattr(state, "mode", mode),
        "get_device_properties": lambda device: properties,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(clock, "_streams", {})
    log.clear()
    return state


def test_a_round_replays_every_providers_graph(cuda):
    copies = [lambda: log.append("x0"), lambda: log.append("x1")]
    with clock.own_stream("cuda"):
        assert cuda.current == "own stream"
        results = timing.compare({"x": copies, "y": lambda: None}, device="cuda", min_rounds=4, max_rounds=4)
    assert cuda.current == "default"
    assert [results[name].method for name in "xy"] == ["graph", "graph"] and results["x"].num_samples == 4
    captured = log[log.index("capture") + 1 :]
    body = [entry for entry in captured[: captured.index("replay")] if entry.startswith("x")]
    assert body[:4] == ["x0", "x1", "x0", "x1"], "the copies take turns, so that L2 is cold"
    assert log.count("replay") == 2 * (1 + 4), "once after each capture, then once a round"


def test_a_call_that_waits_for_the_device_is_not_captured(cuda):
    def call():
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    assert clock.prepare_cuda([call]).method == "events" and "capture" not in log
    assert cuda.mode == 0, "the mode is put back"


def test_a_long_call_is_not_captured(cuda, monkeypatch):
    monkeypatch.setattr(clock, "elapsed_ms", lambda call: 150.0)
    sampler = clock.prepare_cuda([lambda: None])
    assert (sampler.method, sampler.num_calls) == ("events", 1) and "capture" not in log


def test_enough_copies_for_a_cold_l2(cuda):
    assert clock.num_cold_copies(90 << 20) == 3  # 2 others of 90 MiB pass three times 60 MiB
    assert clock.num_cold_copies(1 << 20) == 64 and clock.num_cold_copies(1 << 20, limit=8) == 8


def test_a_cpu_needs_no_stream():
    with clock.own_stream("cpu"):
        assert timing.compare({"x": lambda: None}, min_rounds=1, max_rounds=1)["x"].method == "clock"
