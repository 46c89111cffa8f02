"""The comparison of operators: who is checked, timed, refused, and over whom a speed-up is stated."""

import signal
import time

import pytest
import torch

from conceptron.__main__ import perform
from conceptron.bench.figures import plot
from conceptron.bench.kernels import run
from conceptron.bench.kernels.cases import OPERATORS, make_inputs
from conceptron.bench.kernels.matrix import MATRICES
from conceptron.bench.kernels.providers import PROVIDERS, Prepared, Unavailable, providers_of
from conceptron.bench.measure.results import read_results
from conceptron.bench.measure.roofline import Ceilings
from conceptron.bench.measure.timing import Refusal, Timing

CPU = torch.device("cpu")
ADALN = next(case for case in MATRICES["small"]() if case.operator == "adaln")


REASONS = ("needs a GPU", "not installed: ", "has no backward on a CPU", f"torch {torch.__version__} has none",
           "no label smoothing", "materialises the logits", "no such")  # fmt: skip


def wrong(inputs):
    """Plain torch, a tenth too large."""
    right = PROVIDERS["eager"](inputs)
    return right._replace(outputs=lambda results: tuple(1.1 * x for x in results))


def missing(inputs):
    raise Unavailable("not installed: nothing")


def broken(inputs):
    right = PROVIDERS["eager"](inputs)
    return Prepared(lambda: 1 / 0, *right[1:])


def endless(inputs):
    time.sleep(30)


@pytest.fixture(scope="module")
def rows():
    names = {"eager": PROVIDERS["eager"], "wrong": wrong, "missing": missing, "broken": broken, "endless": endless}
    before = dict(PROVIDERS)
    PROVIDERS.update(names)
    try:
        shown = ["conceptron", "conceptron (torch)", *names]
        found = run.run_case(ADALN, shown, torch.float32, CPU, Ceilings(10.0, 0.1), budget_s=0.01, limit_s=0.5)
    finally:
        PROVIDERS.clear()
        PROVIDERS.update(before)
    return {(row["provider"], row["mode"]): row for row in found}


@pytest.mark.parametrize("mode", run.MODES)
def test_a_speed_up_is_stated_only_over_a_right_answer(rows, mode):
    ours, right, false = (rows[name, mode] for name in ("conceptron (torch)", "eager", "wrong"))
    assert ours["accurate"] and right["accurate"] and not false["accurate"]
    assert false["error"] > 0.05 > false["error_allowed"]
    assert isinstance(false["ms"], Timing), "it is timed and marked"
    assert false["ours_is_faster_by"] is None
    assert right["ours_is_faster_by"] == pytest.approx(right["ms"].median_ms / ours["ms"].median_ms)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("conceptron", "needs a GPU"), ("missing", "not installed: nothing"), ("endless", "TimeoutError: not ready after"),
     ("broken", "ZeroDivisionError: division by zero")],
)  # fmt: skip
def test_who_does_not_run_says_why(rows, name, reason):
    for mode in run.MODES:
        assert isinstance(rows[name, mode]["ms"], Refusal) and rows[name, mode]["ms"].reason.startswith(reason)
        assert "ours_is_faster_by" not in rows[name, mode]


def test_rates_are_the_work_over_the_time(rows):
    row = rows["eager", "forward"]
    floor = run.floor_of(ADALN, "forward", torch.float32, Ceilings(10.0, 0.1))
    assert row["gb_s"] == pytest.approx(floor.bytes / (row["ms"].median_ms * 1e-3) / 1e9)
    assert row["share_of_floor"] == pytest.approx(floor.us / (row["ms"].median_ms * 1e3))
    assert row["bound"] == "memory" and row["peak_mb"] > 0


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_row_that_is_shown_has_a_provider_that_answers_or_explains(operator):
    case = next(case for case in MATRICES["small"]() if case.operator == operator)
    inputs = make_inputs(case, torch.float32, CPU)
    truth, upstream = run.truth_of(inputs)
    for name in providers_of(operator):
        if name == "torch.compile":
            continue  # tests/benchmarks has it
        result = run.check(PROVIDERS[name], inputs, truth, upstream)
        if isinstance(result, Refusal):
            assert result.reason.startswith(REASONS), name
        else:
            assert result.error < 1e-4, name


def test_a_comparison_goes_on_where_it_was_cut(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "measure_ceilings", lambda device, dtype: Ceilings(10.0, 0.1))
    monkeypatch.setattr(plot, "SUFFIXES", ("png",))
    options = ["--matrix", "small", "--device", "cpu", "--seconds", "0.001", "--out", str(tmp_path), "--resume",
               "--providers", "conceptron (torch)", "eager"]  # fmt: skip
    perform(["bench", "kernels", "adaln", *options])
    first, _ = read_results(tmp_path / "kernels.json")
    measured = []
    real = run.run_case
    monkeypatch.setattr(run, "run_case", lambda case, *a, **k: measured.append(case.operator) or real(case, *a, **k))
    perform(["bench", "kernels", "adaln", "linear_cross_entropy", *options])
    rows, environment = read_results(tmp_path / "kernels.json")
    assert measured == ["linear_cross_entropy"] and rows[: len(first)] == first and len(rows) > len(first)
    assert environment["seed"] == 0 and environment["copy_gb_s"] == 10.0
    assert {path.name for path in tmp_path.glob("*.png")} == {"roofline.png", "speedup.png"}


def test_operators_take_turns_in_the_anchor_matrix():
    cases = MATRICES["anchor"]()
    assert {case.operator for case in cases[: len(OPERATORS)]} == set(OPERATORS)
    assert cases[0].label == "B64-N512-C128-H8-D64"


def test_a_time_limit_leaves_another_timer_as_it_was():
    rung = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(TimeoutError, match="not ready after"), run.time_limit(0.05):
            time.sleep(5)
        with run.time_limit(5):
            pass
        time.sleep(0.4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert rung == [1]
