"""How tests run jobs of several ranks, and read what a run has recorded."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from conceptron.engine.telemetry import Telemetry

OF_THE_MACHINE = ("elapsed_s", "tokens_per_s", "seconds", "tflops", "mfu", "memory", "gpu")


def run_jobs(
    jobs: list[dict], folder: Path, limit_s: float = 240, **variables: str
) -> tuple[list[list[int]], str]:  # fmt: skip
    """The exit codes of the ranks of each job (see ``ranks.py``), and the end of what was said on standard error."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("ranks.py"), folder / "jobs.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables}, capture_output=True, text=True, timeout=limit_s,
    )  # fmt: skip
    codes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(codes) == len(jobs), done.stderr[-4000:]
    return codes, done.stderr[-4000:]


def lines(folder: Path, kind: str = "train") -> list[dict]:
    """What metrics.jsonl of a run has of this kind."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["kind"] == kind]


def history(folder: Path, kind: str = "train") -> list[dict]:
    """The same but for times and what else the machine decides, to the last bit."""
    return [{k: v for k, v in entry.items() if k not in OF_THE_MACHINE} for entry in lines(folder, kind)]


def stop_after(step: int, monkeypatch) -> None:
    """SIGTERM as soon as a step has been told."""
    report = Telemetry.step

    def report_and_send(self, now, *rest):
        report(self, now, *rest)
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Telemetry, "step", report_and_send)
