"""Fine-tuning as a job: what is learned, held out, resumed, exported, and refused in one line."""

import json
import re

import pytest
import torch
from transformers import BertConfig, BertModel

from conceptron.__main__ import perform
from conceptron.engine.build import build
from conceptron.engine.data import tokenizer
from conceptron.engine.errors import InputError
from conceptron.engine.recipe.load import load_recipe
from conceptron.engine.saved_model import load_model
from conceptron.engine.trainer import train
from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder

from ..running import lines
from .labelled import COLOURS, THINGS, write_tasks

SHAPE = dict(hidden_size=32, num_concepts=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
RECIPE = """
run: {{folder: {folder}/runs, name: {name}}}
source: {source}
task: {{name: {task}, data: {folder}}}
model: {{{model}}}
optim: {{lr: 1e-2, warmup_steps: 2}}
batch: {{tokens: 400, micro_tokens: 200}}
train: {{steps: {steps}, precision: fp32}}
eval: {{every: 0}}
checkpoint: {{every: 3, keep_last: 2}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny encoder that has learned nothing, and data of three tasks in which a word decides."""
    folder = tmp_path_factory.mktemp("finetune")
    texts = write_tasks(folder, lambda i, said: f"Note {i}. {' '.join(said)}", lambda asked, colour: asked == colour)
    words = tokenizer.train(texts, 320)
    torch.manual_seed(0)
    model = ConceptEncoder(ConceptConfig(vocab_size=len(words), mask_token_id=words.mask_token_id, **SHAPE))
    model.save_pretrained(folder / "source")
    words.save_pretrained(folder / "source")
    return folder


def run(folder, name, task, model="", steps=6, source=None, *overrides):
    recipe = folder / f"{name}.yaml"
    source = source or folder / "source"
    recipe.write_text(RECIPE.format(folder=folder, name=name, task=task, model=model, steps=steps, source=source))
    return train(recipe, overrides)


def losses(path) -> list[float]:
    return [entry["loss"] for entry in lines(path)]


def last_evaluation(path) -> dict:
    return lines(path, "eval")[-1]


@pytest.mark.parametrize(
    ("task", "model", "kind"),
    [
        ("scrolls/contract_nli", "", "ConceptForQuestions"),
        ("scrolls/contract_nli", "asked_reading: true, num_question_concepts: 2", "ConceptForQuestions"),
        ("scrolls/quality", "", "ConceptForQuestions"),
        ("glue/stsb", "", "ConceptForSequenceClassification"),
        ("glue/stsb", "pair_features: cosine", "ConceptForSequenceClassification"),
    ],
)
def test_learns_and_exports(folder, task, model, kind):
    path = run(folder, "-".join(re.findall(r"\w+", task + model)), task, model, 12)
    found = losses(path)
    assert len(found) == 12 and sum(found[-3:]) < 0.95 * sum(found[:3])
    assert {"accuracy", "pearson"} & set(last_evaluation(path))
    assert all(0 < entry["mfu"] < 1 for entry in map(json.loads, (path / "metrics.jsonl").open())
               if entry["kind"] == "train")  # fmt: skip
    saved = load_model(path / "model")
    assert type(saved).__name__ == kind and saved.config.task == task


def test_a_resumed_run_is_the_same_run(folder):
    whole = run(folder, "whole", "scrolls/contract_nli", "dropout: 0.1", 6)
    half = folder / "runs" / "half"
    run(folder, "half", "scrolls/contract_nli", "dropout: 0.1", 6)
    kept = half / "checkpoints"
    last = sorted(kept.iterdir())[-1]
    assert len(list(kept.iterdir())) == 2
    for path in last.iterdir():  # the run was killed after step 3
        path.unlink()
    last.rmdir()
    for path in sorted((half / "model").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (half / "model").rmdir()
    run(folder, "half", "scrolls/contract_nli", "dropout: 0.1", 6, None, "resume=auto")
    assert losses(half)[-3:] == losses(whole)[-3:]
    a, b = (load_model(path / "model").state_dict() for path in (whole, half))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_stored_states_of_a_frozen_backbone_teach_the_same_and_are_made_ahead(folder, capsys):
    words = tokenizer.load(str(folder / "source"))
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=64, **sizes)).save_pretrained(folder / "bert")
    words.save_pretrained(folder / "bert")
    recipe = folder / "build.yaml"
    recipe.write_text(
        f"data: {{source: {folder}/text, tokenizer: {folder}/source, cache: {folder}/cache, window: 32}}\n"
        f"model: {{backbone: {folder}/bert, backbone_window: 32, num_concepts: 4, num_hidden_layers: 1,\n"
        "  num_attention_heads: 2, hidden_size: 32, intermediate_size: 32}\n"
        "objective: {name: mlm}\ntrain: {steps: 1}\n"
    )
    (folder / "text").mkdir()
    for i in range(30):
        (folder / "text" / f"{i}.txt").write_text(f"The {THINGS[i % 6]} of note {i} is {COLOURS[i % 3]}. " * 8)
    build(load_recipe(recipe), folder / "read")
    task, cache = "scrolls/contract_nli", f"task.cache={folder}/states"
    fresh = run(folder, "computed", task, "", 4, folder / "read")
    prepare = ["prepare", str(folder / "computed.yaml"), "run.name=prepared", cache]
    capsys.readouterr()
    assert perform([*prepare, "train.compile=true"]) == 0
    assert capsys.readouterr().out.startswith(f"ready: {task}: 60 examples learned from, 12 examples held out (")
    assert not (folder / "states").exists() and perform([*prepare, "task.states_gb=1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and re.search(rf"; states of [\d,]+ tokens, [\d.e-]+ GB, in {folder}/states$", said[0])
    made = {file: file.stat().st_mtime_ns for file in (folder / "states").rglob("*.bin")}
    assert len(made) == 8 and not (folder / "runs" / "prepared").exists()
    stored = run(folder, "stored", task, "", 4, folder / "read", "task.states_gb=1", cache)
    assert losses(stored) == pytest.approx(losses(fresh), rel=1e-2) and len(list((folder / "states").iterdir())) == 4
    assert made == {file: file.stat().st_mtime_ns for file in (folder / "states").rglob("*.bin")}  # train found them
    with pytest.raises(InputError, match=r"task.states_gb: .* tokens of 32 16-bit numbers take .* GB, the limit is"):
        run(folder, "too-much", task, "", 4, folder / "read", "task.states_gb=1e-6", cache)


def test_what_is_held_out_depends_on_the_fold_and_holds_whole_documents(folder):
    from conceptron.engine.labelled.examples import examples, hold_out
    from conceptron.engine.labelled.task import load_task

    every = examples(load_task("scrolls/contract_nli"), "train", folder)
    folds = [hold_out(every, fold) for fold in (0, 1)]
    for learned, held in folds:
        assert len(learned) + len(held) == len(every) == 72 and len(held) == 12
        assert not {each.document for each in learned} & {each.document for each in held}
    assert {each.id for each in folds[0][1]} != {each.id for each in folds[1][1]}


@pytest.mark.parametrize(
    ("task", "model", "override", "says"),
    [
        ("scrolls/gov_report", "", "", "task.name: scrolls/gov_report is not learned"),
        ("scrolls/contract_nlu", "", "", "did you mean scrolls/contract_nli?"),
        ("glue/mrpc", "", "", "has no split 'train' there"),
        ("scrolls/contract_nli", "num_labels: 3", "", "model.num_labels: the task decides it"),
        ("scrolls/contract_nli", "depth: 3", "", "model.depth: unknown"),
        ("scrolls/contract_nli", "pool: big", "", "model: pool: expected"),
        ("scrolls/contract_nli", "", "source=/nowhere", "source: /nowhere: no such folder here"),
        ("scrolls/contract_nli", "", "batch.micro_tokens=20", "expected room for the longest document"),
        ("scrolls/contract_nli", "", "task.states_gb=1", "no backbone is frozen"),
        ("scrolls/contract_nli", "", "task.fold=-1", "task.fold"),
        ("scrolls/contract_nli", "", "size=tiny", "expected full with a recipe that fine-tunes"),
    ],
)
def test_bad_input_is_one_line(folder, task, model, override, says):
    with pytest.raises(InputError) as caught:
        run(folder, "refused", task, model, 2, None, *([override] if override else []))
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder / "runs" / "refused").exists()
