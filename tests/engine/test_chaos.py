"""One run through kills, torn saves, full disks and damaged files, by a fixed seed, in bounded time: nothing shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conceptron.engine.errors import InputError
from conceptron.engine.trainer import train

SECONDS = 60  # after which nothing more happens to the run; on a quiet core it takes a third of it
LONG = ["train.steps=40", "checkpoint.every=3", "eval.every=7"]


def figures(run: Path) -> list[tuple]:
    """What has to be the same to the last bit."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["kind"] in ("train", "eval")]
    names = ("loss", "grad_norm", "lr", "tokens", "nll_unseen")
    return [(line["kind"], line["step"], *(line.get(name) for name in names)) for line in kept]


def same_end(run: Path, other: Path) -> bool:
    first, second = (load_file(each / "model" / "model.safetensors") for each in (run, other))
    return figures(run) == figures(other) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(recipe_in, tmp_path_factory) -> Path:
    return train(recipe_in(tmp_path_factory.mktemp("whole")), LONG)


@pytest.mark.timeout(240)
def test_whatever_happens_the_losses_are_those_of_an_uninterrupted_run(whole, recipe, tmp_path):
    run = tmp_path / "runs" / "tiny"
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("chaos.py"), recipe, run, "1", str(SECONDS), *LONG],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    happened = json.loads(done.stdout.splitlines()[-1])
    assert {"kill -9", "torn -9", "full -9", "stop 143"} <= happened.keys(), happened
    assert same_end(run, whole), happened


def test_a_small_disk_that_is_full(whole, recipe, tmp_path):
    """A real one, in memory: training goes on without its checkpoints, gives up, and goes on when there is room."""
    disk = tmp_path / "runs"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", disk]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs privileges")
    try:
        with pytest.raises(InputError, match=r"(could not be saved|cannot be written).*No space left.*is intact"):
            train(recipe, [*LONG, "checkpoint.keep_last=50"])
        kept = sorted((disk / "tiny" / "checkpoints").iterdir())
        assert kept and all(folder.name.startswith("step-") for folder in kept)
        subprocess.run(["mount", "-o", "remount,size=40m", disk], check=True)
        assert same_end(train(recipe, [*LONG, "resume=auto"]), whole)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # what failed may hold a file open
