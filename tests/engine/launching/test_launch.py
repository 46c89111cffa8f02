"""How processes find each other, and how they end: the real launchers, in processes of their own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from conceptron.__main__ import main
from conceptron.engine import compat
from conceptron.engine.checkpoints import checkpoint
from conceptron.engine.errors import LaunchError
from conceptron.engine.launching import launch, place
from conceptron.engine.trainer import train

BIN = Path(sys.executable).parent
LONG = ["train.steps=40", "checkpoint.every=3", "eval.every=0"]
SHORT = ["train.steps=20", *LONG[1:]]


def steps(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    return [entry for entry in entries if entry["kind"] == "train"]


def start(command: list, folder: Path) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "TRITON_INTERPRET")}
    with (folder / "output").open("w") as output:
        return subprocess.Popen(
            [str(part) for part in command], stdout=output, stderr=output, env={**environment, "OMP_NUM_THREADS": "1"},
            cwd=folder, start_new_session=True,
        )  # fmt: skip


def on_a_free_port() -> list:
    """Options of `deepspeed`, whose own port another test may have."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("", 0))
        return ["--master_port", probe.getsockname()[1]]


def wait_for(process: subprocess.Popen, folder: Path, number: int) -> None:
    """Until the run has recorded that many steps."""
    deadline = time.monotonic() + 180
    while len(steps(folder / "runs" / "tiny")) < number:
        output = (folder / "output").read_text()[-3000:]
        assert process.poll() is None, f"ended early with {process.returncode}: {output}"
        assert time.monotonic() < deadline, output
        time.sleep(0.01)


def exact(folder: Path) -> list[tuple]:
    return [(entry["step"], entry["loss"].hex(), entry["lr"]) for entry in steps(folder)]


def test_killed_in_the_middle_and_resumed(recipe, tmp_path):
    """SIGKILL at any moment: the resumed run has every step once, and the losses of a run that was never stopped."""
    process = start([BIN / "conceptron", "train", recipe, *SHORT], tmp_path)
    wait_for(process, tmp_path, 7)
    process.kill()
    process.wait()
    folder = tmp_path / "runs" / "tiny"
    done, newest = len(steps(folder)), checkpoint.list_checkpoints(folder / "checkpoints")[0]
    assert 7 <= done < 20 and checkpoint.load_progress(newest).step < 20
    train(recipe, [*SHORT, "resume=auto"])
    assert exact(folder) == exact(train(recipe, [*SHORT, "run.name=whole"]))


def test_the_deepspeed_launcher_and_torchrun(recipe, tmp_path):
    """Two ranks under `deepspeed`, whose death stops and saves them; one under `torchrun` goes on, as if ever alone."""
    arguments = ["train", recipe, *LONG, "model.dropout=0", "zero.stage=2"]
    launcher = [BIN / "deepspeed", "--num_gpus", 2, *on_a_free_port(), "--module", "conceptron"]
    process = start([*launcher, *arguments], tmp_path)
    wait_for(process, tmp_path, 4)
    process.terminate()  # only this one: the inner launcher and the ranks hear nothing
    process.wait()
    deadline = time.monotonic() + 60
    while running(recipe):
        assert time.monotonic() < deadline, "ranks are still training"
        time.sleep(0.05)
    folder = tmp_path / "runs" / "tiny"
    newest, done = checkpoint.list_checkpoints(folder / "checkpoints")[0], len(steps(folder))
    assert checkpoint.load_progress(newest).step == done < 40
    assert len(list(newest.glob("state-*-of-00002.safetensors"))) == 2

    elastic = [BIN / "torchrun", "--standalone", "--nproc_per_node", 1, "-m", "conceptron"]
    process = start([*elastic, *arguments, "resume=auto"], tmp_path)
    assert process.wait(timeout=180) == 0, (tmp_path / "output").read_text()[-3000:]
    one = steps(train(recipe, [*LONG, "model.dropout=0", "run.name=one"]))
    assert [entry["step"] for entry in steps(folder)] == [entry["step"] for entry in one]
    assert [entry["loss"] for entry in steps(folder)] == pytest.approx([entry["loss"] for entry in one], rel=1e-4)


@pytest.mark.parametrize("launcher, signum, what", [
    (["torchrun", "--standalone", "--nproc_per_node", 2, "-m", "conceptron"], signal.SIGSTOP, "is stopped"),
    (["deepspeed", "--num_gpus", 2, "--module", "conceptron"], signal.SIGKILL, "has died"),
])  # fmt: skip
def test_a_rank_that_is_gone_is_named_and_leaves_nobody_behind(recipe, tmp_path, launcher, signum, what):
    name, *options = launcher
    launcher = [BIN / name, *(on_a_free_port() if name == "deepspeed" else ()), *options]
    process = start([*launcher, "train", recipe, *LONG, "train.steps=9000", "run.hang_minutes=0.05"], tmp_path)
    wait_for(process, tmp_path, 4)
    (victim,) = [pid for pid in running(recipe) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(victim, signum)
    assert process.wait(timeout=90) != 0
    deadline = time.monotonic() + 30
    while running(recipe):
        assert time.monotonic() < deadline, "somebody is left"
        time.sleep(0.05)
    said = (tmp_path / "output").read_text()
    (line,) = [line for line in said.splitlines() if line.startswith("conceptron: error: ")]
    assert f"rank 1 (process {victim} on " in line and f"{what}, after step " in line, said
    assert " is intact; go on with resume=auto" in line


def running(recipe: Path) -> list[int]:
    """Processes that have this recipe on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(recipe).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def test_a_bad_recipe_ends_in_one_line_and_code_2(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("train: {steps: 3, stps: 4}\ndata: {}\nobjective: {name: mlm}\n")
    assert main(["--local_rank=0", "train", "bad.yaml"]) == 2
    expected = "conceptron: error: bad.yaml: train.stps: unknown key; did you mean train.steps?\n"
    assert capfd.readouterr() == ("", expected)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["--local_rank=1", "train", "bad.yaml"]) == 2
    assert capfd.readouterr() == ("", "")  # one line is enough
    monkeypatch.setenv("LOCAL_RANK", "0")  # on another machine, whose file may be another
    assert main(["--local_rank=0", "train", "bad.yaml"]) == 2
    assert capfd.readouterr() == ("", expected)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_a_second_signal_is_not_caught():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
    with launch.StopRequest() as stop:
        assert not stop.pending
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.pending and stop.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_world_of_one_needs_no_launcher_and_leaves_nothing(monkeypatch):
    for name in place.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for _ in range(2):
        with launch.world() as world:
            assert (world.rank, world.size, world.device.type, world.is_first) == (0, 1, "cpu", True)
        assert not dist.is_initialized()


def test_sbatch_without_srun_ends_in_one_line(recipe, tmp_path, monkeypatch, capfd):
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": str(os.getpid())}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK", raising=False)
    assert main(["train", str(recipe), "run.join_minutes=0.01"]) == 2
    output = capfd.readouterr().err
    assert output.startswith("conceptron: error: 3 of 4 ranks have not come (ranks 1, 2, 3): sbatch starts a script")
    assert output.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
    assert not dist.is_initialized()


def test_a_rank_without_a_gpu(monkeypatch):
    monkeypatch.setattr(compat, "uses_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(LaunchError, match="LOCAL_RANK: expected one of the 2 GPUs of this machine, 0 to 1, got 2"):
        launch.choose_device(place.Place(2, 2, 4, 4, "localhost", 29500, False))


def test_nothing_of_a_launcher_is_left_behind(monkeypatch):
    """What runs after us in the same process, such as the Trainer of transformers, would take it for its own launch."""
    for name in place.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    with launch.world():
        assert os.environ["LOCAL_RANK"] == "0"
    assert {name: os.environ.get(name) for name in place.VARIABLES} == dict.fromkeys(place.VARIABLES)
    assert before.keys() - os.environ.keys() == set()
