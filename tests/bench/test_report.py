import re
from pathlib import Path

import pytest

from conceptron.bench.compare import compare_folders, slower
from conceptron.bench.documents.paste import BLOCK, fill
from conceptron.bench.figures import plot
from conceptron.bench.kernels.best import best_peers
from conceptron.bench.measure.exponents import write_tables
from conceptron.bench.measure.results import read_results, write_results
from conceptron.bench.measure.timing import Timing
from conceptron.bench.report import report

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = ("README.md", "docs/numbers.md", "docs/log.md")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_pasted_tables_equal_the_committed_results(name):
    text = (ROOT / name).read_text()
    assert BLOCK.search(text), f"{name} has no table of measured numbers"
    assert fill(text, ROOT) == text, f"{name}: run conceptron bench report bench/results/cpu --paste {name}"


def test_fill_writes_the_columns_that_the_marker_names(tmp_path):
    rows = [{"encoder": "a", "of time": 1.5, "hidden": 3}]
    write_results(tmp_path, "x", rows, {"cpu": "some cpu", "date": "today"})
    text = "before\n<!-- numbers: x.json encoder of_time -->\nstale\n<!-- end -->\nafter\n"
    filled = fill(text, tmp_path)
    assert "| a | 1.5 |" in filled and "cpu some cpu; date today" in filled
    assert "stale" not in filled and "hidden" not in filled and filled.endswith("after\n")
    assert fill(filled, tmp_path) == filled
    with pytest.raises(ValueError, match="no column 'nonsense'"):
        fill(text.replace("of_time", "nonsense"), tmp_path)
    missing = fill(text.replace("x.json", "y.json"), tmp_path)
    assert "\nNot measured.\n" in missing and "stale" not in missing


def test_words_in_a_sentence_are_written_from_the_rows(tmp_path):
    rows = [{"encoder": "a", "phase": "train", "N": n, "time_ms": ms, "peak_bytes": b, "status": status}
            for n, ms, b, status in ((512, 1.0, 8, "measured"), (1024, 2.0, 32, "measured"),
                                     (2048, None, None, "not run"))]  # fmt: skip
    write_results(tmp_path, "x", rows, {})
    write_tables(tmp_path, rows, {})
    text = "From <!-- words: x.json lengths -->stale<!-- end -->.\n"
    text += "<!-- words: exponents.json exponents --><!-- end -->\n"
    filled = fill(text, tmp_path)
    assert "-->512 to 1K tokens<!-- end -->." in filled and "stale" not in filled, "what did not run does not count"
    assert "-->a (up to 1K) time N^1.00, memory N^2.00<!-- end -->" in filled
    assert fill(filled, tmp_path) == filled
    assert "-->not measured<!-- end -->" in fill(text.replace("x.json", "y.json"), tmp_path)
    with pytest.raises(ValueError, match="expected words of lengths, exponents, got 'nonsense'"):
        fill(text.replace("lengths", "nonsense"), tmp_path)


def measured(ms: float, spread: float, provider: str = "conceptron") -> dict:
    quantiles = {"ms": ms, "ms_p20": ms * (1 - spread / 2), "ms_p80": ms * (1 + spread / 2), "ms_samples": 9}
    return {"operator": "o", "case": "c", "mode": "both", "provider": provider, **quantiles}


@pytest.mark.parametrize(
    ("now", "spread", "found"),
    [(1.04, 0.0, False), (1.06, 0.0, True), (1.25, 0.2, False), (1.5, 0.2, True), (0.5, 0.0, False)],
)
def test_slower_means_beyond_the_noise(now, spread, found):
    assert bool(slower([measured(1.0, spread)], [measured(now, spread)])) == found


def test_one_sample_does_not_know_its_noise():
    """A call that was made once has p20 = p80; its noise is taken from the rows that have some."""
    single = {**measured(1.0, 0.0, "once"), "ms_samples": 1}
    old, new = [measured(1.0, 0.3), single], [measured(1.0, 0.3), {**single, "ms": 1.5, "ms_p20": 1.5, "ms_p80": 1.5}]
    assert slower(old, new) == []
    (row,) = slower([single], [{**single, "ms": 1.5}])  # nothing knows of any noise
    assert (row["what"], row["slower by"], row["noise"]) == ("o c both once", "50 %", "0 %")


def test_the_worst_comes_first():
    old, new = ([measured(ms, 0.0, name) for name, ms in pairs] for pairs in (
        (("a", 1.0), ("b", 1.0), ("c", 1.0)), (("a", 1.2), ("b", 3.0), ("c", 1.0)),
    ))  # fmt: skip
    assert [row["what"].split()[-1] for row in slower(old, new)] == ["b", "a"]


def test_compare_folders(tmp_path):
    for folder, ms in (("old", 1.0), ("new", 2.0)):
        rows = [{"operator": "o", "case": "c", "mode": "both", "provider": "p", "ms": Timing(ms, ms, ms, 5, "clock")}]
        write_results(tmp_path / folder / "kernels", "kernels", rows, {})
    found, count = compare_folders(tmp_path / "old", tmp_path / "new")
    assert count == 1 and found[0]["slower by"] == "100 %"
    with pytest.raises(FileNotFoundError, match="no result"):
        compare_folders(tmp_path / "old", tmp_path)


def test_best_peer_must_be_accurate():
    rows = [
        {**measured(2.0, 0), "accurate": True, "share_of_floor": 0.5},
        {**measured(1.0, 0, "wrong"), "accurate": False},
        {**measured(3.0, 0, "right"), "accurate": True},
        {**measured(9.0, 0, "slow"), "accurate": True},
        {"operator": "o", "case": "c", "mode": "both", "provider": "absent", "ms": "not installed"},
    ]
    (line,) = best_peers(rows)
    assert (line["best peer"], line["ours is faster by"]) == ("right", 1.5)


def test_report_of_an_empty_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no result files"):
        report(tmp_path)


RESULTS = sorted(path for path in (ROOT / "bench" / "results").rglob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: str(path.relative_to(ROOT / "bench" / "results")))
def test_every_committed_result_says_where_it_comes_from(path):
    rows, environment = read_results(path)
    assert rows
    for name in ("commit", "date", "command", "torch", "triton", "cpu", "threads"):
        assert environment[name] is not None, f"{name} is not stamped"
    assert environment["dirty"] is False, "measured on code that no commit holds"
    assert environment["command"].startswith(("conceptron bench ", "conceptron evaluate "))
    assert not re.search(r"[ =][/~]", environment["command"]), "a path of one machine; a shipped recipe has its name"
    if environment["gpu"]:
        assert environment["driver"] and environment["cudnn"] and environment["ptxas"]


def test_a_report_of_what_a_time_limit_left(tmp_path, monkeypatch):
    """One row of each, or only rows that say why nothing was measured."""
    monkeypatch.setattr(plot, "SUFFIXES", ("png",))
    case = {"encoder": "concept", "phase": "forward", "N": 512, "C": 128}
    memory = {"parameters": 4, "gradients": 4, "optimizer": 8, "activations: encoder": 2048, "temporary": 1,
              "allocator_peak": 2**20, "resident_peak": 2**21}  # fmt: skip
    ran = {"scaling": [{**case, "time_ms": 3.0, "peak_bytes": 2**20}], "memory": [{**case, **memory}]}
    not_run = {"scaling": [{**case, "time_ms": None, "peak_bytes": None, "status": "not run: why"}],
               "memory": [{**case, "status": "RuntimeError: why"}]}  # fmt: skip
    for folder, results in (("ran", ran), ("not run", not_run)):
        for name, rows in results.items():
            write_results(tmp_path / folder / name, name, rows, {"gpu": "some gpu"})
        text = report(tmp_path / folder).read_text()
        assert "## scaling/scaling" in text and ("why" in text) == (folder == "not run")
    assert (tmp_path / "ran" / "memory" / "memory.png").exists()
