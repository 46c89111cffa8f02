"""What is added to the task, mixtures, stages: logged, resumed exactly, left out of the finished model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from conceptron.engine.trainer import train

from .running import history, lines, stop_after

CONTRAST = "contrastive={weight: 0.2, start: 0.3, learnable_temperature: true, pairs: deletion}"
TERMS = "regularization={terms: [vicreg, t_regs], weighting: learnable, warmup_steps: 4, weight: 0.05}"
TIMED = "{name: prefix_diffusion, direction: mixed, weight: 1}"
MIXED = f"objective={{name: mixed, parts: [{{name: diffusion, weight: 2}}, {TIMED}]}}"
SHORT = ["train.steps=8", "eval.every=0", "checkpoint.every=0"]
EVERYTHING = [
    CONTRAST, TERMS, MIXED, "train.stages=[{until: 3, window: 16}]", "train.precision=bf16", "batch.micro_tokens=128",
    "train.tokens_per_concept=[10, 24]", "batch.by_length=true", *SHORT,
]  # fmt: skip


@pytest.fixture(scope="session")
def everything(recipe_in, tmp_path_factory) -> Path:
    """A run with all of it at once."""
    return train(recipe_in(tmp_path_factory.mktemp("everything")), EVERYTHING)


def test_every_part_is_logged(everything):
    steps = lines(everything)
    late = [entry for entry in steps if "contrastive" in entry]
    assert [entry["step"] for entry in late] == [4, 5, 6, 7, 8]  # from 0.3 of 8 steps on
    for entry in steps:
        added = 0.2 * entry.get("contrastive", 0.0) + entry["regularization"]
        assert entry["loss"] == pytest.approx(entry["task"] + added, rel=1e-5)
        shares = sum(entry["weights"].values())
        assert shares == pytest.approx(0.05 * min(1, (entry["step"] - 1) / 4), rel=1e-5)
        assert set(entry["terms"]) == {"vicreg", "t_regs"}
        assert 0 < entry["cap_scale"] <= 1
        assert entry["objective"] in ("diffusion", "prefix_diffusion")
    assert {entry["objective"] for entry in steps} == {"diffusion", "prefix_diffusion"}
    assert {entry["tokens_per_concept"] for entry in steps} == {10, 24}
    assert all(0.01 < entry["temperature"] < 0.1 for entry in late)
    assert late[-1]["temperature"] != late[0]["temperature"]
    (held_out,) = lines(everything, "eval")
    assert set(held_out["parts"]) == {"diffusion", "prefix_diffusion"}
    assert held_out["parts"]["diffusion"]["nll_unseen"] > 0
    assert 0 <= held_out["retrieval"] <= 1 and held_out["contrastive"] > 0 and held_out["num_pairs"] > 1
    assert set(held_out["ratios"]) == {"r=10", "r=24"}
    for at_ratio in held_out["ratios"].values():
        assert set(at_ratio["parts"]) == set(held_out["parts"]) and at_ratio["contrastive"] > 0
        assert "num_pairs" not in at_ratio
    assert held_out["ratios"]["r=10"]["nll_unseen"] == held_out["nll_unseen"]  # windows of 48 ask for all 5
    assert held_out["ratios"]["r=24"]["nll_unseen"] != held_out["nll_unseen"]


def test_tensorboard_has_the_same(everything):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(everything / "tb"))
    events.Reload()
    names = ("task", "contrastive", "regularization", "terms/vicreg", "weights/t_regs", "temperature", "cap_scale")
    tags = set(events.Tags()["scalars"])
    of_eval = ("parts/diffusion/nll_unseen", "retrieval", "ratios/r=10/nll_unseen", "ratios/r=24/retrieval")
    assert {f"train/{name}" for name in names} | {f"eval/{name}" for name in of_eval} <= tags


@pytest.mark.parametrize("at", [2, 6])
def test_a_resumed_run_is_the_straight_one(everything, recipe, monkeypatch, at):
    """Stopped in the first stage before the contrastive loss began, and after; through its own parameters as well."""
    stop_after(at, monkeypatch)
    with pytest.raises(SystemExit):
        train(recipe, EVERYTHING)
    monkeypatch.undo()
    folder = train(recipe, [*EVERYTHING, "resume=auto"])
    assert history(folder) == history(everything)
    first, second = (load_file(path / "model" / "model.safetensors") for path in (everything, folder))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_only_for_training_stays_behind(everything):
    (state,) = everything.glob("checkpoints/step-00000008/state-*")
    names = {key.partition("@")[0] for key in load_file(state)}
    assert {"temperature.log_excess", "regularizer.logits"} < names
    bare = AutoModelForMaskedLM.from_pretrained(everything / "model")
    assert names - {f"model.{name}" for name, _ in bare.named_parameters()} == {
        "temperature.log_excess", "regularizer.logits",
    }  # fmt: skip


def test_a_step_is_the_same_however_it_is_cut(recipe):
    """Negatives come from the whole step, with gradients cached over its micro-batches."""
    runs = {}
    for name, overrides in {
        "whole": ["batch.micro_tokens=256"],
        "parts": ["batch.micro_tokens=64"],
        "apart": ["batch.micro_tokens=64", "contrastive.negatives=micro_batch"],
    }.items():
        few = ["contrastive={weight: 1.0, learnable_temperature: true}", "model.dropout=0", "data.window=24"]
        runs[name] = lines(train(recipe, [*SHORT, "train.steps=4", *few, f"run.name={name}", *overrides]))
    for figure in ("loss", "contrastive", "grad_norm", "temperature"):
        whole, parts = (torch.tensor([entry[figure] for entry in runs[name]]) for name in ("whole", "parts"))
        torch.testing.assert_close(parts, whole, rtol=3e-4, atol=0)
    assert runs["apart"][0]["contrastive"] < 0.7 * runs["whole"][0]["contrastive"]  # fewer to be told from
