"""A rank that is killed, stopped or asleep: its number in one line, and nobody left."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from conceptron.engine import watch

pytestmark = pytest.mark.xdist_group("ranks")

SHORT = ["train.steps=8", "eval.every=0", "checkpoint.every=2", "run.hang_minutes=0.05", "model.dropout=0"]


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def ran(recipe_in, tmp_path_factory):
    """name -> (exit codes, lines of errors); two ranks each."""
    folder = tmp_path_factory.mktemp("watch")
    recipe = str(recipe_in(folder))
    jobs = {
        "killed": dict(fault=["kill", 1, 5]),
        "killed first": dict(fault=["kill", 0, 5], port=free_port()),
        "frozen": dict(fault=["freeze", 1, 5], port=free_port()),
        "frozen first": dict(fault=["freeze", 0, 5], port=free_port()),
        "asleep": dict(fault=["sleep", 1, 5]),
    }
    for name, job in jobs.items():
        job |= dict(world=2, recipe=recipe, overrides=[f"run.name={name.replace(' ', '-')}", *SHORT])
    found = {}
    for name, job in jobs.items():  # the lines of each by themselves
        pass
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("ranks.py"), folder / "jobs.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    codes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(codes) == len(jobs), done.stderr[-4000:]
    print(done.stderr)
    return codes


def test_x(ran):
    print(ran)
    assert 0
