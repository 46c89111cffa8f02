"""Where something was computed, and with which code: what environment.json of a run says."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .launching.launch import World

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "tokenizers", "datasets", "safetensors", "numpy")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "NCCL_DEBUG", "CONCEPTRON_BACKEND", "TRITON_INTERPRET")


def environment(world: World) -> dict[str, Any]:
    """JSON. ``commit`` and ``dirty`` (whether there are changes on top of it) are None where no one knows them."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    cuda = world.device.type == "cuda"
    commit, dirty = checkout()
    return {
        "conceptron": __version__,
        "commit": commit,
        "dirty": dirty,
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": installed,
        "world_size": world.size,
        "device": torch.cuda.get_device_name(world.device) if cuda else "cpu",
        "num_devices": torch.cuda.device_count() if cuda else 0,
        "cuda": torch.version.cuda,
        "cpu_count": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def checkout() -> tuple[str | None, bool | None]:
    """(commit, has uncommitted changes) when the package runs from a git checkout of its own.

    A copy without its .git is what CONCEPTRON_COMMIT says (``git describe --always --abbrev=40 --dirty`` of the
    original); without that, (None, None).
    """
    root = Path(__file__).parents[1]
    if (root / ".git").exists():
        commit = first_line(["git", "-C", str(root), "rev-parse", "HEAD"])
        if commit is not None:
            return commit, first_line(["git", "-C", str(root), "status", "--porcelain"]) is not None
    told = os.environ.get("CONCEPTRON_COMMIT")
    return (told.removesuffix("-dirty"), told.endswith("-dirty")) if told else (None, None)


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
