"""The result files."""

import json
import math

import pytest

from conceptron.bench.measure import resident, results, timing


def test_results_survive_the_round_trip(tmp_path):
    rows = [
        {"case": "a|b", "forward": timing.Timing(1.5, 1.25, 2.0, 9, "clock"), "peak": resident.Memory(10, 30)},
        {"case": "c", "forward": timing.Refusal("out of memory"), "error": math.nan},
    ]
    path = results.write_results(tmp_path / "new", "ops", rows, {"commit": "abc", "gpu": None}, title="Operators")
    read, stamp = results.read_results(path)
    assert stamp["commit"] == "abc"
    assert read[0]["forward"] == 1.5
    assert (read[0]["forward_p20"], read[0]["forward_p80"], read[0]["forward_samples"]) == (1.25, 2.0, 9)
    assert (read[0]["peak"], read[0]["peak_extra"]) == (30, 20)
    assert (read[0]["status"], read[1]) == (
        "measured",
        {"case": "c", "forward": None, "status": "out of memory", "error": None, "not_finite": ["error"]},
    )  # fmt: skip
    assert "NaN" not in path.read_text()
    header, first, second = path.with_suffix(".csv").read_text().splitlines()
    assert header.startswith("case,forward,forward_p20")
    assert first.startswith("a|b,1.5,1.25,2.0,9,clock,measured,30,20")
    assert second.startswith("c,,,,,,out of memory,") and "nan" not in second
    table = path.with_suffix(".md").read_text()
    assert table.startswith("# Operators\n")
    assert "a\\|b" in table
    assert "|---:|---:|" in table and "| error |" in table, "a column of numbers holds nothing else"
    assert "- commit: abc" in table
    assert "gpu" not in table
    assert sorted(p.name for p in path.parent.iterdir()) == ["ops.csv", "ops.json", "ops.md"]


@pytest.mark.parametrize(("before", "now"), [
    ({"N": 1, "time_ms": 2.5}, {"N": 1, "time_ms": 2.5, "status": "measured"}),
    ({"N": 1, "time_ms": "not run: why"}, {"N": 1, "time_ms": None, "status": "not run: why"}),
    ({"ms": "out of memory", "error": 1}, {"ms": None, "error": 1, "status": "out of memory"}),
    ({"C": 8, "measured_GiB": "exit code -9"}, {"C": 8, "measured_GiB": None, "status": "exit code -9"}),
    ({"C": 8, "failed": "exit code -9"}, {"C": 8, "status": "exit code -9"}),
    ({"row": "a", "ended": "not started"}, {"row": "a", "status": "not started"}),
    ({"recipe": "demo.yaml", "step_ms": 3.0}, {"recipe": "demo.yaml", "step_ms": 3.0}),
    ({"ms": None, "status": "why"}, {"ms": None, "status": "why"}),
])  # fmt: skip
def test_rows_of_earlier_versions_are_read(tmp_path, before, now):
    """They mixed words into columns of numbers, or called the status otherwise."""
    (tmp_path / "x.json").write_text(json.dumps({"environment": {}, "rows": [before]}))
    assert results.read_results(tmp_path / "x.json")[0] == results.read_rows(tmp_path / "x.json") == [now]
    assert results.flatten(now) == now


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (math.nan, "not finite"), (-math.inf, "not finite"), (0.123456, "0.1235"), (123456.7, "123457"),
     (7, "7")],
)
def test_cells(value, text):
    assert results.cell(value) == text


def test_only_rows_of_the_same_code_and_machine_are_gone_on_with(tmp_path):
    stamp = {"commit": "abc", "cpu": "some cpu", "threads": 2, "dtype": "float32", "date": "today"}
    path = results.write_results(tmp_path, "x", [{"N": 1}], stamp)
    assert results.rows_to_resume(path, stamp | {"date": "tomorrow"}) == [{"N": 1}]
    assert results.rows_to_resume(tmp_path / "none.json", stamp) == []
    for name, value in (("commit", "def"), ("threads", 1), ("gpu", "some gpu")):
        with pytest.raises(ValueError, match=f"has {name} .*choose another --out"):
            results.rows_to_resume(path, stamp | {name: value})
