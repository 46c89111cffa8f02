"""The clock, the memory gauge and the result files."""

import json
import math
import sys
import textwrap
import time

import pytest
import torch

from conceptron.bench import harness


def test_compare_ranks_by_time_and_names_refusals():
    def broken():
        raise NotImplementedError("no kernel for this dtype\nlong explanation")

    big = torch.randn(400, 400)
    results = harness.compare(
        {"slow": lambda: [big @ big for _ in range(20)], "broken": broken, "fast": lambda: big @ big},
        budget_s=0.2,
    )
    assert list(results) == ["slow", "broken", "fast"]
    assert results["broken"] == harness.Refusal("NotImplementedError: no kernel for this dtype")
    assert results["slow"].median_ms > 5 * results["fast"].median_ms
    for name in ("slow", "fast"):
        timing = results[name]
        assert timing.p20_ms <= timing.median_ms <= timing.p80_ms
        assert timing.num_samples >= 5
        assert timing.method == "clock"


def test_compare_measures_milliseconds_a_call():
    result = harness.compare({"sleep": lambda: time.sleep(0.004)}, budget_s=0.1)["sleep"]
    assert 4.0 <= result.median_ms < 12.0


def test_providers_take_turns():
    log = []
    providers = {name: (lambda name=name: log.append(name) or time.sleep(2e-3)) for name in "abc"}
    harness.compare(providers, budget_s=0.05, min_rounds=8, max_rounds=8)
    measured = log[-8 * 3 :]  # a call is longer than a sample must be, so one call is one sample
    rounds = ["".join(measured[i : i + 3]) for i in range(0, len(measured), 3)]
    assert all(sorted(each) == list("abc") for each in rounds)
    assert len(set(rounds)) > 1, "the order must change, or one provider always follows the same other"


def test_copies_are_walked_over():
    seen = []
    calls = [lambda i=i: seen.append(i) or time.sleep(1e-3) for i in range(3)]
    harness.compare({"x": calls}, budget_s=0.02, min_rounds=2, max_rounds=2)
    assert seen[-6:] == [0, 1, 2, 0, 1, 2]


def test_summarize_interpolates():
    timing = harness.summarize([4.0, 1.0, 3.0, 2.0, 5.0, 6.0], "clock")
    assert timing[:4] == pytest.approx((3.5, 2.0, 5.0, 6))
    assert timing.noise == pytest.approx(3.0 / 3.5)


CHILD = """
    import psutil
    def touch(num_bytes):
        before = psutil.Process().memory_info().rss
        keep = bytearray(num_bytes)
        keep[::4096] = b"x" * len(keep[::4096])  # pages are not resident until written
        def call():
            big = bytearray(2 * num_bytes)
            big[::4096] = b"x" * len(big[::4096])
            return {"before": before, "kept": len(keep)}
        return call
"""


def test_resident_peak_is_of_the_child_alone(tmp_path, monkeypatch):
    (tmp_path / "child_of_test.py").write_text(textwrap.dedent(CHILD))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    mb = 2**20
    ballast = bytearray(400 * mb)
    ballast[::4096] = b"x" * len(ballast[::4096])  # a large parent must not show in the child
    memory, result = harness.resident_peak("child_of_test:touch", num_bytes=100 * mb)
    assert result["kept"] == 100 * mb
    assert memory.baseline_bytes - result["before"] == pytest.approx(100 * mb, rel=0.1)
    assert memory.extra_bytes == pytest.approx(200 * mb, rel=0.05)


def test_resident_peak_tells_why_the_child_failed(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Traceback >&2\necho 'MemoryError: no room' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RuntimeError, match="some:thing: MemoryError: no room"):
        harness.resident_peak("some:thing")


def test_results_survive_the_round_trip(tmp_path):
    rows = [
        {"case": "a|b", "forward": harness.Timing(1.5, 1.25, 2.0, 9, "clock"), "peak": harness.Memory(10, 30)},
        {"case": "c", "forward": harness.Refusal("out of memory"), "error": math.nan},
    ]
    path = harness.write_results(tmp_path / "new", "ops", rows, {"commit": "abc", "gpu": None}, title="Operators")
    read, environment = harness.read_results(path)
    assert environment["commit"] == "abc"
    assert read[0]["forward"] == 1.5
    assert (read[0]["forward_p20"], read[0]["forward_p80"], read[0]["forward_samples"]) == (1.25, 2.0, 9)
    assert (read[0]["peak"], read[0]["peak_extra"]) == (30, 20)
    assert read[1] == {"case": "c", "forward": "out of memory", "error": None}
    assert "NaN" not in path.read_text()
    header, first, second = path.with_suffix(".csv").read_text().splitlines()
    assert header.startswith("case,forward,forward_p20")
    assert first.startswith("a|b,1.5,1.25,2.0,9,clock,30,20")
    assert second.startswith("c,out of memory,,")
    table = path.with_suffix(".md").read_text()
    assert table.startswith("# Operators\n")
    assert "a\\|b" in table
    assert "not measured" in table
    assert "- commit: abc" in table
    assert "gpu" not in table
    assert sorted(p.name for p in path.parent.iterdir()) == ["ops.csv", "ops.json", "ops.md"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    harness.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        harness.write_json(path, {"a": object()})
    path.chmod(0o644)
    with pytest.raises(FileNotFoundError):
        harness.write_text(tmp_path / "missing" / "x.md", "text")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "not measured"), (math.nan, "not measured"), (0.123456, "0.1235"), (123456.7, "123457"), (7, "7")],
)
def test_cells(value, text):
    assert harness.cell(value) == text


def test_environment_names_what_decides_a_number():
    stamp = harness.environment(seed=3)
    assert stamp["torch"] == torch.__version__
    assert stamp["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    for name in ("commit", "cpu", "gpu", "driver", "triton", "cudnn", "ptxas", "transformers", "deepspeed", "date",
                 "command", "threads"):  # fmt: skip
        assert name in stamp, name
    assert stamp["seed"] == 3
    assert stamp["cpu"]
    json.dumps(stamp)
    if not torch.cuda.is_available():
        assert stamp["gpu"] is None


@pytest.mark.gpu
def test_graph_replay_times_a_known_copy():
    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    result = harness.compare({"copy": lambda: target.copy_(source)}, device="cuda", budget_s=0.5)["copy"]
    assert result.method == "graph"
    assert 2 * 2**28 / (result.median_ms * 1e-3) < 2e13, "faster than any memory: the copy was not timed"


def test_a_long_call_that_was_just_made_needs_no_warm_up():
    calls = []
    harness.compare({"x": lambda: calls.append(1)}, min_rounds=3, max_rounds=3, known_s={"x": 1.5})
    assert len(calls) == 3
    quick = []
    harness.compare({"x": lambda: quick.append(1)}, min_rounds=3, max_rounds=3, known_s={"x": 1e-3})
    assert len(quick) > 3, "a quick one is warmed up whatever is known of it"


def test_only_rows_of_the_same_code_and_machine_are_gone_on_with(tmp_path):
    stamp = {"commit": "abc", "cpu": "some cpu", "threads": 2, "dtype": "float32", "date": "today"}
    path = harness.write_results(tmp_path, "x", [{"N": 1}], stamp)
    assert harness.rows_to_resume(path, stamp | {"date": "tomorrow"}) == [{"N": 1}]
    assert harness.rows_to_resume(tmp_path / "none.json", stamp) == []
    for name, value in (("commit", "def"), ("threads", 1), ("gpu", "some gpu")):
        with pytest.raises(ValueError, match=f"measured with {name}.*choose another --out"):
            harness.rows_to_resume(path, stamp | {name: value})


def test_a_copy_without_git_is_the_commit_that_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "bench" / "harness.py"))
    monkeypatch.delenv("CONCEPTRON_COMMIT", raising=False)
    assert harness.checkout() == (None, None)
    monkeypatch.setenv("CONCEPTRON_COMMIT", "abc123-dirty")
    assert harness.checkout() == ("abc123", True)
    monkeypatch.setenv("CONCEPTRON_COMMIT", "abc123")
    assert harness.checkout() == ("abc123", False)


def test_the_stamped_command_leaves_out_where_results_went(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/conceptron", "bench", "memory", "--out", "/tmp/x", "--fit", "2"])
    assert harness.environment()["command"] == "conceptron bench memory --fit 2"
