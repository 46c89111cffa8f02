"""One command for one machine: correctness, ceilings, every comparison, within a time limit.

    conceptron bench suite --gpu [--minutes 9] [--resume] [--out runs/bench/suite]

Each stage is a process of its own and gets its share of the time that is left, so that none takes another's. A stage
that is cut short keeps what it has written; ``--resume`` goes on with it and skips what is done. A report of everything
in the folder is written, and a short table is printed last.

    correctness    the operators' tests that need a GPU
    kernels        ceilings (copy, matmul), then every operator beside its peers at the anchor shapes
    step           a training step of the seeds' diffusion run
    scaling        time and memory against N, beside full attention
    memory         where a step's memory goes, and the longest text that fits
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..engine.errors import InputError
from ..engine.files import write_json
from .kernels.best import BEST_COLUMNS, best_peers
from .measure.environment import environment
from .measure.results import markdown_table, read_results
from .report import report

CHECKOUT = Path(__file__).parent.parent
DONE, CUT, FAILED, WAITING = "done", "cut by the time limit", "failed", "not started"
REPORT_S = 25.0  # kept back for the report and the table


class Stage(NamedTuple):
    name: str
    command: list[str]
    share: float  # of the time, relative to the other stages


def bench(what: str, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "conceptron", "bench", what, *options, "--out", str(out / what)]


def stages(out: Path, size: str) -> list[Stage]:
    """In order of worth: what must be known first runs first. ``size``: "gpu", "cpu", or "tiny" (for tests)."""
    if size == "tiny":
        sizes = ("--width", "32", "--layers", "1", "--heads", "1", "--max-tokens", "64")
        return [
            Stage("kernels", bench("kernels", out, "adaln", "--matrix", "small", "--seconds", "0.01", "--providers",
                                   "conceptron (torch)", "eager", "--device", "cpu", "--resume"), 1),
            Stage("scaling", bench("scaling", out, "--only", "concept", "--min-tokens", "32", "--seconds", "0.01",
                                   *sizes, "--device", "cpu", "--resume"), 1),
        ]  # fmt: skip
    if size == "cpu":
        return [
            Stage("kernels", bench("kernels", out, "--matrix", "cpu", "--device", "cpu", "--resume"), 4),
            Stage("scaling", bench("scaling", out, "--max-tokens", "8192", "--limit", "20", "--device", "cpu",
                                   "--resume"), 3),
            Stage("memory", bench("memory", out, "--concepts", "128", "--device", "cpu", "--resume"), 3),
        ]  # fmt: skip
    encoder = ("--width", "512", "--heads", "8", "--max-tokens", "65536", "--resume")
    listed = [
        Stage("kernels", bench("kernels", out, "--matrix", "anchor", "--seconds", "0.1", "--limit", "45",
                               "--resume"), 13),
        Stage("step", bench("step", out, "seeds-diffusion-l2", "--synthetic"), 2),
        Stage("scaling", bench("scaling", out, "--min-tokens", "1024", "--seconds", "0.1", "--limit", "5",
                               *encoder), 6),
        Stage("memory", bench("memory", out, "--min-tokens", "16384", "--concepts", "128", "--fit", "16", *encoder), 3),
    ]  # fmt: skip
    if (CHECKOUT / "tests").is_dir():
        listed.insert(0, Stage("correctness", correctness(), 5))
    return listed


def correctness() -> list[str]:
    """The tests of the operators on a GPU. Most of their time is compilation, so several processes share the GPU."""
    tests = CHECKOUT / "tests"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=", "--import-mode=importlib",
               "--confcutdir", str(tests), "-p", "no:doctest"]  # fmt: skip
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    return [*command, str(tests / "kernels")]


def run_stage(stage: Stage, seconds: float, log: Path) -> str:
    """Runs one stage, its output kept in ``log`` and shown afterwards; says how it ended.

    A stage starts processes of its own, which must not outlive it and take the GPU from the next: all are stopped.
    """
    with log.open("w") as file:
        child = subprocess.Popen(stage.command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = child.wait(timeout=max(1.0, seconds))
            ending = DONE if code == 0 else FAILED
        except subprocess.TimeoutExpired:
            ending = CUT
        finally:
            stop_group(child)
    text = log.read_text()
    print(text, flush=True)
    last = text.strip().splitlines()[-1:]
    return f"{FAILED}: {last[0][:200]}" if ending == FAILED and last else ending


def stop_group(child: subprocess.Popen) -> None:
    """Ends a process and all that it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        child.wait()


def run_stages(
    listed: Sequence[Stage], state: dict[str, str], out: Path, seconds: float, save: Callable[[], None] = lambda: None
) -> None:
    """Runs what is not done yet; ``state`` (stage -> how it ended) is brought up to date after each.

    Each stage may take its share of the time that is left, those that follow counted in: one that ends early leaves the
    rest to them, and one that is cut short has not taken it.
    """
    deadline = time.monotonic() + seconds
    waiting = [stage for stage in listed if state.get(stage.name) != DONE]
    for i, stage in enumerate(waiting):
        left = deadline - time.monotonic()
        allowed = left * stage.share / sum(each.share for each in waiting[i:])
        if allowed < 1:
            state.setdefault(stage.name, WAITING)
            continue
        print(f"--- {stage.name}: {allowed:.0f} s of {left:.0f} s left", flush=True)
        state[stage.name] = run_stage(stage, allowed, out / f"{stage.name}.log")
        save()


def main(options: argparse.Namespace) -> int:
    """The command line; exit code 0 when every stage is done, 1 otherwise."""
    begin = time.monotonic()
    if options.gpu and not torch.cuda.is_available():
        raise InputError("--gpu: torch sees no CUDA device here; leave it out to measure the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    state_file = options.out / "suite.json"
    if state_file.exists() and not options.resume:
        raise InputError(f"--out: {options.out} holds an earlier suite; add --resume, or choose another folder")
    state: dict[str, str] = json.loads(state_file.read_text())["stages"] if state_file.exists() else {}
    stamp = environment(seed=0)

    def save() -> None:
        write_json(state_file, {"environment": stamp, "stages": state})

    size = "tiny" if options.tiny else "gpu" if options.gpu else "cpu"
    seconds = 60 * options.minutes - REPORT_S - (time.monotonic() - begin)
    run_stages(stages(options.out, size), state, options.out, seconds, save)
    save()
    print(closing_table(options.out, state))
    return 0 if all(ending == DONE for ending in state.values()) else 1


def closing_table(out: Path, state: Mapping[str, str]) -> str:
    """The report, and what it comes down to: how the stages ended, and ours beside the fastest accurate peer of each
    case, forward and backward together."""
    ends = [{"stage": name, "ended": ending} for name, ending in state.items()]
    lines = [markdown_table(ends, ["stage", "ended"])]
    try:
        lines.append(f"everything: {report(out)}\n")
    except FileNotFoundError:
        lines.append(f"{out}: no stage came as far as a result\n")
    crossovers = out / "scaling" / "crossover.txt"
    if crossovers.exists() and (text := crossovers.read_text().strip()):
        lines.append(f"{text}\n")
    kernels = out / "kernels" / "kernels.json"
    if kernels.exists():
        lines.append(markdown_table(best_peers(read_results(kernels)[0]), BEST_COLUMNS))
    if any(ending != DONE for ending in state.values()):
        lines.append("not complete: go on with --resume")
    return "\n".join(lines)
