"""Every recipe that is shipped runs with size=tiny from beginning to end, and its loss falls."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from conceptron.engine.trainer import train

RECIPES = Path(__file__).parents[2] / "recipes"
# neither tiny.yaml, which is laid over them, nor tables of ablations
SHIPPED = sorted(path for path in RECIPES.rglob("*.yaml") if "objective" in yaml.safe_load(path.read_text()))
STEPS = 8
FEW = [
    "size=tiny", "data.window=32", "data.validation=0.2", "batch.tokens=256", "batch.micro_tokens=128",
    f"train.steps={STEPS}", "optim.lr=1e-2", "optim.warmup_steps=0", "eval.tokens=200",
]  # fmt: skip
OWN = {
    "progressive": ["train.stages=[{until: 2, window: 12}, {until: 4, window: 20}]"],
    "long": ["train.stages=[{until: 2, window: 12}, {until: 4, window: 20}]"],
    "read": ["model.backbone={teacher}", "model.hidden_size=16", "model.num_attention_heads=2",
             "model.backbone_window=32", "distill.stretches=2"],
}  # fmt: skip


FALLS_TO = {"read": 0.98}  # of the first loss; words are told by a frozen table, here of a backbone that knows nothing


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_it_runs_and_learns(path, text, save_teacher, tmp_path):
    data = [f"data.source={text}", f"data.tokenizer={text}/tokenizer", f"data.cache={text}/cache"]
    if "distill" in yaml.safe_load(path.read_text()):
        data.append(f"distill.teacher={save_teacher(tmp_path / 'teacher', 16)}")
    own = [override.replace("{teacher}", str(tmp_path / "teacher")) for override in OWN.get(path.stem, [])]
    folder = train(path, [*FEW, *data, f"run.folder={tmp_path}", *own])
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if entry["kind"] == "train"]
    first, *_, a, b, c = (entry.get("task", entry["loss"]) for entry in steps)
    assert len(steps) == STEPS and (a + b + c) / 3 < FALLS_TO.get(path.stem, 0.8) * first
    assert (folder / "model" / "model.safetensors").exists() and folder.name == f"{path.stem}-tiny"


def arms() -> list[list[str]]:
    """The commands that the head of mixture.yaml gives for other shares, as overrides."""
    head = "".join(re.findall(r"^# ?(.*\n)", (RECIPES / "pretrain" / "mixture.yaml").read_text(), re.MULTILINE))
    commands = head.replace("\\\n", " ").split("conceptron train recipes/pretrain/mixture.yaml")[1:]
    return [[word for word in shlex.split(command.partition("\n\n")[0]) if "=" in word] for command in commands]


@pytest.mark.parametrize("name, parts", [("mixture-100", {}), ("mixture-20", {"tsdae": 1, "prefix_diffusion": 4})])
def test_the_arms_of_the_mixture_run(name, parts, text, tmp_path):
    (overrides,) = [given for given in arms() if f"run.name={name}" in given]
    data = [f"data.source={text}", f"data.tokenizer={text}/tokenizer", f"data.cache={text}/cache"]
    folder = train(
        RECIPES / "pretrain" / "mixture.yaml",
        [*FEW, *data, *overrides, f"run.folder={tmp_path}", "train.steps=10", "eval.every=0"],
    )
    assert folder.name == name
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    taken = [entry.get("objective") for entry in steps if entry["kind"] == "train"]
    assert {part: taken.count(part) for part in parts} == {part: 2 * weight for part, weight in parts.items()}
