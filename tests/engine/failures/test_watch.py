"""A rank that is killed, stopped or asleep: its number in one line, and nobody left. Lack of memory, too."""

import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch.distributed as dist

from conceptron.engine.failures import watch

from ..running import run_jobs

SHORT = ["train.steps=8", "eval.every=0", "checkpoint.every=2", "run.hang_minutes=0.05", "model.dropout=0"]
WIDE = ["model.intermediate_size=9000", "batch.tokens=4096", "batch.micro_tokens=4096", "checkpoint.every=0"]
DEEP = ["model.intermediate_size=900000"]


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def ran(recipe_in, tmp_path_factory):
    """name -> (exit codes, what was said on standard error)"""
    folder = tmp_path_factory.mktemp("watch")
    recipe = str(recipe_in(folder))
    jobs = {
        "killed": dict(fault=["kill", 1, 5]),
        "killed first": dict(fault=["kill", 0, 5], port=free_port()),
        "frozen": dict(fault=["freeze", 1, 5], port=free_port()),
        "frozen first": dict(fault=["freeze", 0, 5], port=free_port()),
        "asleep": dict(fault=["sleep", 1, 5]),
        "wide": dict(world=1, memory_mb=300, overrides=WIDE),
        "deep": dict(world=1, memory_mb=300, overrides=DEEP),
    }
    for name, job in jobs.items():
        run = name.replace(" ", "-")
        overrides = [f"run.name={run}", *SHORT, *job.get("overrides", [])]
        job |= dict(world=job.get("world", 2), recipe=recipe, overrides=overrides, errors=f"{folder}/{run}.txt")
    codes, _ = run_jobs(list(jobs.values()), folder)
    return {name: (code, Path(jobs[name]["errors"]).read_text()) for name, code in zip(jobs, codes, strict=True)}


@pytest.mark.parametrize("name, rank, what", [
    ("killed", 1, "has died"),
    ("killed first", 0, "has died"),
    ("frozen", 1, "is stopped"),
    ("frozen first", 0, "is stopped"),
])  # fmt: skip
def test_a_rank_that_is_gone_is_named_and_killed(ran, name, rank, what):
    codes, said = ran[name]
    assert codes[rank] == -9 and codes[1 - rank] == watch.FAILED, said
    (line,) = [line for line in said.splitlines() if "error" in line]
    expected = rf"conceptron: error: rank {rank} \(process \d+ on \S+\) {what}, after step 5; "
    assert re.match(expected + r"step-0000000[24] is intact; go on with resume=auto", line), said
    assert "Traceback" not in said


def test_a_rank_that_hangs_says_where(ran):
    codes, said = ran["asleep"]
    assert codes == [watch.FAILED] * 2, said
    (line,) = [line for line in said.splitlines() if "error" in line]
    assert "no step for 0.05 minutes (run.hang_minutes) after step 5: rank 1 is in " in line and "rank 0" not in line
    assert " is intact; go on with resume=auto" in line


def test_a_lack_of_memory_is_one_line_with_what_to_lower(ran):
    (codes, wide), (codes_deep, deep) = ran["wide"], ran["deep"]
    assert codes == codes_deep == [1]
    assert re.search(r"LaunchError: \S+wide: out of memory in step 1, asked for \d+\.\d\d [GM]B; held at most: ", wide)
    assert "activations and the rest" in wide and "weights" in wide
    assert "lower batch.micro_tokens (4096), or set train.recompute=true; there is no checkpoint yet; start" in wide
    built = r"deep: out of memory while the model was built, asked for 0\.11 GB; lower model.hidden_size"
    assert re.search(built, deep)
    assert "Traceback" not in wide + deep


def test_the_position_of_a_thread_and_the_state_of_a_process(monkeypatch):
    monkeypatch.setattr(watch, "PACKAGE", str(Path(__file__).parent) + os.sep)  # this file is ours, wherever it lies
    started, end = threading.Event(), threading.Event()

    def wait() -> None:
        started.set()
        end.wait(60)

    thread = threading.Thread(target=wait)
    thread.start()
    started.wait()
    where, is_waiting = watch.position(thread.ident)
    end.set()
    assert "test_watch.py" in where and "(wait)" in where and not is_waiting
    me = watch.myself()
    assert watch.state_of(me) in ("R", "S") and watch.state_of({**me, "started": "1"}) == ""  # another had its number
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert watch.stat(child.pid) == ("", "")


def test_what_another_rank_is_behind():
    assert watch.is_lost(RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    assert watch.is_lost(dist.DistBackendError("NCCL error"))
    assert not watch.is_lost(RuntimeError("shapes")) and not watch.is_lost(None)
