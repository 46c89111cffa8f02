"""Run folders that cannot be: one line each, nothing made, nothing moved."""

import os
from pathlib import Path

import pytest
import torch

from conceptron.engine.errors import InputError
from conceptron.engine.launching.launch import World
from conceptron.engine.recipe.load import load_recipe
from conceptron.engine.run import RunFolder

ALONE = World(0, 0, 1, torch.device("cpu"))


def refusal(recipe: Path, *overrides: str, create: bool = False) -> str:
    with RunFolder(load_recipe(recipe, overrides), ALONE) as run, pytest.raises(InputError) as caught:
        run.inspect()
        if create:
            run.create()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_file_in_its_place_or_above_it(recipe, tmp_path):
    (tmp_path / "runs").write_text("")
    assert f"{tmp_path}/runs/tiny: {tmp_path}/runs is no folder; choose another run.folder" == refusal(recipe)
    assert "is no folder" in refusal(recipe, f"run.folder={tmp_path}/runs/deeper")
    assert "expected a run folder, got a file" in refusal(recipe, f"run.folder={tmp_path}", "run.name=runs")


def test_links(recipe, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(tmp_path / "gone")
    assert f"a link to {tmp_path}/gone, where nothing is; remove it, or choose another run.folder" in refusal(recipe)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "is no folder" in refusal(recipe, f"run.folder={tmp_path}/loop")
    (tmp_path / "away").symlink_to(tmp_path / "gone")
    assert f"{tmp_path}/away is no folder" in refusal(recipe, f"run.folder={tmp_path}/away")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "there").symlink_to(tmp_path / "elsewhere")  # a link that leads somewhere is a folder
    with RunFolder(load_recipe(recipe, [f"run.folder={tmp_path}/there"]), ALONE) as run:
        assert run.inspect() == []


def test_where_nothing_may_be_written(recipe, tmp_path, monkeypatch):
    assert "cannot be a run folder (File name too long)" in refusal(recipe, f"run.folder={tmp_path}/{'x' * 300}")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever tests may be allowed everything
    assert f"{tmp_path} cannot be written to; choose another run.folder" in refusal(recipe)
    monkeypatch.undo()
    assert "cannot be written" in refusal(recipe, "run.folder=/proc/runs", create=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml"]
