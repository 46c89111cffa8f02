"""Runs from beginning to end, stopped, damaged, misdirected."""

import errno
import fcntl
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from conceptron.engine.checkpoints import checkpoint
from conceptron.engine.data.loader import Loader
from conceptron.engine.errors import InputError
from conceptron.engine.telemetry import Telemetry
from conceptron.engine.trainer import train
from conceptron.models import geometry
from conceptron.models.config import ConceptConfig
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.pretraining import Pretraining

from .running import lines, stop_after

FEW_PARTS = ["batch.tokens=128", "eval.tokens=64"]  # stage 3 takes a fifth of a second for each


def history(folder: Path) -> list[tuple]:
    """What has to be the same to the last bit when a run is repeated or resumed."""
    return [(e["step"], e["loss"].hex(), float(e["grad_norm"]).hex(), e["lr"], e["tokens"]) for e in lines(folder)]


@pytest.fixture(scope="session")
def straight(recipe_in, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    return train(recipe_in(tmp_path_factory.mktemp("straight")))


def refusal(*arguments) -> str:
    with pytest.raises(InputError) as caught:
        train(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_leaves_what_it_promises(straight):
    assert {path.name for path in straight.iterdir()} == {
        "recipe.yaml", "environment.json", "data.json", "metrics.jsonl", "tb", "checkpoints", "model", ".lock",
    }  # fmt: skip
    assert [path.name for path in checkpoint.list_checkpoints(straight / "checkpoints")] == [
        "step-00000012",
        "step-00000008",
    ]
    assert list((straight / "tb").glob("events.*"))
    environment = json.loads((straight / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__ and environment["world_size"] == 1
    steps = lines(straight)
    assert [entry["step"] for entry in steps] == list(range(1, 13))
    assert all(a["tokens"] < b["tokens"] and a["elapsed_s"] < b["elapsed_s"] for a, b in itertools.pairwise(steps))
    assert [entry["tokens_per_s"] is None for entry in steps[:4]] == [True, True, True, False]
    assert all(entry["loss"] > entry["smoothing_floor"] > 0.1 for entry in steps)
    for entry in steps:
        assert sum(norm**2 for norm in entry["grad_norms"].values()) == pytest.approx(entry["grad_norm"] ** 2, rel=1e-5)
        assert entry["grad_norms"].keys() == {"embedding", "concepts", "read", "mix", "feed", "decoder", "head"}
        assert entry["seconds"].keys() == {"data", "forward", "backward", "optimizer"}
        assert 0 < entry["mfu"] < 1 and entry["memory"]["host_peak_bytes"] > 2**20 and "gpu" not in entry
    assert [entry["step"] for entry in lines(straight, "eval")] == [5, 10, 12]
    (end,) = lines(straight, "end")
    assert end["train_seconds"] == pytest.approx(steps[-1]["elapsed_s"]) and end["peak_memory_bytes"] > 2**20


def test_it_learns(straight):
    first, *_, last = lines(straight, "eval")
    assert last["nll_unseen"] < first["nll_unseen"] - 0.1
    assert last["nll_seen"] is None and last["num_unseen"] == last["num_targets"] > 0


def test_the_model_folder_holds_the_last_weights(straight):
    model = AutoModelForMaskedLM.from_pretrained(straight / "model")
    state = load_file(straight / "checkpoints" / "step-00000012" / "state-00000-of-00001.safetensors")
    master = {key.split("@")[0]: tensor for key, tensor in state.items() if key.endswith(":weight")}
    assert master.keys() == {f"model.{name}" for name, _ in model.named_parameters()}
    assert all(torch.equal(tensor.flatten(), master[f"model.{name}"]) for name, tensor in model.named_parameters())
    assert model.config.mask_token_id == AutoTokenizer.from_pretrained(straight / "model").mask_token_id
    stored = load_file(straight / "model" / "model.safetensors")
    assert "lm_head.weight" not in stored or "encoder.embed_tokens.weight" not in stored  # tied: written once


def test_the_same_recipe_gives_the_same_run(straight, recipe):
    assert history(train(recipe)) == history(straight)


def test_sigterm_saves_and_the_resumed_run_is_the_straight_one(straight, recipe, monkeypatch):
    stop_after(6, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        train(recipe)
    assert stopped.value.code == 143
    monkeypatch.undo()
    folder = recipe.parent / "runs" / "tiny"
    assert [entry["step"] for entry in lines(folder)][-1] == 7  # the signal is agreed upon with the next step
    assert checkpoint.list_checkpoints(folder / "checkpoints")[0].name == "step-00000007"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train(recipe, ["resume=auto"]) == folder
    assert history(folder) == history(straight)
    assert [e["nll_unseen"] for e in lines(folder, "eval")] == [e["nll_unseen"] for e in lines(straight, "eval")]


def test_goes_back_behind_a_damaged_checkpoint(straight, recipe, monkeypatch, capfd):
    stop_after(8, monkeypatch)
    with pytest.raises(SystemExit):
        train(recipe)
    monkeypatch.undo()
    folder = recipe.parent / "runs" / "tiny"
    newest, older = checkpoint.list_checkpoints(folder / "checkpoints")
    (newest / "trainer.json").write_text("{}")
    train(recipe, ["resume=auto"])
    assert f"warning: {newest} is not used: trainer.json has 2 bytes instead of" in capfd.readouterr().err
    assert older.name == "step-00000008" and history(folder) == history(straight)
    for damaged in checkpoint.list_checkpoints(folder / "checkpoints"):
        (damaged / "MANIFEST.json").unlink()
    assert "no valid checkpoint left" in refusal(recipe, ["resume=auto"])


@pytest.mark.parametrize("stage, precision", [(2, "bf16"), (3, "fp32")])
def test_resumes_exactly_at_other_stages(recipe, stage, precision, monkeypatch):
    overrides = [f"zero.stage={stage}", f"train.precision={precision}", "train.steps=6", "eval.every=0"]
    overrides += FEW_PARTS
    expected = history(train(recipe, [*overrides, "run.name=whole"]))
    stop_after(3, monkeypatch)
    with pytest.raises(SystemExit):
        train(recipe, overrides)
    monkeypatch.undo()
    assert history(train(recipe, [*overrides, "resume=auto"])) == expected


def test_a_finished_run_is_left_alone(straight, recipe_in, capsys):
    before = (straight / "metrics.jsonl").read_bytes()
    assert train(recipe_in(straight.parent.parent), ["resume=auto"]) == straight
    assert "finished already (12 steps)" in capsys.readouterr().out
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_a_lost_model_folder_is_written_again(straight, recipe_in, tmp_path):
    shutil.copytree(straight.parent, tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "tiny" / "model")
    folder = train(recipe_in(tmp_path), ["resume=auto"])
    first, second = (load_file(path / "model" / "model.safetensors") for path in (straight, folder))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_folders_that_cannot_be_used(straight, recipe_in, recipe, tmp_path):
    assert "run folder already in use; go on with resume=auto" in refusal(recipe_in(straight.parent.parent))
    other = tmp_path / "runs" / "tiny"
    other.mkdir(parents=True)
    (other / "thesis.tex").write_text("x")
    assert "not empty and not a run folder" in refusal(recipe, ["resume=auto"])
    (tmp_path / "runs" / "file").write_text("x")
    assert "expected a run folder, got a file" in refusal(recipe, ["run.name=file"])
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def test_two_processes_cannot_train_in_one_folder(straight, recipe_in):
    with (straight / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert "another process is training here" in refusal(recipe_in(straight.parent.parent), ["resume=auto"])


@pytest.mark.parametrize(
    "override, found",
    [
        ("optim.lr=1e-2", "made with optim.lr = 0.003, now it is 0.01"),
        ("train.steps=20", "made with train.steps = 12, now it is 20"),
        ("run.seed=1", "made with run.seed = 0, now it is 1"),
        ("objective.eps=0.01", "made with objective.eps = 0.001, now it is 0.01"),
    ],
)
def test_another_trajectory_is_not_resumed(straight, recipe_in, override, found):
    assert found in refusal(recipe_in(straight.parent.parent), ["resume=auto", override])


def test_a_finished_run_names_the_command_that_trains_its_model_further(straight, recipe_in):
    message = refusal(recipe_in(straight.parent.parent), ["resume=auto", "train.steps=14"])
    assert "made with train.steps = 12, now it is 14; the run is finished, its learning rate has come to its" in message
    recipe, *overrides = shlex.split(message.partition("conceptron train ")[2])
    assert overrides == ["train.steps=14", "run.name=tiny-2", f"init.source={straight / 'model'}"]
    further = train(recipe, overrides)
    assert "0 new, 0 unused" in (further / "initialization.txt").read_text()
    assert len(lines(further)) == 14 and lines(further)[0]["loss"] < lines(straight)[0]["loss"]


def test_another_text_or_vocabulary_is_not_resumed(recipe, text, monkeypatch, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(text, own, ignore=shutil.ignore_patterns("cache"))
    recipe.write_text(recipe.read_text().replace(str(text), str(own)))
    stop_after(2, monkeypatch)
    with pytest.raises(SystemExit):
        train(recipe)
    monkeypatch.undo()
    (own / "99.txt").write_text("one more text about a concept")
    assert "made with tokens of training text = " in refusal(recipe, ["resume=auto"])
    (own / "99.txt").unlink()
    vocabulary = json.loads((own / "tokenizer" / "tokenizer.json").read_text())
    vocabulary["added_tokens"].append({**vocabulary["added_tokens"][0], "id": 400, "content": "[NEW]"})
    vocabulary["model"]["vocab"]["[NEW]"] = 400
    (own / "tokenizer" / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert "now it is" in (message := refusal(recipe, ["resume=auto"])) and "tokenizer" in message


@pytest.mark.parametrize(
    "override, found",
    [
        ("optim.lrr=1", "did you mean optim.lr?"),
        ("data.source=/nowhere/at/all.txt", "/nowhere/at/all.txt"),
        ("data.tokenizer=/nowhere", "data.tokenizer: /nowhere"),
        ("batch.micro_tokens=20", "batch.micro_tokens: expected room for the longest window"),
        ("model.hidden_size=31", "model.hidden_size: expected a multiple of num_attention_heads = 3, got 31"),
        ("objective={name: mlm}", "model.timestep_conditioning: objective mlm has no timesteps; set it to false"),
        ("model.hidden_tokens=mask", "model.hidden_tokens: 'mask' does not fit objective.hidden, which is 'drop'"),
    ],
)
def test_bad_input_leaves_no_run_behind(recipe, override, found):
    assert found in refusal(recipe, ["model.timestep_conditioning=true", override])
    assert not (recipe.parent / "runs").exists()


def poison(steps: set[int], monkeypatch) -> None:
    """The loss of one target is not a number in these steps."""
    make = Loader.step

    def step(self, number):
        views = make(self, number)
        if number in steps:
            views[0] = replace(views[0], weights=views[0].weights.index_fill(0, torch.tensor(0), float("nan")))
        return views

    monkeypatch.setattr(Loader, "step", step)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_that_is_not_finite_is_skipped(straight, recipe, stage, monkeypatch, capfd):
    poison({4, 5}, monkeypatch)
    folder = train(recipe, [f"zero.stage={stage}", *(FEW_PARTS if stage == 3 else [])])
    assert [entry["step"] for entry in lines(folder, "bad_step")] == [5, 6]
    assert all(entry["windows"] for entry in lines(folder, "bad_step"))
    steps = lines(folder)
    assert [entry["loss"] is None for entry in steps] == [number in (5, 6) for number in range(1, 13)]
    if stage == 1:
        assert [e["loss"] for e in steps[:4]] == [e["loss"] for e in lines(straight)[:4]]
    progress = checkpoint.load_progress(folder / "checkpoints" / "step-00000012")
    assert (progress.step, progress.optimizer_steps) == (12, 10)
    assert "step 5: a gradient is not finite; the step was skipped" in capfd.readouterr().err


def test_too_many_of_them_end_the_run(recipe, monkeypatch):
    poison(set(range(5, 12)), monkeypatch)
    message = refusal(recipe, ["train.max_bad_steps=3"])
    assert "3 steps in a row had a gradient that is not finite, stopped at step 8" in message
    folder = recipe.parent / "runs" / "tiny"
    assert checkpoint.list_checkpoints(folder / "checkpoints")[0].name == "step-00000004"


def test_collapsed_concepts_are_told_or_end_the_run(recipe, monkeypatch, capfd):
    monkeypatch.setattr(geometry, "STATIC", -1.0)  # any share is too much
    monkeypatch.setattr(geometry, "MIN_TEXTS", 2)
    often = ["eval.every=1", "checkpoint.every=0"]
    message = refusal(recipe, [*often, "train.on_collapse=stop"])  # step 1 lies in the first tenth
    assert "stopped at step 2, the concepts have collapsed: " in message and "train.on_collapse=warn" in message
    folder = next(path.parent for path in recipe.parent.rglob("metrics.jsonl"))
    (told,) = lines(folder, "collapse")
    assert "is the same for every text" in told["reason"]
    assert set(lines(folder, "eval")[0]["concepts"]) >= {"static_fraction", "rank_dynamic", "dead_slots"}
    capfd.readouterr()
    assert train(recipe, [*often, "resume=auto", "train.on_collapse=warn"]) == folder
    assert "warning: step 3: the concepts have collapsed" in capfd.readouterr().err
    assert (folder / "model" / "config.json").is_file()


def fill_disk(at_steps: set[int], monkeypatch) -> None:
    write = checkpoint.write_state

    def failing(tensors, file):
        if any(f"{step:08d}" in str(file) for step in at_steps):
            file.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(tensors, file)

    monkeypatch.setattr(checkpoint, "write_state", failing)


def test_a_full_disk_costs_one_checkpoint(straight, recipe, monkeypatch, capfd):
    fill_disk({8}, monkeypatch)
    folder = train(recipe)
    assert history(folder) == history(straight)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000012"]
    assert "step 8 could not be saved: rank 0: [Errno 28] No space left on device; training goes on" in (
        capfd.readouterr().err
    )


def test_a_full_disk_at_the_end_stops_with_one_line(recipe, straight, monkeypatch):
    fill_disk({12}, monkeypatch)
    message = refusal(recipe)
    assert "step 12 could not be saved" in message and "step-00000008 is intact; make room" in message
    monkeypatch.undo()
    assert history(train(recipe, ["resume=auto"])) == history(straight)


def test_a_full_disk_for_the_record_stops_with_one_line(recipe, straight, monkeypatch):
    record = Telemetry.record

    def failing(self, kind, step, **values):
        if step == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        record(self, kind, step, **values)

    monkeypatch.setattr(Telemetry, "record", failing)
    message = refusal(recipe)
    assert "cannot be written (No space left on device); step-00000004 is intact" in message
    monkeypatch.undo()
    assert history(train(recipe, ["resume=auto"])) == history(straight)


def test_a_run_that_died_before_its_first_checkpoint_starts_anew(straight, recipe, monkeypatch, capfd):
    monkeypatch.setattr(Telemetry, "step", lambda self, step, *rest: 1 / 0 if step == 3 else None)
    with pytest.raises(ZeroDivisionError):
        train(recipe)
    monkeypatch.undo()
    folder = train(recipe, ["resume=auto"])
    assert "no checkpoint was saved yet; this run starts from the beginning" in capfd.readouterr().err
    assert history(folder) == history(straight)


def test_a_bare_session_computes_the_same_logits(straight, tmp_path):
    """In a process that imports nothing but transformers and the package that registers the model."""
    code = f"""
import torch, transformers, conceptron
from safetensors.torch import save_file
torch.set_num_threads(1)
model = transformers.AutoModelForMaskedLM.from_pretrained({str(straight / "model")!r}).eval()
words = transformers.AutoTokenizer.from_pretrained({str(straight / "model")!r})
batch = words(["the encoder [MASK] a text", "again"], return_tensors="pt", padding=True)
with torch.no_grad():
    save_file({{"logits": model(**batch).logits, "ids": batch["input_ids"]}}, {str(tmp_path / "out")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    there = load_file(tmp_path / "out")
    words = AutoTokenizer.from_pretrained(straight / "model")
    batch = words(["the encoder [MASK] a text", "again"], return_tensors="pt", padding=True)
    trained = Pretraining(ConceptForMaskedLM(ConceptConfig.from_pretrained(straight / "model")))
    checkpoint.load_weights(straight / "checkpoints" / "step-00000012", trained)
    with torch.no_grad():
        logits = trained.model.eval()(**batch).logits
    assert torch.equal(there["ids"], batch["input_ids"]) and (there["ids"] == words.mask_token_id).sum() == 1
    assert torch.equal(there["logits"], logits)


def test_the_size_of_a_micro_batch_changes_nothing_but_rounding(recipe):
    small, large = (
        lines(train(recipe, ["model.dropout=0", f"batch.micro_tokens={n}", f"run.name=m{n}", "eval.every=0"]))
        for n in (64, 256)
    )
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(
            torch.tensor([e[name] for e in small]), torch.tensor([e[name] for e in large]), rtol=2e-4, atol=0
        )


def test_what_is_kept_for_the_backward_pass_changes_nothing_but_rounding(recipe):
    runs = [
        lines(train(recipe, ["train.steps=3", f"run.name={i}", "eval.every=0", "checkpoint.every=0", *overrides]))
        for i, overrides in enumerate((["train.keep=keys"], ["train.keep=ids", "train.recompute=true"]))
    ]
    for name in ("loss", "grad_norm"):
        first, second = (torch.tensor([entry[name] for entry in run]) for run in runs)
        torch.testing.assert_close(first, second, rtol=2e-4, atol=0)
