"""Two machines, as two network namespaces of this one: they share the disk and nothing else but a cable."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conceptron.engine.recipe.shipped import SHIPPED
from conceptron.engine.trainer import train

BIN = Path(sys.executable).parent
TINY = ["train.steps=4", "eval.every=0", "checkpoint.every=0", "model.dropout=0"]
HEAD, OTHER = "10.213.7.1", "10.213.7.2"


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts():
    """The names of two namespaces, each with one end of a cable, which has the same name."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"conc{os.getpid()}{side}" for side in "ab"]
    made = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", names[1], "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for name, address in zip(names, (HEAD, OTHER), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            ip("netns", "del", name)


def start(host: str, number: int, words: list, output: Path) -> subprocess.Popen:
    """What `recipes/launch/torchrun.sh` starts on a host."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "TRITON_INTERPRET")}
    said = {"NODES": "2", "NODE_RANK": str(number), "HEAD": HEAD, "GPUS": "1", "GLOO_SOCKET_IFNAME": host}
    environment = {**inherited, **said, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    script = ["sh", SHIPPED / "launch" / "torchrun.sh", *words]
    with output.open("w") as file:
        return subprocess.Popen(
            ["ip", "netns", "exec", host, *map(str, script)], env=environment, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip


def sent_bytes(host: str) -> int:
    (link,) = json.loads(ip("-n", host, "-s", "-j", "link", "show", host))
    return link["stats64"]["tx"]["bytes"]


def losses(folder: Path) -> list[float]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if entry["kind"] == "train"]


def test_two_hosts_train_as_one(hosts, recipe, tmp_path):
    """Each holds a half of every text, and a half of the optimizer's state."""
    words = [recipe, *TINY, "train.sequence_ranks=2"]
    outputs = [tmp_path / f"output-{i}" for i in range(2)]
    ranks = [start(host, i, words, output) for i, (host, output) in enumerate(zip(hosts, outputs, strict=True))]
    try:
        codes = [rank.wait(timeout=170) for rank in ranks]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
    assert codes == [0, 0], "\n".join(output.read_text()[-3000:] for output in outputs)
    said = [output.read_text() for output in outputs]
    assert "step 4/4" in said[0] and "step" not in said[1], "one host speaks for both"
    one = train(recipe, [*TINY, "run.name=one"])
    assert losses(tmp_path / "runs" / "tiny") == pytest.approx(losses(one), rel=2e-5)
    weights = (one / "model" / "model.safetensors").stat().st_size
    assert all(sent_bytes(host) > weights for host in hosts), "gradients of several steps went through the cable"
