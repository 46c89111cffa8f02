"""Checkpoints that stay, a model of one of them, the profile of a step, and data made ahead."""

import json

import pytest
import torch
from safetensors.torch import load_file

from conceptron.__main__ import perform
from conceptron.engine.checkpoints import checkpoint
from conceptron.engine.errors import InputError
from conceptron.engine.trainer import train
from conceptron.models.masked_lm import ConceptForMaskedLM


@pytest.fixture(scope="module")
def run(recipe_in, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return train(recipe_in(folder), [
        "train.steps=6", "checkpoint.every=1", "checkpoint.keep_last=1", "checkpoint.keep_every=2", "eval.every=2",
        "profile.steps=2-3", "checkpoint.keep_best=nll_unseen",
    ])  # fmt: skip


def test_the_newest_and_every_second_checkpoint_stay(run):
    assert [checkpoint.step_of(each) for each in checkpoint.list_checkpoints(run / "checkpoints")] == [6, 4, 2]


def test_a_step_becomes_a_model_folder_like_the_finished_one(run, tmp_path, capsys):
    assert perform(["export", str(run), "--step", "6", "--out", str(tmp_path / "six")]) == 0
    whole, six = (load_file(folder / "model.safetensors") for folder in (run / "model", tmp_path / "six"))
    assert whole.keys() == six.keys() and all(torch.equal(whole[name], six[name]) for name in whole)
    cards = [(folder / "README.md").read_text().split("```yaml")[0] for folder in (run / "model", tmp_path / "six")]
    assert cards[0] == cards[1] and "nll_unseen" in cards[0]  # the recipe of a run's folder names every default too
    assert perform(["export", str(run), "--step", "2"]) == 0
    assert f"step 2 of {run}: the model is in {run / 'model-2'}" in capsys.readouterr().out
    earlier = ConceptForMaskedLM.from_pretrained(run / "model-2").state_dict()
    assert any(not torch.equal(earlier[name], value) for name, value in whole.items())


def test_the_best_evaluation_names_its_checkpoint(run, tmp_path, capsys):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = {line["step"]: line["nll_unseen"] for line in lines if line["kind"] == "eval"}
    best = min(values, key=values.__getitem__)
    record = json.loads((run / "checkpoints" / "best.json").read_text())
    expected = {"metric": "nll_unseen", "value": values[best], "step": best, "checkpoint": f"step-{best:08d}"}
    assert record == expected
    assert perform(["export", str(run), "--best"]) == 0
    assert f"step {best} of {run}: the model is in {run / 'model-best'}" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"--best: expected without --step"):
        perform(["export", str(run), "--best", "--step", "2"])


def test_what_cannot_be_exported_is_named(run, tmp_path):
    with pytest.raises(InputError, match=r"--step: .* has no step 5; there are 2, 4, 6"):
        perform(["export", str(run), "--step", "5"])
    with pytest.raises(InputError, match=r"no recipe.yaml, so this is no run folder"):
        perform(["export", str(tmp_path)])
    state = next((run / "checkpoints" / "step-00000004").glob("state-*"))
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    with pytest.raises(InputError, match=r"does not match its checksum; choose another --step of 2, 4, 6"):
        perform(["export", str(run), "--step", "4"])


def test_the_profile_of_two_steps(run):
    trace = json.loads((run / "profile" / "trace-00000.json").read_text())
    assert any("mm" in event.get("name", "") for event in trace["traceEvents"])
    assert "Self CPU" in (run / "profile" / "table-00000.txt").read_text()


def test_a_profile_outside_of_the_run_is_refused(recipe_in, tmp_path):
    with pytest.raises(InputError, match=r"profile.steps: expected first and last step, at most train.steps = 2"):
        train(recipe_in(tmp_path), ["train.steps=2", "profile.steps=[2, 3]"])


def test_what_is_prepared_is_not_made_again(recipe_in, tmp_path, capsys):
    line = ["prepare", str(recipe_in(tmp_path)), f"data.cache={tmp_path / 'cache'}"]
    assert perform(line) == 0
    assert "tokens of training text" in capsys.readouterr().out
    built = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*") if file.stat().st_size > 100}
    assert built and perform(line) == 0
    assert built == {file: file.stat().st_mtime_ns for file in built} and not (tmp_path / "runs").exists()
