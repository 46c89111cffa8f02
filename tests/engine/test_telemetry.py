"""The record of a run."""

import importlib.util
import json
import math
import shutil
import sys

import pytest
import torch

from conceptron.engine.errors import InputError
from conceptron.engine.launching.launch import World
from conceptron.engine.recipe.schema import Recipe
from conceptron.engine.telemetry import UNCOUNTED_STEPS, Clock, Telemetry, duration, forget_after, numbers
from conceptron.engine.trainer import train
from conceptron.models.masked_lm import smoothing_floor


@pytest.fixture
def telemetry(tmp_path):
    telemetry = Telemetry(tmp_path, World(0, 0, 1, torch.device("cpu")), first_step=0, total_steps=50)
    yield telemetry
    telemetry.close()


def test_every_line_is_on_file_at_once(telemetry, tmp_path):
    telemetry.record("train", 1, loss=0.1 + 0.2, lr=None)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"kind": "train", "step": 1, "loss": 0.1 + 0.2, "lr": None}  # all digits are kept


def test_a_run_whose_folder_is_deleted_ends_in_one_line(recipe, monkeypatch, capfd):
    """Before TensorBoard fails."""
    told = Telemetry.step

    def delete(self, now, *rest):
        told(self, now, *rest)
        if now == 2:
            self._board.flush()  # its thread has written all and waits, as it does for most of a longer step
            shutil.rmtree(self._folder.parent)

    monkeypatch.setattr(Telemetry, "step", delete)
    with pytest.raises(InputError, match=r"tiny/tb: gone, deleted or moved .* ends at step 3; put it back") as caught:
        train(recipe, ["eval.every=0", "checkpoint.every=0"])
    assert "\n" not in str(caught.value) and "Traceback" not in capfd.readouterr().err


def test_what_is_not_finite_is_null_in_the_record_and_said_in_words(telemetry, tmp_path, capfd):
    telemetry.record("train", 1, loss=math.nan, grad_norm=math.inf, lr=0.5, terms={"vicreg": math.nan})
    telemetry.step(1, math.nan, None)
    telemetry.evaluation(2, {"nll_unseen": math.nan, "nll_seen": None})
    line, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "kind": "train", "step": 1, "loss": None, "grad_norm": None, "lr": 0.5,
        "terms": {"vicreg": None, "not_finite": ["vicreg"]}, "not_finite": ["loss", "grad_norm"],
    }  # fmt: skip
    assert json.loads(second)["not_finite"] == ["nll_unseen"]
    said = capfd.readouterr().err
    assert "loss not finite" in said and "nll_unseen not finite" in said and "nan" not in said
    assert dict(numbers("train", {"loss": math.nan, "lr": 0.5})) == {"train/lr": 0.5}


def test_figures_at_each_ratio_are_said_beside_the_others(telemetry, capfd):
    of_part = {"diffusion": {"nll_unseen": 4.0, "nll_seen": None}, "mlm": {"nll_unseen": 3.0, "nll_seen": 2.0}}
    telemetry.evaluation(3, {"nll_unseen": 5.0, "ratios": {"r=4": {"nll_unseen": 6.0}, "r=8": {"parts": of_part}}})
    said = "nll_unseen 5.0000, r=4 nll_unseen 6.0000, r=8 diffusion nll_unseen 4.0000, r=8 mlm nll_unseen 3.0000, "
    assert f"nats per token: {said}r=8 mlm nll_seen 2.0000" in capfd.readouterr().err


def test_tensorboard_gets_the_numbers(telemetry, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    telemetry.record("eval", 7, loss=1.5, nll_seen=None, nll_by_t={"t=0.10": 2.5})
    telemetry.close()
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert set(events.Tags()["scalars"]) == {"eval/loss", "eval/nll_by_t/t=0.10"}
    (event,) = events.Scalars("eval/nll_by_t/t=0.10")
    assert (event.step, event.value) == (7, 2.5)


class FakeProject:
    """Takes what W&B would."""

    Error, Settings = type("Error", (Exception,), {}), staticmethod(lambda **given: given)

    def __init__(self):
        self.logged, self.given, self.is_over, self.fault = [], [], False, ""

    def init(self, **given):
        if self.fault:
            raise self.Error(self.fault)
        self.given.append(given)
        return self

    def log(self, figures, step):
        self.logged.append((step, figures))

    def finish(self):
        self.is_over = True


@pytest.fixture
def project(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeProject())
    return sys.modules["wandb"]


def test_a_project_gets_the_numbers_and_the_same_run_again(project, tmp_path):
    sections = {"data": {}, "objective": {"name": "mlm"}, "train": {"steps": 9}, "logging": {"wandb": "long-texts"}}
    recipe, world = Recipe.model_validate(sections), World(0, 0, 1, torch.device("cpu"))
    for _ in range(2):
        telemetry = Telemetry(tmp_path, world, 0, 9, recipe=recipe)
        telemetry.record("train", 3, loss=1.5, task={"a": 2}, named="x", gone=math.nan)
        telemetry.close()
    first, second = project.given
    assert first == second and first["project"] == "long-texts" and first["config"]["train"]["steps"] == 9
    assert project.logged == 2 * [(3, {"train/loss": 1.5, "train/task/a": 2})] and project.is_over
    project.fault = "no API key\nconfigured"
    with pytest.raises(InputError, match=r"logging.wandb: no API key configured; wandb login, set WANDB_MODE=offline"):
        Telemetry(tmp_path, world, 0, 9, recipe=recipe)
    Telemetry(tmp_path, World(1, 1, 2, torch.device("cpu")), 0, 9, recipe=recipe)  # opens nothing


def test_a_project_without_its_package_is_refused_before_anything_is_written(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"logging.wandb: the package wandb is not installed; pip install wandb, or"):
        train(recipe, ["logging.wandb=texts"])
    assert [path.name for path in recipe.parent.iterdir()] == ["tiny.yaml"]


def test_without_a_terminal_there_are_plain_lines(telemetry, capfd):
    for step in range(1, 51):
        telemetry.step(step, 2.0, 1234.5)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2  # the first and the last: the others came within ten seconds
    assert lines[0].startswith("step 1/50  loss 2.0000  1,234 tokens/s  ") and lines[-1].startswith("step 50/50")


def test_the_floor_of_a_smoothed_loss_stands_beside_it(tmp_path, capfd):
    telemetry = Telemetry(tmp_path, World(0, 0, 1, torch.device("cpu")), 0, 5, floor=smoothing_floor(0.1, 50368))
    telemetry.step(1, 1.433, None)
    telemetry.close()
    assert capfd.readouterr().err.startswith("step 1/5  loss 1.4330 (floor 1.4078)  ...")


def test_other_ranks_are_silent(tmp_path, capfd):
    telemetry = Telemetry(tmp_path, World(1, 1, 2, torch.device("cpu")), 0, 5)
    telemetry.record("train", 1, loss=1.0)
    telemetry.step(1, 1.0, None)
    telemetry.say("hello")
    telemetry.close()
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


def test_lines_to_be_written_again_are_removed(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    entries = [("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("end", 2)]
    lines = [json.dumps({"kind": kind, "step": step}) for kind, step in entries]
    metrics.write_text("\n".join(lines) + '\n{"kind": "train", "st')  # killed while writing
    forget_after(metrics, 2)
    assert metrics.read_text() == "\n".join(lines[:3]) + "\n"


def test_speed_leaves_out_the_first_steps_and_what_is_not_training(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock, speeds = Clock(), []
    for seconds in [9.0] * UNCOUNTED_STEPS + [2.0, 3.0]:
        now[0] += seconds
        speeds.append(clock.step(1000))
        now[0] += 50.0  # an evaluation
        clock.restart()
    assert speeds == [None] * UNCOUNTED_STEPS + [1000 / 2, 1000 / 3]
    assert clock.tokens_per_s == 2000 / 5 and clock.elapsed_s == 9 * UNCOUNTED_STEPS + 5


@pytest.mark.parametrize("seconds, text", [(0.4, "0m00s"), (61, "1m01s"), (7325, "2h02m")])
def test_durations(seconds, text):
    assert duration(seconds) == text
