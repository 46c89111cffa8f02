"""Times, rates and sizes of a step."""

import pytest
import torch

from conceptron.engine import meter
from conceptron.engine.meter import Meter, Stopwatch, matmul_flops
from conceptron.engine.nvml import NoMonitor

CPU = torch.device("cpu")


def test_phases_are_told_apart_and_nothing_between_steps_counts(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    watch = Stopwatch(CPU)
    for seconds, phase in ((1, "data"), (2, "forward"), (4, "backward"), (8, "forward"), (16, "optimizer")):
        now[0] += seconds
        watch.lap(phase)
    assert watch.take() == {"data": 1, "forward": 10, "backward": 4, "optimizer": 16}
    now[0] += 100  # an evaluation
    watch.begin()
    now[0] += 3
    watch.lap("data")
    assert watch.take() == {"data": 3} and watch.take() == {}


def test_utilisation_is_of_the_rate_that_was_measured(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(meter, "matmul_flops", lambda *given: 4e12)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    of_run = Meter(CPU, "fp32")
    now[0] += 2.0
    of_run.watch.lap("forward")
    figures = of_run.figures(flops=6e12)
    assert (figures["tflops"], figures["mfu"]) == (3.0, 0.75) and figures["memory"]["host_peak_bytes"] > 2**20
    assert "gpu" not in figures
    of_run.monitor = NoMonitor("not installed: nvidia-ml-py")
    assert of_run.figures(None)["gpu"] == {"nvml": "not installed: nvidia-ml-py"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_leaves_random_numbers_alone(dtype):
    before = torch.random.get_rng_state()
    assert matmul_flops(CPU, dtype, 32, 2) > 0
    assert torch.equal(before, torch.random.get_rng_state())
