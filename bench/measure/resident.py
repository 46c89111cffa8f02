"""Peak resident memory of a call in a fresh process."""

import ctypes
import gc
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ...engine.files import as_json


class Memory(NamedTuple):
    baseline_bytes: int  # before the measured call: parameters, inputs, libraries
    peak_bytes: int

    @property
    def extra_bytes(self) -> int:
        return self.peak_bytes - self.baseline_bytes




def resident_peak(target: str, timeout_s: float = 600, **arguments: Any) -> tuple[Memory, Any]:
    """Peak resident memory of one call in a fresh process, and what the call returned.

    ``target`` "package.module:function" is called with ``arguments`` (JSON values) and returns the call to measure. The
    baseline is taken in between; the peak starts anew there where the system allows it. The call's result must be JSON.

    Raises:
        RuntimeError: the child failed, with its last line of standard error, or took longer than ``timeout_s``.
    """
    command = [sys.executable, "-m", __name__, target, json.dumps(arguments, allow_nan=False)]
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
    print(as_json({"baseline_bytes": baseline, "peak_bytes": peak_resident_bytes(), "result": result}))


def resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def return_free_pages() -> None:
    """What was freed goes back to the system (glibc): else a call grows into it unseen."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


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


if __name__ == "__main__":
    resident_child(*sys.argv[1:])
