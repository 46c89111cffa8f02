"""Moments, float32 weights and the update on the host: where a run is the same, it is so bit by bit."""

import pytest
import torch

from conceptron.engine import zero
from conceptron.engine.checkpoints.checkpoint import Progress
from conceptron.engine.checkpoints.writer import save
from conceptron.engine.recipe.schema import Recipe
from conceptron.engine.trainer import train


def config(**zero_section) -> dict:
    tree = {"data": {}, "objective": {"name": "mlm"}, "train": {"steps": 1, "precision": "fp32"}, "zero": zero_section}
    return zero.deepspeed_config(Recipe.model_validate(tree), 1000)["zero_optimization"]


def test_what_deepspeed_is_told():
    assert "offload_optimizer" not in config() and "offload_param" not in config(stage=3)
    assert config(stage=2, offload="optimizer")["offload_optimizer"]["device"] == "cpu"
    both = config(stage=3, offload="parameters")
    assert both["offload_optimizer"]["device"] == both["offload_param"]["device"] == "cpu"


@pytest.mark.parametrize("stage, offload, precision", [
    (1, "optimizer", "fp32"), (2, "optimizer", "bf16"), (3, "optimizer", "fp32"), (3, "parameters", "fp32"),
])  # fmt: skip
def test_it_trains_and_resumes_as_without(world, build, steps, tmp_path, stage, offload, precision):
    straight = steps(build(stage, precision), 0, 4)
    engine = build(stage, precision, offload=offload)
    found = steps(engine, 0, 2)
    folder = save(world, tmp_path, engine, Progress(step=2, optimizer_steps=2), keep_last=1)
    found += steps(build(stage, precision, found=folder, offload=offload), 2, 4)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(straight), rtol=1e-6, atol=0)
    assert [loss for loss, _ in found] == [loss for loss, _ in straight]


def test_a_run_on_the_host(recipe):
    folder = train(recipe, ["zero.offload=optimizer", "zero.stage=2", "train.steps=3", "eval.every=0"])
    assert (folder / "model" / "model.safetensors").exists()
