"""train.precision: auto, and what it does not change."""

import pytest
import torch

from conceptron.engine import precision
from conceptron.engine.launching import launch
from conceptron.engine.recipe.schema import Recipe
from conceptron.engine.trainer import train

CPU = launch.World(0, 0, 1, torch.device("cpu"))


def recipe(width: int, wanted: str = "auto", folder: str = "runs", resume: str = "never") -> Recipe:
    return Recipe.model_validate({
        "data": {}, "objective": {"name": "mlm"}, "train": {"steps": 1, "precision": wanted}, "resume": resume,
        "model": {"hidden_size": width}, "run": {"name": "x", "folder": folder},
    })  # fmt: skip


@pytest.mark.parametrize("units, width, found", [(True, 384, "bf16"), (True, 192, "fp32"), (False, 1024, "fp32")])
def test_a_cpu_takes_bf16_where_it_pays(units, width, found, monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda device: units)
    assert precision.settled(recipe(width), CPU).train.precision == found
    assert precision.pays(192, "cuda") == units  # a GPU at any width


def test_what_is_asked_for_is_kept_and_emulation_is_said(monkeypatch, capsys):
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    assert precision.settled(recipe(64, "fp32"), CPU).train.precision == "fp32"
    assert capsys.readouterr().err == ""
    assert precision.settled(recipe(64, "bf16"), CPU).train.precision == "bf16"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "emulates it" in said and "times as long" in said


def test_a_resumed_run_keeps_its_precision_on_another_machine(recipe_in, tmp_path, monkeypatch):
    path = recipe_in(tmp_path)
    monkeypatch.setattr(precision, "pays", lambda width, device: False)
    train(path, ["train.precision=auto", "train.steps=3", "checkpoint.every=2", "run.name=kept"])
    folder = next(tmp_path.rglob("kept"))
    assert "precision: fp32" in (folder / "recipe.yaml").read_text()
    monkeypatch.setattr(precision, "pays", lambda width, device: True)
    again = recipe(512, folder=str(folder.parent), resume="auto")
    again = again.model_copy(update={"run": again.run.model_copy(update={"name": "kept"})})
    assert precision.settled(again, CPU).train.precision == "fp32"
    assert precision.settled(recipe(512, folder=str(tmp_path / "new"), resume="auto"), CPU).train.precision == "bf16"
