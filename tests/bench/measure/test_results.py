"""The result files."""

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
    assert read[1] == {"case": "c", "forward": "out of memory", "error": None, "not_finite": ["error"]}
    assert "NaN" not in path.read_text()
    header, first, second = path.with_suffix(".csv").read_text().splitlines()
    assert header.startswith("case,forward,forward_p20")
    assert first.startswith("a|b,1.5,1.25,2.0,9,clock,30,20")
    assert second.startswith("c,out of memory,,")
    table = path.with_suffix(".md").read_text()
    assert table.startswith("# Operators\n")
    assert "a\\|b" in table
    assert "not finite" in table and "not measured" in table
    assert "- commit: abc" in table
    assert "gpu" not in table
    assert sorted(p.name for p in path.parent.iterdir()) == ["ops.csv", "ops.json", "ops.md"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "not measured"), (math.nan, "not finite"), (-math.inf, "not finite"), (0.123456, "0.1235"),
     (123456.7, "123457"), (7, "7")],
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
