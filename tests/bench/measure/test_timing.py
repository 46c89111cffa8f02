"""The clock: who takes turns with whom."""

import time

import pytest
import torch

from conceptron.bench.measure import timing


def test_compare_ranks_by_time_and_names_refusals():
    def broken():
        raise NotImplementedError("no kernel for this dtype\nlong explanation")

    big = torch.randn(400, 400)
    found = timing.compare(
        {"slow": lambda: [big @ big for _ in range(20)], "broken": broken, "fast": lambda: big @ big},
        budget_s=0.2,
    )
    assert list(found) == ["slow", "broken", "fast"]
    assert found["broken"] == timing.Refusal("NotImplementedError: no kernel for this dtype")
    assert found["slow"].median_ms > 5 * found["fast"].median_ms
    for name in ("slow", "fast"):
        each = found[name]
        assert each.p20_ms <= each.median_ms <= each.p80_ms
        assert each.num_samples >= 5
        assert each.method == "clock"


def test_compare_measures_milliseconds_a_call():
    result = timing.compare({"sleep": lambda: time.sleep(0.004)}, budget_s=0.1)["sleep"]
    assert 4.0 <= result.median_ms < 12.0


def test_providers_take_turns():
    log = []
    providers = {name: (lambda name=name: log.append(name) or time.sleep(2e-3)) for name in "abc"}
    timing.compare(providers, budget_s=0.05, min_rounds=8, max_rounds=8)
    measured = log[-8 * 3 :]  # a call is longer than a sample must be, so one call is one sample
    rounds = ["".join(measured[i : i + 3]) for i in range(0, len(measured), 3)]
    assert all(sorted(each) == list("abc") for each in rounds)
    assert len(set(rounds)) > 1, "the order must change, or one provider always follows the same other"


def test_copies_are_walked_over():
    seen = []
    calls = [lambda i=i: seen.append(i) or time.sleep(1e-3) for i in range(3)]
    timing.compare({"x": calls}, budget_s=0.02, min_rounds=2, max_rounds=2)
    assert seen[-6:] == [0, 1, 2, 0, 1, 2]


def test_summarize_interpolates():
    summary = timing.summarize([4.0, 1.0, 3.0, 2.0, 5.0, 6.0], "clock")
    assert summary[:4] == pytest.approx((3.5, 2.0, 5.0, 6))
    assert summary.noise == pytest.approx(3.0 / 3.5)


@pytest.mark.gpu
def test_graph_replay_times_a_known_copy():
    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    result = timing.compare({"copy": lambda: target.copy_(source)}, device="cuda", budget_s=0.5)["copy"]
    assert result.method == "graph"
    assert 2 * 2**28 / (result.median_ms * 1e-3) < 2e13, "faster than any memory: the copy was not timed"


def test_a_long_call_that_was_just_made_needs_no_warm_up():
    calls = []
    timing.compare({"x": lambda: calls.append(1)}, min_rounds=3, max_rounds=3, known_s={"x": 1.5})
    assert len(calls) == 3
    quick = []
    timing.compare({"x": lambda: quick.append(1)}, min_rounds=3, max_rounds=3, known_s={"x": 1e-3})
    assert len(quick) > 3, "a quick one is warmed up whatever is known of it"
