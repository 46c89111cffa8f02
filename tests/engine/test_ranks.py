"""Two ranks do what one does, whatever the ZeRO stage."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conceptron.engine.checkpoints import checkpoint
from conceptron.engine.data.corpus import open_corpus
from conceptron.engine.data.loader import Loader
from conceptron.engine.recipe.load import load_recipe
from conceptron.engine.telemetry import numbers
from conceptron.engine.trainer import train

from .running import run_jobs

COMMON = ["model.dropout=0", "train.steps=8", "eval.every=0", "eval.tokens=200", "checkpoint.every=0"]
FEW = [*COMMON, "train.steps=4"]  # weights meet after each, moments after two
SPARSE = [*FEW, "batch.tokens=60", "batch.micro_tokens=48"]  # too few tokens to give every rank some
CONTRAST = "contrastive={weight: 0.5, pairs: deletion, learnable_temperature: true}"
TERMS = "regularization={terms: [orthogonality, t_regs], gradient_ratio: null, warmup_steps: 0, weighting: learnable}"
PARTS = "objective={name: mixed, parts: [{name: tsdae}, {name: mlm}]}"  # deletion pairs share the first one's encoder
ADDED = [*FEW, CONTRAST, TERMS, PARTS]
ALONE = [*FEW, CONTRAST, "objective={name: none}", "data.window=24"]
MUON = [*FEW, "optim.muon={lr: 0.02}", "ema.decay=0.9"]
EVERY = ["checkpoint.every=1", "checkpoint.keep_last=9"]
WATCHED = ["train.on_spike=skip", "train.spike_window=8", "train.spike_deviations=200"]
STOPPED = [*COMMON, "model.dropout=0.1", "zero.stage=2", "train.precision=bf16"]


@pytest.fixture(scope="module")
def ran(recipe_in, tmp_path_factory):
    """Runs every job of this file in one go: name -> (exit codes, run folder)."""
    folder = tmp_path_factory.mktemp("ranks")
    recipe = str(recipe_in(folder))
    jobs = {
        "one": dict(world=1, overrides=COMMON),
        "stage 1": dict(world=2, overrides=[*COMMON, "zero.stage=1"]),
        "stage 2": dict(world=2, overrides=[*COMMON, "zero.stage=2", "checkpoint.every=4"]),
        "stage 3": dict(world=2, overrides=[*COMMON, "zero.stage=3"]),
        "sparse one": dict(world=1, overrides=SPARSE),
        "sparse": dict(world=2, overrides=[*SPARSE, "zero.stage=3"]),
        "added one": dict(world=1, overrides=ADDED),
        "added": dict(world=2, overrides=[*ADDED, "zero.stage=3"]),
        "alone one": dict(world=1, overrides=ALONE),
        "alone": dict(world=2, overrides=[*ALONE, "zero.stage=2"]),
        "muon one": dict(world=1, overrides=MUON),
        "muon": dict(world=2, overrides=[*MUON, "zero.stage=2"]),
        "muon 3": dict(world=2, overrides=[*MUON, "zero.stage=3"]),
        "whole": dict(world=2, overrides=STOPPED),
        "stopped": dict(world=2, overrides=STOPPED, fault=["stop", 1, 3]),
        "resumed": dict(world=2, overrides=[*STOPPED, "resume=auto", "run.name=stopped"]),
        "beside": dict(world=2, overrides=[*STOPPED, *EVERY, "zero.stage=3", "train.steps=4"]),
        "at once": dict(
            world=2, overrides=[*STOPPED, *EVERY, "zero.stage=3", "train.steps=4", "checkpoint.async=false"]
        ),
        "spiked": dict(world=2, overrides=[*COMMON, *WATCHED], fault=["spike", 1, 7]),
        "poisoned": dict(world=2, overrides=[*COMMON, "zero.stage=2"], fault=["poison", 1, 3]),
    }
    for name, job in jobs.items():
        run = name.replace(" ", "-")
        job["recipe"], job["overrides"] = recipe, [f"run.name={run}", *job["overrides"]]
    codes, _ = run_jobs(list(jobs.values()), folder)
    runs = folder / "runs"
    return {name: (code, runs / name.replace(" ", "-")) for name, code in zip(jobs, codes, strict=True)}


def figures(folder: Path) -> dict[str, torch.Tensor]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if entry["kind"] == "train"]
    (held_out,) = [entry for entry in entries if entry["kind"] == "eval"]
    parts = steps[0]["grad_norms"]
    names = ("loss", "grad_norm", "tokens", "task", "contrastive", "temperature", "regularization")
    return {
        **{name: torch.tensor([e[name] for e in steps], dtype=torch.float64) for name in names if name in steps[0]},
        **{f"norm of {part}": torch.tensor([e["grad_norms"][part] for e in steps]).double() for part in parts},
        **{name: torch.tensor(value, dtype=torch.float64) for name, value in numbers("held out", held_out)},
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize(
    "name, alone",
    [
        ("stage 1", "one"),
        ("stage 2", "one"),
        ("stage 3", "one"),
        ("sparse", "sparse one"),
        ("added", "added one"),
        ("alone", "alone one"),
        ("muon", "muon one"),
        ("muon 3", "muon one"),
    ],
)
def test_two_ranks_are_one(ran, name, alone):
    (codes, two), (_, one) = ran[name], ran[alone]
    assert codes == [0, 0]
    # gradient norms bear witness: AdamW would hide a gradient that is off by a factor
    torch.testing.assert_close(figures(two), figures(one), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-3, atol=1e-4)


def test_a_signal_to_one_rank_stops_all_and_resuming_is_exact(ran):
    assert ran["stopped"][0] == [143, 143]
    assert ran["resumed"][0] == ran["whole"][0] == [0, 0]
    resumed, whole = (figures(ran[name][1]) for name in ("stopped", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    resumed, whole = (weights(ran[name][1]) for name in ("stopped", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_bad_value_on_one_rank_is_skipped_on_both(ran):
    codes, folder = ran["poisoned"]
    assert codes == [0, 0]
    progress = checkpoint.load_progress(folder / "checkpoints" / "step-00000008")
    assert progress.optimizer_steps == 7
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())


def test_what_is_written_beside_training_is_what_would_be_written_at_once(ran):
    assert ran["beside"][0] == ran["at once"][0] == [0, 0]
    of_runs = [checkpoint.list_checkpoints(ran[name][1] / "checkpoints") for name in ("beside", "at once")]
    assert len(of_runs[0]) == len(of_runs[1]) == 4
    for beside, at_once in zip(*of_runs, strict=True):
        assert not checkpoint.verify(beside)
        files = [json.loads((folder / "MANIFEST.json").read_text())["files"] for folder in (beside, at_once)]
        states = [{name: of for name, of in each.items() if name.startswith("state-")} for each in files]
        assert len(states[0]) == 2 and states[0] == states[1]  # to the last bit


def test_an_outlier_on_one_rank_is_skipped_on_both(ran):
    codes, folder = ran["spiked"]
    assert codes == [0, 0]
    (spike,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"spike"' in line]
    assert spike["step"] == 7 and spike["action"] == "skipped" and spike["what"] == "loss"
    assert checkpoint.load_progress(folder / "checkpoints" / "step-00000008").optimizer_steps == 7
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())


def test_one_rank_goes_on_where_two_have_been(ran, recipe_in, tmp_path, capfd):
    """The state of two ranks at stage 2, read by one at stage 1: the same weights, the same steps but for rounding."""
    target = tmp_path / "runs" / "tiny"
    shutil.copytree(ran["stage 2"][1], target)
    shutil.rmtree(target / "model")
    shutil.rmtree(target / "checkpoints" / "step-00000008")
    assert len(list(target.glob("checkpoints/step-00000004/state-*-of-00002.safetensors"))) == 2
    train(recipe_in(tmp_path), [*COMMON, "resume=auto"])
    assert "with other ranks, stage or micro-batches: exact but for rounding" in capfd.readouterr().err
    torch.testing.assert_close(figures(target), figures(ran["one"][1]), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(weights(target), weights(ran["one"][1]), rtol=1e-3, atol=1e-4)


def test_the_sparse_job_leaves_a_rank_without_text(recipe_in, tmp_path):
    recipe = load_recipe(recipe_in(tmp_path), SPARSE)
    corpus = open_corpus(recipe.data)
    loader = Loader(
        corpus.train, recipe.build_objective(), corpus.tokens, seed=0, tokens_per_step=60, micro_tokens=48, rank=1,
        world_size=2,
    )  # fmt: skip
    assert any(view.encoder.num_sequences == 0 for step in range(4) for view in loader.step(step))
