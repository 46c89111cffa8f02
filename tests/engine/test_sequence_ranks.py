"""A document over several ranks, in training: the grid of ranks changes no loss, no gradient norm and no weight."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conceptron.engine.errors import InputError
from conceptron.engine.launching import launch
from conceptron.engine.launching.launch import World
from conceptron.engine.recipe.load import load_any, load_recipe
from conceptron.engine.telemetry import numbers
from conceptron.engine.trainer import train

from .running import run_jobs

COMMON = ["train.steps=4", "eval.every=0", "optim.clip=0.5", "model.dropout=0", "train.label_smoothing=0"]
TERMS = "regularization={terms: [orthogonality, variance], warmup_steps: 2, weight: 0.5}"
WINDOWED = [*COMMON, "model.num_token_layers=1", "model.token_window=4", TERMS, "objective={name: tsdae}"]
# no window fits into the pass of one rank, only into that of two
LONG = ["data.window=96", "batch.tokens=512", "batch.micro_tokens=96"]
TWO = ["train.sequence_ranks=2"]


@pytest.fixture(scope="module")
def ran(recipe_in, tmp_path_factory):
    """Runs every job of this file in one go: name -> (exit codes, run folder)."""
    folder = tmp_path_factory.mktemp("grids")
    recipe = str(recipe_in(folder))
    jobs = {
        "one": dict(world=1, overrides=[*COMMON, *LONG]),
        "stage 1": dict(world=2, overrides=[*COMMON, *LONG, *TWO, "batch.micro_tokens=48", "checkpoint.every=2"]),
        "stage 3": dict(world=2, overrides=[*COMMON, *LONG, *TWO, "zero.stage=3", "train.recompute=true"]),
        "grid": dict(world=4, overrides=[*COMMON, *LONG, *TWO, "batch.micro_tokens=48", "zero.stage=2"]),
        # its terms look at a micro-batch as a whole, so these are the same: two a step, as large on either grid
        "windowed one": dict(world=2, overrides=[*WINDOWED, "batch.micro_tokens=128"]),
        "windowed": dict(world=4, overrides=[*WINDOWED, *TWO, "batch.micro_tokens=64"]),
    }
    for name, job in jobs.items():
        job["recipe"], job["overrides"] = recipe, [f"run.name={name.replace(' ', '-')}", *job["overrides"]]
    codes, said = run_jobs(list(jobs.values()), folder)
    assert all(code == 0 for each in codes for code in each), said
    return {name: folder / "runs" / name.replace(" ", "-") for name in jobs}


def figures(folder: Path) -> dict[str, torch.Tensor]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if entry["kind"] == "train"]
    (held_out,) = [entry for entry in entries if entry["kind"] == "eval"]
    names = ("loss", "grad_norm", "tokens", "task", "regularization", "cap_scale")
    return {
        **{name: torch.tensor([e[name] for e in steps], dtype=torch.float64) for name in names if name in steps[0]},
        **{name: torch.tensor(value, dtype=torch.float64) for name, value in numbers("held out", held_out)},
    }


def same(folder: Path, other: Path) -> None:
    """To the rounding of float32: sums over tokens are taken in another order. Gradient norms bear witness, since AdamW
    would hide a gradient that is off by a factor; float64 is in tests/models/test_sharding.py."""
    torch.testing.assert_close(figures(folder), figures(other), rtol=3e-5, atol=1e-6)
    weights = [load_file(each / "model" / "model.safetensors") for each in (folder, other)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["stage 1", "stage 3", "grid"])
def test_a_grid_of_ranks_is_one_rank(ran, name):
    same(ran[name], ran["one"])


def test_token_layers_and_regularisers_over_a_grid(ran):
    same(ran["windowed"], ran["windowed one"])


def test_one_rank_goes_on_where_two_have_shared_texts(ran, recipe_in, tmp_path, capfd):
    target = tmp_path / "runs" / "tiny"
    shutil.copytree(ran["stage 1"], target)
    shutil.rmtree(target / "model")
    shutil.rmtree(target / "checkpoints" / "step-00000004")
    train(recipe_in(tmp_path), [*COMMON, *LONG, "resume=auto"])
    assert "with other ranks, stage or micro-batches: exact but for rounding" in capfd.readouterr().err
    same(target, ran["one"])


BASE = {
    "data": {"source": "pydocs", "window": 64}, "objective": {"name": "mlm"}, "train": {"steps": 9},
    "batch": {"tokens": 1024, "micro_tokens": 512},
}  # fmt: skip


@pytest.mark.parametrize("overrides, found", [
    (["model.layer_kind=slot"], "model.layer_kind: slot cannot be read over several devices"),
    (["model.layer_kind=bixt"], "model.layer_kind: bixt cannot be read over several devices"),
    (["model={num_token_layers: 2, funnel: [0]}"], "model.funnel: [0] cannot be read over several devices"),
    (["model.backbone=b"], "model.backbone: expected none with train.sequence_ranks = 2"),
    (["contrastive={}"], "contrastive: expected none with train.sequence_ranks = 2"),
    (["distill={teacher: t}"], "distill: expected none with train.sequence_ranks = 2"),
    (["model.decoder_mixing=local", "objective.context=true"], "model.decoder_mixing: expected none with"),
    (["model={dropout: 0.1, num_token_layers: 1}"], "model.dropout: expected 0 with train.sequence_ranks = 2"),
    (["train.keep=states"], "train.keep: expected keys or nothing with train.sequence_ranks = 2, got 'states'"),
    (["train.sequence_ranks=0"], "train.sequence_ranks: expected a whole number"),
])  # fmt: skip
def test_what_is_not_divided_is_refused(tmp_path, overrides, found):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    with pytest.raises(InputError) as caught:
        load_recipe(tmp_path / "base.yaml", [*TWO, *overrides])
    assert found in str(caught.value) and "\n" not in str(caught.value)


def test_a_task_is_learned_from_whole_texts():
    with pytest.raises(InputError, match=r"sequence_ranks: expected 1 where a task is learned, whose texts are not"):
        load_any("finetune/stsb.yaml", TWO)


def test_ranks_that_it_does_not_divide():
    world = World(0, 0, 3, torch.device("cpu"))
    with pytest.raises(InputError, match=r"sequence_ranks: expected a divisor of the 3 ranks of this run, got 2"):
        world.divided(2)
    with launch.world() as alone:
        assert alone.divided(1) is alone and alone.sequence_group is None
