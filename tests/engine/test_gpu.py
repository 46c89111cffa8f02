"""The same promises on a GPU, each run in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
LONG = ["train.precision=bf16", "train.steps=60", "checkpoint.every=3", "eval.every=0"]


def start(recipe: Path, *overrides: str) -> subprocess.Popen:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "TRITON_INTERPRET")
    }
    return subprocess.Popen(
        [sys.executable, "-m", "conceptron", "train", str(recipe), *LONG, *overrides], env=environment
    )


def steps(folder: Path) -> list[tuple]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    return [(entry["step"], entry["loss"].hex(), entry["lr"]) for entry in entries if entry["kind"] == "train"]


@pytest.mark.parametrize("stage", [1, 3])
def test_killed_and_resumed_is_bitwise(recipe, stage):
    runs = recipe.parent / "runs"
    process = start(recipe, f"zero.stage={stage}")
    while len(steps(runs / "tiny")) < 10:
        assert process.poll() is None
    process.kill()
    process.wait()
    assert start(recipe, f"zero.stage={stage}", "resume=auto").wait() == 0
    assert start(recipe, f"zero.stage={stage}", "run.name=whole").wait() == 0
    assert steps(runs / "tiny") == steps(runs / "whole")
    lines = map(json.loads, (runs / "tiny" / "metrics.jsonl").read_text().splitlines())
    *_, told = (line for line in lines if line["kind"] == "train")
    assert told["memory"]["gpu_peak_bytes"] > 0 and told["gpu"].keys() & {"power_w", "nvml"}
    assert all(seconds > 0 for seconds in told["seconds"].values()) and 0 < told["mfu"] < 1
    environment = json.loads((runs / "tiny" / "environment.json").read_text())
    assert environment["num_devices"] >= 1 and environment["device"] != "cpu"


def test_a_profile_leaves_a_snapshot_of_memory(recipe):
    assert start(recipe, "train.steps=4", "profile.steps=2-3").wait() == 0
    left = {path.name for path in (recipe.parent / "runs" / "tiny" / "profile").iterdir()}
    assert left == {"trace-00000.json", "table-00000.txt", "memory-00000.pickle"}
