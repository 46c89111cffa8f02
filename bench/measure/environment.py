"""What a number depends on besides the code measured: the stamp of every result."""

import importlib.util
import os
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ...engine import environment as of_run
from ...engine.environment import first_line, last_line
from ...engine.launching.launch import World

COMMAND = "conceptron"  # however Python was told to run it


def environment(seed: int | None = None) -> dict[str, Any]:
    """What a number depends on besides the code measured: commit, hardware, driver, versions, threads, date, command.

    What a run records about itself (``engine.environment``) is part of it; None is unknown or not there. The
    command leaves out where results go (``--out``), which changes no number, and shortens absolute paths to their last
    part, which say nothing elsewhere.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = of_run.environment(World(rank=0, local_rank=0, size=1, device=device))
    program, *rest = run.pop("command")
    if "--out" in rest:
        del rest[rest.index("--out") : rest.index("--out") + 2]
    return {
        "commit": run.pop("commit"),
        "dirty": run.pop("dirty"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "command": " ".join([
            COMMAND if program.endswith("__main__.py") else Path(program).name,
            *(Path(word).name if word.startswith("/") else word for word in rest),
        ]),
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
