import json
import sys
import time
from pathlib import Path

import psutil
import pytest

from conceptron.__main__ import main, perform
from conceptron.bench import suite
from conceptron.bench.suite import CUT, DONE, FAILED, WAITING, Stage, closing_table, run_stage, run_stages, stages


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_stage_ends_as_it_ended(tmp_path, capfd):
    log = tmp_path / "log"
    assert run_stage(Stage("s", python("print('fine')"), 1), 30, log) == DONE
    assert log.read_text() == "fine\n" and "fine" in capfd.readouterr().out
    failing = python("import sys; print('RuntimeError: no kernel'); sys.exit(3)")
    assert run_stage(Stage("s", failing, 1), 30, log) == f"{FAILED}: RuntimeError: no kernel"
    slow = python("import time; print('begun', flush=True); time.sleep(60)")
    assert run_stage(Stage("s", slow, 1), 1, log) == CUT
    assert log.read_text() == "begun\n", "what a stage said before it was cut is kept"


def test_a_stage_that_is_cut_leaves_nothing_running(tmp_path):
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    assert run_stage(Stage("s", python(child), 1), 1, tmp_path / "log") == CUT
    pid = int((tmp_path / "log").read_text())
    for _ in range(50):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.02)
    pytest.fail("the process that the stage started still runs")


class Clock:
    """Time that passes only where a stage takes it."""

    def __init__(self, monkeypatch, takes: dict[str, float]):
        self.now, self.takes, self.allowed = 0.0, takes, {}
        monkeypatch.setattr(suite.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(suite, "run_stage", self.run_stage)

    def run_stage(self, stage: Stage, seconds: float, log: Path) -> str:
        self.allowed[stage.name] = seconds
        self.now += min(seconds, self.takes[stage.name])
        return DONE if self.takes[stage.name] <= seconds else CUT


LISTED = [Stage("a", [], 5), Stage("b", [], 3), Stage("c", [], 2)]


def test_no_stage_takes_another_ones_time(monkeypatch, tmp_path):
    clock, state = Clock(monkeypatch, {"a": 999, "b": 1, "c": 999}), {}
    run_stages(LISTED, state, tmp_path, 100)
    assert clock.allowed == {"a": 50, "b": 30, "c": 49}  # what b left over goes to c
    assert state == {"a": CUT, "b": DONE, "c": CUT} and clock.now == 100


def test_resume_runs_only_what_is_not_done_and_shares_all_time_among_it(monkeypatch, tmp_path):
    clock, state = Clock(monkeypatch, {"a": 70, "c": 30}), {"a": CUT, "b": DONE, "c": f"{FAILED}: x"}
    seen = []
    run_stages(LISTED, state, tmp_path, 140, lambda: seen.append(dict(state)))
    assert clock.allowed == {"a": 100, "c": 70}
    assert state == {"a": DONE, "b": DONE, "c": DONE}
    assert seen == [{"a": DONE, "b": DONE, "c": f"{FAILED}: x"}, state], "the state is written after each stage"


def test_without_time_nothing_is_started(monkeypatch, tmp_path):
    clock, state = Clock(monkeypatch, {}), {"b": CUT}
    run_stages(LISTED, state, tmp_path, 0.5)
    assert clock.allowed == {} and state == {"a": WAITING, "b": CUT, "c": WAITING}


@pytest.mark.parametrize("size", ["gpu", "cpu", "tiny"])
def test_every_stage_is_a_command_that_its_benchmark_accepts(size, tmp_path, monkeypatch):
    """The options are parsed by the benchmarks themselves, which are stopped before they measure."""
    from conceptron.bench import memory, scaling, step
    from conceptron.bench.kernels import run
    from conceptron.engine.recipe.load import load_recipe

    class Parsed(Exception):
        pass

    def stop(*args, **kwargs):
        raise Parsed

    for module in (memory, scaling, run):
        monkeypatch.setattr(module, "environment", stop)  # the first thing after the options
    names = []
    for stage in stages(tmp_path, size):
        names.append(stage.name)
        if stage.name == "correctness":
            assert Path(stage.command[-1]).is_dir() and stage.command[1:6] == ["-m", "pytest", "-q", "-m", "gpu"]
            continue
        assert stage.command[1:5] == ["-m", "conceptron", "bench", stage.name]
        assert stage.command[-2:] == ["--out", str(tmp_path / stage.name)]
        if stage.name == "step":
            recipe, *preset = step.PRESETS[stage.command[5]]
            assert load_recipe(recipe, preset).model["hidden_size"] == 512
            continue
        with pytest.raises(Parsed):
            perform(stage.command[3:])
    assert names == {
        "gpu": ["correctness", "kernels", "step", "scaling", "memory"], "cpu": ["kernels", "scaling", "memory"],
        "tiny": ["kernels", "scaling"],
    }[size]  # fmt: skip


def test_the_last_table_has_stages_crossovers_and_winners(tmp_path):
    from conceptron.bench.measure.results import write_results
    from conceptron.bench.measure.timing import Timing

    rows = [
        {"operator": "o", "case": "c", "mode": "both", "provider": name, "ms": Timing(ms, ms, ms, 9, "graph"),
         "accurate": True, "share_of_floor": 0.5, "tflops": ms, "gb_s": 1.0}
        for name, ms in (("conceptron", 2.0), ("SDPA flash", 3.0))
    ]  # fmt: skip
    stamp = {"gpu": "some gpu", "copy_gb_s": 4300.0, "matmul_tflops": 780.0}
    write_results(tmp_path / "kernels", "kernels", rows, stamp)
    (tmp_path / "scaling").mkdir()
    (tmp_path / "scaling" / "crossover.txt").write_text("train: concept is faster from N = 512 on\n")
    text = closing_table(tmp_path, {"kernels": DONE, "memory": CUT})
    assert "| memory | cut by the time limit |" in text and "concept is faster from N = 512 on" in text
    assert "| o | c | 2 | 0.5 | SDPA flash | 3 | 1.5 |" in text and text.endswith("go on with --resume")
    assert (tmp_path / "report.md").exists() and (tmp_path / "kernels" / "roofline.png").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no stage came as far as a result" in closing_table(empty, {"kernels": FAILED})


def test_refused(tmp_path, capsys):
    (tmp_path / "suite.json").write_text(json.dumps({"stages": {}}))
    assert main(["bench", "suite", "--out", str(tmp_path)]) == 2
    assert "add --resume" in capsys.readouterr().err
