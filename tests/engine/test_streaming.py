"""Runs whose text is streamed, whose number of concepts grows: stopped and gone on with, they are the straight run."""

import json

import pytest

from conceptron.engine.trainer import train

from .running import history, stop_after

STREAMED = ["data.stream_mb=0.004", "train.steps=12", "eval.every=0", "checkpoint.every=0", "batch.by_length=true",
            "train.stages=[{until: 2, window: 16, num_concepts: 2}, {until: 3, window: 24}]"]  # fmt: skip


def test_a_streamed_run_goes_on_exactly_and_its_concepts_grow(recipe_in, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    caches = [f"data.cache={tmp_path / name / 'cache'}" for name in "ab"]
    straight = train(recipe_in(tmp_path / "a"), [*STREAMED, caches[0]])
    stop_after(9, monkeypatch)
    with pytest.raises(SystemExit):
        train(recipe_in(tmp_path / "b"), [*STREAMED, caches[1]])
    monkeypatch.undo()
    run = train(recipe_in(tmp_path / "b"), [*STREAMED, f"data.cache={tmp_path / 'elsewhere'}", "resume=auto"])
    assert history(run) == history(straight)
    assert [entry["num_concepts"] for entry in history(run)] == [2, 2] + [5] * 10
    assert json.loads((run / "data.json").read_text())["sources"][0]["of_a_block"] == 4000
    (folder,) = (tmp_path / "elsewhere").glob("stream-*")
    assert len(list(folder.glob("state-*.json"))) > 1
