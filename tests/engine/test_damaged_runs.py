"""Every file of a run's folder damaged, before the run is resumed or analysed: one line, or no matter."""

import json
import shutil
from pathlib import Path

import pytest

from conceptron.bench.analyze import analyze
from conceptron.engine.errors import InputError
from conceptron.engine.trainer import train

STEPS = ["train.steps=4", "eval.every=0", "checkpoint.every=2"]
NESTED = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def finished(recipe_in, tmp_path_factory) -> Path:
    return train(recipe_in(tmp_path_factory.mktemp("finished")), STEPS)


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").iterdir())[-1]


def every_checkpoint(name: str, content: str):
    def damage(run: Path) -> None:
        for folder in (run / "checkpoints").iterdir():
            (folder / name).write_text(content)

    return damage


def in_a_file(name: str, content: str | bytes):
    return lambda run: (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())


RESUMED = {  # name -> what is done to the folder of a run without its model, what is said; "": it goes on
    "recipe empty": (in_a_file("recipe.yaml", ""), "recipe.yaml: expected sections"),
    "recipe no YAML": (in_a_file("recipe.yaml", "run: ["), "recipe.yaml: "),
    "recipe in Latin-1": (in_a_file("recipe.yaml", b"run: caf\xe9"), "recipe.yaml: expected UTF-8"),
    "recipe a list": (in_a_file("recipe.yaml", "- 1"), "recipe.yaml: expected sections"),
    "metrics cut in half": (lambda run: (run / "metrics.jsonl").open("a").write('{"kind": "tr'), ""),
    "metrics of bytes": (in_a_file("metrics.jsonl", b"\xff\xfe\n3\n[]\n"), ""),
    "newest manifest nested, no environment": (lambda run: [
        (newest(run) / "MANIFEST.json").write_text(NESTED), (run / "environment.json").write_text("{"),
    ], ""),
    "newest manifest a folder": (lambda run: [
        (newest(run) / "MANIFEST.json").unlink(), (newest(run) / "MANIFEST.json").mkdir(),
    ], ""),
    "every manifest a list": (every_checkpoint("MANIFEST.json", "[]"), "no valid checkpoint left"),
    "every record altered": (every_checkpoint("trainer.json", "{}"), "no valid checkpoint left"),
    "every state cut": (every_checkpoint("state-00000-of-00001.safetensors", "x"), "no valid checkpoint left"),
    "no checkpoints": (lambda run: shutil.rmtree(run / "checkpoints"), ""),
}  # fmt: skip


@pytest.mark.parametrize("damage", RESUMED)
def test_a_damaged_run_is_resumed_or_says_why_not(finished, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("model"))
    change, found = RESUMED[damage]
    change(run)
    if not found:
        assert train(run / "recipe.yaml", ["resume=auto"]).resolve() == run and (run / "model").is_dir()
        for line in (run / "metrics.jsonl").read_text().splitlines():
            assert json.loads(line)["step"] <= 4
        return
    with pytest.raises(InputError) as caught:
        train(run / "recipe.yaml", ["resume=auto"])
    assert found in str(caught.value) and str(run) in str(caught.value) and "\n" not in str(caught.value)
    assert not (run / "model").exists()


@pytest.mark.parametrize("damage, found", [
    (in_a_file("metrics.jsonl", "3\n"), "metrics.jsonl: a line of it is not one of a run"),
    (in_a_file("metrics.jsonl", b"\xff"), "metrics.jsonl: not a file of JSON lines"),
    (in_a_file("metrics.jsonl", NESTED), "metrics.jsonl: not a file of JSON lines"),
    (in_a_file("environment.json", "{"), "environment.json: not JSON"),
    (in_a_file("environment.json", "[]"), "environment.json: expected an object"),
    (in_a_file("recipe.yaml", "run: ["), "recipe.yaml: "),
    (lambda run: (run / "model" / "model.safetensors").unlink(), "expected model.safetensors, which is not there"),
])  # fmt: skip
def test_a_damaged_run_is_not_analysed(finished, tmp_path, damage, found):
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("checkpoints"))
    damage(run)
    with pytest.raises(InputError) as caught:
        analyze(run)
    assert found in str(caught.value) and str(run) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_is_no_run(finished):
    with pytest.raises(InputError, match=r"recipe\.yaml: expected a folder, got a file"):
        analyze(finished / "recipe.yaml")
