"""How everything in bench/ is timed, how its memory is measured, and how results are written.

Timing: providers take turns in a shuffled order, one sample each a round, so that a machine that slows down slows all
of them; medians and the 20th and 80th percentile. On a CPU a sample is the mean of enough calls to last a millisecond;
``clock.py`` has the samples, those of a GPU too.
"""

import csv
import gc
import importlib.util
import io
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .clock import Call, Sampler, prepare_cpu, prepare_cuda, time_round_cuda


class Timing(NamedTuple):
    """Milliseconds a call. ``method``: "clock" (CPU), "graph" or "events" (CUDA), or "once" (one call, no warm-up)."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    num_samples: int
    method: str

    @property
    def noise(self) -> float:
        """(p80 - p20) / median: a difference smaller than this is not a difference."""
        return (self.p80_ms - self.p20_ms) / self.median_ms


class Refusal(NamedTuple):
    """Why a provider did not run a case."""

    reason: str


class Memory(NamedTuple):
    baseline_bytes: int  # before the measured call: parameters, inputs, libraries
    peak_bytes: int

    @property
    def extra_bytes(self) -> int:
        return self.peak_bytes - self.baseline_bytes


# --- time -------------------------------------------------------------------------------------------------------------


def compare(
    providers: Mapping[str, Call | Sequence[Call]], *, device: torch.device | str = "cpu", budget_s: float = 2.0,
    min_rounds: int = 5, max_rounds: int = 200, seed: int = 0, known_s: Mapping[str, float] | None = None,
) -> dict[str, Timing | Refusal]:  # fmt: skip
    """Times every provider beside the others; one that raises is a ``Refusal`` and does not stop the rest.

    A provider is a call without arguments, or several that do the same on different copies of their inputs. Warm-up
    (compilation included) is not timed. Rounds go on until ``budget_s`` seconds a provider are spent, between
    ``min_rounds`` and ``max_rounds``. ``known_s``: seconds of a call that has just been made, for providers that need
    no other to warm up if it was a long one (CPU).
    """
    on_cuda = torch.device(device).type == "cuda"
    ready: dict[str, Sampler] = {}
    refused: dict[str, Refusal] = {}
    for name, calls in providers.items():
        copies = [calls] if callable(calls) else list(calls)
        try:
            ready[name] = prepare_cuda(copies) if on_cuda else prepare_cpu(copies, (known_s or {}).get(name, 0.0))
        except Exception as error:  # whatever a peer raises is its result here
            refused[name] = refusal(error)
    samples: dict[str, list[float]] = {name: [] for name in ready}
    order, deal = list(ready), random.Random(seed)
    deadline = time.perf_counter() + budget_s * len(ready)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for round_index in range(max_rounds if ready else 0):
            deal.shuffle(order)
            if on_cuda:
                time_round_cuda(order, ready, samples)
            else:
                for name in order:
                    samples[name].append(ready[name].run())
            if round_index + 1 >= min_rounds and time.perf_counter() > deadline:
                break
    finally:
        if collecting:
            gc.enable()
    timed = {name: summarize(samples[name], ready[name].method) for name in ready}
    return {name: timed.get(name) or refused[name] for name in providers}


def summarize(samples_ms: Sequence[float], method: str) -> Timing:
    values = torch.tensor(samples_ms, dtype=torch.float64)
    p20, median, p80 = values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Timing(median, p20, p80, len(samples_ms), method)


def refusal(error: Exception) -> Refusal:
    lines = str(error).strip().splitlines()
    return Refusal(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)


# --- memory -----------------------------------------------------------------------------------------------------------


def resident_peak(target: str, timeout_s: float = 600, **arguments: Any) -> tuple[Memory, Any]:
    """Peak resident memory of one call in a fresh process, and what the call returned.

    ``target`` "package.module:function" is called with ``arguments`` (JSON values) and returns the call to measure. The
    baseline is taken in between; the peak starts anew there where the system allows it. The call's result must be JSON.

    Raises:
        RuntimeError: the child failed, with its last line of standard error, or took longer than ``timeout_s``.
    """
    command = [sys.executable, "-m", __name__, target, json.dumps(arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{target}: not done after {timeout_s:.0f} s") from error
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{target}: {last[0]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    return Memory(answer["baseline_bytes"], answer["peak_bytes"]), answer["result"]


def resident_child(target: str, arguments: str) -> None:
    module, function = target.split(":")
    call = getattr(import_module(module), function)(**json.loads(arguments))
    gc.collect()
    baseline = resident_bytes()
    forget_peak()
    result = call()
    print(json.dumps({"baseline_bytes": baseline, "peak_bytes": peak_resident_bytes(), "result": result}))


def resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def forget_peak() -> None:
    """Starts the process's peak anew (Linux); elsewhere it goes on counting from the start."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_resident_bytes() -> int:
    """Highest resident memory of this process. Linux's getrusage would not do: exec hands on the parent's maximum."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- environment ------------------------------------------------------------------------------------------------------


def environment(seed: int | None = None) -> dict[str, Any]:
    """What a number depends on besides the code measured: commit, hardware, driver, versions, threads, date, command.

    What a run records about itself (``engine.telemetry.environment``) is part of it; None is unknown or not there. The
    command leaves out where results go (``--out``), which changes no number.
    """
    from ..engine import telemetry
    from ..engine.launch import World

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = telemetry.environment(World(rank=0, local_rank=0, size=1, device=device))
    commit, dirty = checkout()
    program, *rest = run.pop("command")
    if "--out" in rest:
        del rest[rest.index("--out") : rest.index("--out") + 2]
    return {
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "command": " ".join([Path(program).name, *rest]),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "driver": first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "cudnn": torch.backends.cudnn.version(),
        "ptxas": ptxas_versions(),
        "cpu": cpu_name(),
        "threads": run.pop("num_threads"),
        **run.pop("packages"),
        **run,
    }


def device_of(environment: Mapping[str, Any]) -> str:
    """The hardware that a result was measured on, in a few words."""
    threads = environment.get("threads")
    return environment.get("gpu") or f"{environment.get('cpu')}, {threads} thread{'s' * (threads != 1)}"


def checkout() -> tuple[str | None, bool | None]:
    """(commit, has uncommitted changes) when the package runs from a git checkout of its own.

    A copy without its .git is what CONCEPTRON_COMMIT says (``git describe --always --abbrev=40 --dirty`` of the
    original); without that, (None, None).
    """
    root = Path(__file__).parent.parent
    if (root / ".git").exists():
        commit = first_line(["git", "-C", str(root), "rev-parse", "HEAD"])
        if commit is not None:
            return commit, first_line(["git", "-C", str(root), "status", "--porcelain"]) is not None
    told = os.environ.get("CONCEPTRON_COMMIT")
    return (told.removesuffix("-dirty"), told.endswith("-dirty")) if told else (None, None)


def ptxas_versions() -> dict[str, str | None]:
    """Versions of the assemblers that Triton may use, by file name; ``TRITON_PTXAS_PATH`` goes before them."""
    found = importlib.util.find_spec("triton")
    paths = sorted((Path(found.origin).parent / "backends/nvidia/bin").glob("ptxas*")) if found else []
    paths += [Path(os.environ[name]) for name in ("TRITON_PTXAS_PATH",) if name in os.environ]
    return {path.name: last_line([str(path), "--version"]) for path in paths}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def first_line(command: Sequence[str]) -> str | None:
    return (output_lines(command) or [None])[0]


def last_line(command: Sequence[str]) -> str | None:
    return (output_lines(command) or [None])[-1]


def output_lines(command: Sequence[str]) -> list[str]:
    """What a program prints; nothing when it is not installed or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


# --- results ----------------------------------------------------------------------------------------------------------


def write_results(
    folder: Path, name: str, rows: Sequence[Mapping[str, Any]], environment: Mapping[str, Any], *, title: str = "",
    columns: Sequence[str] | None = None,
) -> Path:  # fmt: skip
    """``name``.json (environment and rows), ``name``.csv (rows) and ``name``.md (a table); returns the JSON's path.

    A row maps columns to text, numbers, None (not measured), a ``Timing``, a ``Memory`` or a ``Refusal``. ``columns``
    picks and orders those of the Markdown table; the other two files have all.
    """
    flat = [flatten(row) for row in rows]
    every = list(dict.fromkeys(column for row in flat for column in row))
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, every, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_text(folder / f"{name}.csv", text.getvalue())
    heading = f"# {title}\n\n" if title else ""
    table = markdown_table(flat, columns or every)
    write_text(folder / f"{name}.md", f"{heading}{table}\n{environment_lines(environment)}")
    path = folder / f"{name}.json"
    write_json(path, {"environment": dict(environment), "rows": flat})
    return path


def read_results(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows, environment) of a file that ``write_results`` wrote."""
    content = json.loads(Path(path).read_text())
    return content["rows"], content["environment"]


SAME = ("commit", "gpu", "cpu", "threads", "torch", "triton", "dtype")  # of two results in one table


def rows_to_resume(path: Path, stamp: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that an interrupted run left in ``path``; none when it left no file.

    Raises:
        ValueError: they were measured with other code or elsewhere, so they do not belong in the table of ``stamp``.
    """
    if not path.exists():
        return []
    rows, before = read_results(path)
    for name in SAME:
        if before.get(name) != stamp.get(name):
            raise ValueError(f"{path} was measured with {name} {before.get(name)}, this is {stamp.get(name)}; "
                             "choose another --out")  # fmt: skip
    return rows


def flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for column, value in row.items():
        if isinstance(value, Timing):
            flat |= {column: value.median_ms, f"{column}_p20": value.p20_ms, f"{column}_p80": value.p80_ms}
            flat |= {f"{column}_samples": value.num_samples, f"{column}_method": value.method}
        elif isinstance(value, Memory):
            flat |= {column: value.peak_bytes, f"{column}_extra": value.extra_bytes}
        elif isinstance(value, Refusal):
            flat[column] = value.reason
        else:
            flat[column] = value
    return flat


def markdown_table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A Markdown table, numbers to the right; a missing value or None reads "not measured"."""
    rows = list(rows)
    numeric = [all(isinstance(row.get(c), (int, float, type(None))) for row in rows) for c in columns]
    lines = ["| " + " | ".join(columns) + " |", "|" + "|".join("---:" if n else "---" for n in numeric) + "|"]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "not measured"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def environment_lines(environment: Mapping[str, Any]) -> str:
    known = {name: in_words(value) for name, value in environment.items() if value is not None}
    return "".join(f"- {name}: {text}\n" for name, text in known.items() if text)


def in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items() if item is not None)
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def write_json(path: Path, content: Any) -> None:
    """JSON with NaN and infinities as null, written atomically."""
    write_text(path, json.dumps(finite(content), indent=2) + "\n")


def finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_text(path: Path, text: str) -> None:
    """Atomic: a reader finds the old file or the new one, never a part."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    resident_child(*sys.argv[1:])
