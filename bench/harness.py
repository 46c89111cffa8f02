"""How everything in bench/ is timed, how its memory is measured, and how results are written.

Timing: providers take turns in a shuffled order, one sample each a round, so that a machine that slows down slows all
of them; medians and the 20th and 80th percentile. On a CPU a sample is the mean of enough calls to last a millisecond.
On a GPU it is one replay of a CUDA graph of many calls that walk over several copies of the inputs, so that L2 is cold,
timed by events behind a kernel that keeps the GPU busy until the host has queued the round, so that no launch gap is
timed. The GPU path has not been run on a GPU yet.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

Call = Callable[[], object]


class Timing(NamedTuple):
    """Milliseconds a call. ``method``: "clock" (CPU), "graph" (CUDA graph) or "events" (CUDA, cannot be captured)."""

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
    min_rounds: int = 5, max_rounds: int = 200, seed: int = 0,
) -> dict[str, Timing | Refusal]:  # fmt: skip
    """Times every provider beside the others; one that raises is a ``Refusal`` and does not stop the rest.

    A provider is a call without arguments, or several that do the same on different copies of their inputs. Warm-up
    (compilation included) is not timed. Rounds go on until ``budget_s`` seconds a provider are spent, between
    ``min_rounds`` and ``max_rounds``.
    """
    on_cuda = torch.device(device).type == "cuda"
    ready: dict[str, Sampler] = {}
    refused: dict[str, Refusal] = {}
    for name, calls in providers.items():
        copies = [calls] if callable(calls) else list(calls)
        try:
            ready[name] = prepare_cuda(copies) if on_cuda else prepare_cpu(copies)
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


class Sampler(NamedTuple):
    run: Callable[[], float]  # CPU: one sample in ms a call; CUDA: queues one sample
    num_calls: int
    method: str


def prepare_cpu(copies: Sequence[Call], sample_s: float = 1e-3, warm_up_s: float = 0.05) -> Sampler:
    start, durations = time.perf_counter(), []
    # the first call may build caches, so a quick one is warmed up twice; a long one has better uses for its time
    while not durations or (durations[0] < 1 and len(durations) < 2) or (
        time.perf_counter() - start < warm_up_s and len(durations) < 1000
    ):
        before = time.perf_counter()
        copies[len(durations) % len(copies)]()
        durations.append(time.perf_counter() - before)
    num_calls = max(len(copies), math.ceil(sample_s / max(min(durations), 1e-7)))

    def sample() -> float:
        begin = time.perf_counter()
        for i in range(num_calls):
            copies[i % len(copies)]()
        return (time.perf_counter() - begin) * 1e3 / num_calls

    return Sampler(sample, num_calls, "clock")


def prepare_cuda(copies: Sequence[Call], sample_s: float = 1e-3) -> Sampler:
    for _ in range(3):
        for call in copies:
            call()
    once = elapsed_ms(copies[0]) * 1e-3
    num_calls = len(copies) * max(1, math.ceil(sample_s / max(once, 1e-6) / len(copies)))

    def body() -> None:
        for i in range(num_calls):
            copies[i % len(copies)]()

    try:
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            copies[0]()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            body()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:  # something in it synchronises with the host; told by the method in the result
        torch.cuda.synchronize()
        return Sampler(lambda: body() or 0.0, num_calls, "events")
    return Sampler(lambda: graph.replay() or 0.0, num_calls, "graph")


def time_round_cuda(order: Sequence[str], ready: Mapping[str, Sampler], samples: Mapping[str, list[float]]) -> None:
    events = {name: (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for name in order}
    torch.cuda._sleep(2_000_000)  # about 1 ms: the host queues ahead of the GPU
    for name in order:
        events[name][0].record()
        ready[name].run()
        events[name][1].record()
    torch.cuda.synchronize()
    for name in order:
        samples[name].append(events[name][0].elapsed_time(events[name][1]) / ready[name].num_calls)


def elapsed_ms(call: Call) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def num_cold_copies(bytes_per_call: int, limit: int = 64) -> int:
    """Copies of the inputs that push a call's own out of L2 before its turn: three times L2, at most ``limit``."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return min(limit, 1 + math.ceil(3 * l2_bytes / max(1, bytes_per_call)))


# --- memory -----------------------------------------------------------------------------------------------------------


def cuda_peak(call: Call) -> Memory:
    """Peak of torch's CUDA allocator during one call, warm-up excluded."""
    call()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    baseline = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return Memory(baseline, torch.cuda.max_memory_allocated())


def resident_peak(target: str, timeout_s: float = 600, **arguments: Any) -> tuple[Memory, Any]:
    """Peak resident memory of one call in a fresh process, and what the call returned.

    ``target`` "package.module:function" is called with ``arguments`` (JSON values) and returns the call to measure. The
    baseline is taken in between; the peak starts anew there where the system allows it. The call's result must be JSON.

    Raises:
        RuntimeError: the child failed; the message ends with its last line of standard error.
    """
    command = [sys.executable, "-m", __name__, target, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
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

    What a run records about itself (``engine.telemetry.environment``) is part of it; None is unknown or not there.
    """
    from ..engine import telemetry
    from ..engine.launch import World

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = telemetry.environment(World(rank=0, local_rank=0, size=1, device=device))
    commit, dirty = checkout()
    program, *rest = run.pop("command")
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
    """(commit, has uncommitted changes) when the package runs from a git checkout of its own, else (None, None)."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None, None
    commit = first_line(["git", "-C", str(root), "rev-parse", "HEAD"])
    return commit, None if commit is None else first_line(["git", "-C", str(root), "status", "--porcelain"]) is not None


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
