"""A run's own recipe: the same run, wherever it lies, whatever the defaults are by then."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from conceptron import __version__
from conceptron.bench.analyze import analyze
from conceptron.engine.checkpoints import checkpoint
from conceptron.engine.errors import InputError
from conceptron.engine.recipe.load import load_recipe, save_recipe
from conceptron.engine.record import HERE, record, trajectory
from conceptron.engine.telemetry import Telemetry
from conceptron.engine.trainer import train
from conceptron.models.decisions import FIELDS
from conceptron.models.objectives import pmi

FEW = ["train.steps=4", "eval.every=0", "checkpoint.every=2"]


@pytest.fixture
def relative(recipe, text, tmp_path, monkeypatch) -> Path:
    """A recipe whose places are all relative to the working directory, with a copy of the text beside it."""
    shutil.copytree(text, tmp_path / "text", ignore=shutil.ignore_patterns("cache"))
    tree = yaml.safe_load(recipe.read_text())
    tree["run"]["folder"] = "runs"
    tree["data"] |= {"source": "text", "tokenizer": "text/tokenizer", "cache": "cache"}
    recipe.write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    return Path("tiny.yaml")


def stop_after(step: int, monkeypatch) -> None:
    """The process dies while a step is being reported."""
    report = Telemetry.step

    def report_and_die(self, now, *rest):
        report(self, now, *rest)
        if now == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Telemetry, "step", report_and_die)


def losses(folder: Path) -> list[float]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if entry["kind"] == "train"]


def test_a_run_that_was_moved_goes_on_and_is_analysed(relative, tmp_path, monkeypatch, capsys):
    """From another directory, under another name; the text has moved as well, and is named where it is now."""
    whole = losses(train(relative, [*FEW, "run.name=whole"]))
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            train(relative, FEW)
    elsewhere = tmp_path / "else" / "where"
    elsewhere.mkdir(parents=True)
    shutil.copytree("runs/tiny", elsewhere / "moved")
    shutil.rmtree("runs/tiny")
    monkeypatch.chdir(elsewhere)
    again = train("moved/recipe.yaml", ["resume=auto"])
    assert again.resolve() == elsewhere / "moved" and not (tmp_path / "runs" / "tiny").exists()
    assert losses(again) == whole and (again / "model" / "config.json").is_file()
    monkeypatch.chdir("/")
    report = analyze(elsewhere / "moved")
    assert json.loads((report / "summary.json").read_text())["name"] == "moved"
    shutil.rmtree(again / "model")
    shutil.move(tmp_path / "text", tmp_path / "words")
    with pytest.raises(InputError, match="text"):
        train(again / "recipe.yaml", ["resume=auto"])
    places = [f"data.source={tmp_path}/words", f"data.tokenizer={tmp_path}/words/tokenizer"]
    train(again / "recipe.yaml", ["resume=auto", *places])
    assert (again / "model" / "config.json").is_file()


def test_places_are_from_the_root_on_and_names_of_the_hub_stay(relative, tmp_path):
    os.mkdir("bert")
    more = ["init={source: bert}", "distill={teacher: org/teacher, similarity: 0}",
            "data.source=[text, org/corpus, pydocs, 'text/*.txt']", "data.validation=text/00.txt"]  # fmt: skip
    made = record(load_recipe(relative, more))
    assert [source.path for source in made.data.source] == [
        f"{tmp_path}/text", "org/corpus", "pydocs", f"{tmp_path}/text/*.txt"
    ]  # fmt: skip
    assert made.data.tokenizer == f"{tmp_path}/text/tokenizer" and made.data.cache == f"{tmp_path}/cache"
    assert made.data.validation == f"{tmp_path}/text/00.txt" and made.run.folder == f"{tmp_path}/runs"
    assert made.init.source == f"{tmp_path}/bert" and made.distill["teacher"] == "org/teacher"
    os.rmdir("bert")  # a run does without by then
    assert trajectory(made)["init.source"] == HERE
    os.mkdir("bert")
    compared = trajectory(load_recipe(relative, more))
    assert compared["init.source"] == compared["data.tokenizer"] == HERE
    assert [source["path"] for source in compared["data.source"]] == [HERE, "org/corpus", "pydocs", HERE]
    assert trajectory(made) == compared


def test_phrases_are_compared_by_what_they_say_and_counted_anew(relative, tmp_path):
    os.makedirs("cache/phrases-0")
    for name in ("cache/phrases-0/phrases.json", "own.json"):
        pmi.save(pmi.Phrases(300, [[5, 6]], [1.0]), name)
    objective = "objective={name: mlm, masking: pmi, phrases: %s}"
    counted, own = (load_recipe(relative, [objective % name]) for name in ("cache/phrases-0/phrases.json", "own.json"))
    assert record(counted).objective["phrases"] is None and record(counted).needs_phrases
    assert record(own).objective["phrases"] == f"{tmp_path}/own.json"
    assert trajectory(counted) == trajectory(own)
    pmi.save(pmi.Phrases(300, [[5, 7]], [1.0]), "own.json")
    assert trajectory(counted) != trajectory(own)


def test_a_later_default_does_not_change_a_replay(relative, tmp_path, monkeypatch):
    """recipe.yaml of a run has every field of the model; what resumes from the old recipe is told."""
    folder = train(relative, FEW)
    saved = yaml.safe_load((folder / "recipe.yaml").read_text())["model"]
    assert saved.keys() >= set(FIELDS) - {"vocab_size"} and saved["anchor_bias"] == 3.0
    before = load_recipe(folder / "recipe.yaml").build_config(vocab_size=300).to_dict()
    monkeypatch.setattr(FIELDS["anchor_bias"], "default", 5.0)
    monkeypatch.setattr(FIELDS["normalize_tokens"], "default", False)
    assert load_recipe(relative, FEW).build_config(vocab_size=300).anchor_bias == 5.0
    replay = load_recipe(folder / "recipe.yaml", ["run.name=again"])
    assert replay.build_config(vocab_size=300).to_dict() == before and replay.path == tmp_path / "runs" / "again"
    with pytest.raises(InputError, match=r"made with model\.anchor_bias = 3\.0, now it is 5\.0"):
        train(relative, [*FEW, "resume=auto"])


@pytest.mark.parametrize("objective", ["mlm", "diffusion", "tsdae"])
def test_every_field_reads_back(relative, objective, tmp_path):
    hidden = ", hidden: mask" if objective == "mlm" else ""
    made = record(load_recipe(relative, [f"objective={{name: {objective}{hidden}}}", "model.dropout=0.3"]))
    save_recipe(made, tmp_path / "again.yaml")  # reads it back
    assert made.model["dropout"] == 0.3 and made.model["hidden_tokens"] == ("mask" if hidden else "drop")


def test_what_computed_it_is_on_file(relative):
    found = json.loads((train(relative, FEW) / "environment.json").read_text())
    assert found["conceptron"] == __version__
    if found["commit"] is None:  # not from a checkout
        assert found["dirty"] is None
    else:
        assert len(found["commit"]) == 40 and found["dirty"] in (True, False)


def test_a_recipe_beside_other_files_is_no_run(relative, tmp_path):
    """Only the folder of a run says where the run lies."""
    shutil.copy(relative, "recipe.yaml")
    assert load_recipe("recipe.yaml").run.folder == "runs"
    assert checkpoint.list_checkpoints(tmp_path) == []
