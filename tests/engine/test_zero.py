"""What DeepSpeed is told."""

import pytest
import torch

from conceptron.engine.recipe.schema import Recipe
from conceptron.engine.zero import BUCKET_NUMEL, deepspeed_config


def config(num_parameters: int = 1_000_001, **sections) -> dict:
    tree = {"data": {}, "objective": {"name": "mlm"}, "train": {"steps": 1, "precision": "fp32"}, **sections}
    return deepspeed_config(Recipe.model_validate(tree), num_parameters)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stage_and_clipping_come_from_the_recipe(stage):
    made = config(zero={"stage": stage}, optim={"clip": 0.3})
    assert made["zero_optimization"]["stage"] == stage and made["gradient_clipping"] == 0.3


def test_accumulation_is_ours():
    made = config()
    assert made["train_micro_batch_size_per_gpu"] == made["gradient_accumulation_steps"] == 1
    assert "train_batch_size" not in made  # it would fix the number of ranks


def test_bf16_is_autocast_with_float32_gradients():
    made = config(train={"steps": 1, "precision": "bf16"})["torch_autocast"]
    assert made == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert not config(train={"steps": 1, "precision": "fp32"})["torch_autocast"]["enabled"]
    assert "bf16" not in config()


@pytest.mark.parametrize("num_parameters, bucket", [(10, 1024), (5000, 5120), (10**10, BUCKET_NUMEL)])
def test_buckets_are_no_larger_than_the_model(num_parameters, bucket):
    assert config(num_parameters)["zero_optimization"]["reduce_bucket_size"] == bucket


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_computes_in_bfloat16_and_keeps_float32(build, steps, stage):
    engine, seen = build(stage, "bf16"), []
    feed = engine.module.encoder.layers[0].feed
    linear = next(module for module in feed.modules() if isinstance(module, torch.nn.Linear))
    linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    steps(engine, 0, 1)
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in engine.module.parameters()} == {torch.float32}
    moments = engine.optimizer.optimizer.state.values()
    assert {state["exp_avg"].dtype for state in moments} == {torch.float32}


def test_the_gradient_is_clipped_as_one(build, steps):
    """With an eps of 100 AdamW moves by about lr / 100 * gradient: a gradient step, whose length shows clipping."""
    plain = dict(lr=100.0, eps=100.0, weight_decay=0.0)
    lengths = []
    for clip in (0.0, 0.5):
        engine = build(clip=clip, **plain)
        before = [parameter.detach().clone() for parameter in engine.module.parameters()]
        ((_, norm),) = steps(engine, 0, 1)
        pairs = zip(engine.module.parameters(), before, strict=True)
        moves = [(now.detach().double() - then.double()).norm() for now, then in pairs]
        lengths.append((norm, float(torch.stack(moves).norm())))
    (norm, free), (same_norm, clipped) = lengths
    assert norm == same_norm > 1.0  # what is reported is the norm before clipping
    assert free == pytest.approx(norm, rel=0.03) and clipped == pytest.approx(0.5, rel=0.03)
