"""One command for one machine: correctness, ceilings, every comparison, within a time limit.

    conceptron bench suite --gpu [--minutes 9] [--resume] [--out runs/bench/suite]

Each stage is a process of its own with what is left of the time. A stage that the limit cuts short keeps what it has
written; ``--resume`` goes on with it and skips the stages that are done. A short table is printed last.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .harness import environment, markdown_table, read_results, write_json

CHECKOUT = Path(__file__).parent.parent
DONE, CUT, FAILED, WAITING = "done", "cut by the time limit", "failed", "not started"


class Stage(NamedTuple):
    name: str
    command: list[str]


def stages(out: Path, device: str) -> list[Stage]:
    """In order of worth: what must be known first runs first."""

    def bench(what: str, *options: str) -> list[str]:
        return [sys.executable, "-m", "conceptron", "bench", what, *options]

    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(CHECKOUT / "tests" / "kernels")]
    on_gpu = device == "cuda"
    matrix, longest, width = ("anchor", "65536", "512") if on_gpu else ("cpu", "8192", "128")
    heads = str(int(width) // 64)
    listed = [
        Stage("kernels", bench("kernels", "--matrix", matrix, "--resume", "--out", str(out / "kernels"))),
        Stage("scaling", bench("scaling", "--max-tokens", longest, "--width", width, "--heads", heads, "--limit", "20",
                               "--out", str(out / "scaling"))),
        Stage("memory", bench("memory", "--max-tokens", longest, "--width", width, "--heads", heads,
                              "--fit", "16" if on_gpu else "1", "--out", str(out / "memory"))),
    ]  # fmt: skip
    if on_gpu:
        step = bench("step", "pretrain/diffusion.yaml", "--synthetic", "--out", str(out / "step"))
        listed.insert(1, Stage("step", step))
        if (CHECKOUT / "tests").is_dir():
            listed.insert(0, Stage("correctness", tests))
    return listed


def run_stage(stage: Stage, seconds: float, log: Path) -> str:
    """Runs one stage, its output shown and kept in ``log``; says how it ended."""
    with log.open("w") as file:
        child = subprocess.Popen(stage.command, stdout=file, stderr=subprocess.STDOUT)
        try:
            ending = DONE if child.wait(timeout=max(1.0, seconds)) == 0 else FAILED
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            ending = CUT
    print(log.read_text())
    return ending


def main(argv: Sequence[str]) -> int:
    """Exit code 0 when every stage is done, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="conceptron bench suite", description="Everything, within a time limit.")
    parser.add_argument("--gpu", action="store_true", help="measure the GPU (without it: the CPU's small sizes)")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--resume", action="store_true", help="go on where a time limit cut the last call")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/suite"))
    options = parser.parse_args(argv)
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch sees no CUDA device here; leave it out to measure the CPU")
    device = "cuda" if options.gpu else "cpu"
    options.out.mkdir(parents=True, exist_ok=True)
    state_file = options.out / "suite.json"
    if state_file.exists() and not options.resume:
        parser.error(f"--out: {options.out} holds an earlier suite; add --resume, or choose another folder")
    state = json.loads(state_file.read_text())["stages"] if state_file.exists() else {}
    deadline = time.monotonic() + 60 * options.minutes
    for stage in stages(options.out, device):
        left = deadline - time.monotonic()
        if state.get(stage.name) == DONE:
            continue
        if left < 5:
            state.setdefault(stage.name, WAITING)
            continue
        print(f"--- {stage.name}: {left:.0f} s left", flush=True)
        state[stage.name] = run_stage(stage, left, options.out / f"{stage.name}.log")
        write_json(state_file, {"environment": environment(), "stages": state})
    write_json(state_file, {"environment": environment(), "stages": state})
    print(closing_table(options.out, state))
    unfinished = [name for name, ending in state.items() if ending != DONE]
    if unfinished:
        print(f"not complete: {', '.join(f'{name} ({state[name]})' for name in unfinished)}; go on with --resume")
    return 1 if unfinished else 0


def closing_table(out: Path, state: dict[str, str]) -> str:
    """Ours beside the fastest accurate peer of each case, forward and backward together."""
    path = out / "kernels" / "kernels.json"
    if not path.exists():
        return markdown_table([{"stage": name, "ended": ending} for name, ending in state.items()], ["stage", "ended"])
    return markdown_table(best_peers(read_results(path)[0]), BEST_COLUMNS)


BEST_COLUMNS = ["operator", "case", "ours ms", "share of floor", "best peer", "its ms", "ours is faster by"]


def best_peers(rows: Sequence[dict]) -> list[dict]:
    """One line a case: our time and that of the fastest peer whose result passed its check, wins and losses alike."""
    table = []
    both = [row for row in rows if row["mode"] == "both"]
    for operator, case in dict.fromkeys((row["operator"], row["case"]) for row in both):
        ran = [
            row for row in both
            if (row["operator"], row["case"]) == (operator, case) and row.get("accurate") is True
        ]  # fmt: skip
        mine = [row for row in ran if row["provider"].startswith("conceptron")]
        theirs = [row for row in ran if row not in mine]
        ours, peer = (min(group, key=lambda row: row["ms"], default=None) for group in (mine, theirs))
        table.append({
            "operator": operator, "case": case, "ours ms": ours and ours["ms"],
            "share of floor": ours and ours["share_of_floor"], "best peer": peer["provider"] if peer else "none ran",
            "its ms": peer and peer["ms"], "ours is faster by": peer["ms"] / ours["ms"] if ours and peer else None,
        })  # fmt: skip
    return table
