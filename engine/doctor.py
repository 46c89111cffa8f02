"""Whether this machine can train: each check says what it found and, where something is missing, what to do."""

import argparse
import contextlib
import fcntl
import functools
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from packaging.requirements import Requirement

from .data.cache import cache_folder
from .errors import InputError
from .launching.place import is_first

if TYPE_CHECKING:
    from .launching.launch import World

GB = 10**9
ENOUGH_BYTES = 5 * GB  # of checkpoints and cache, before a run is likely to end for want of room
HUB_TIMEOUT_S = 5.0
OK, WARNING, FAULT = "ok", "warning", "FAULT"


class Finding(NamedTuple):
    state: str
    found: str
    remedy: str = ""


def packages() -> Finding:
    wrong = []
    for text in importlib.metadata.requires("conceptron") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, needed is {requirement.specifier}")
    versions = f"Python {platform.python_version()}, torch {importlib.metadata.version('torch')}"
    if wrong:
        return Finding(FAULT, "; ".join(wrong), "python -m pip install -e . in the checkout, or pip install conceptron")
    return Finding(OK, versions)


def gpu() -> Finding:
    import torch

    from .environment import first_line

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        old = [name for i, name in enumerate(names) if torch.cuda.get_device_capability(i) < (8, 0)]
        driver = first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        found = f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}, driver {driver or 'of unknown version'}"
        if old:
            return Finding(WARNING, found, f"{old[0]} has no bfloat16 matrix units; set train.precision=fp32")
        return Finding(OK, found)
    driver = shutil.which("nvidia-smi")
    if driver is None:
        return Finding(OK, "none; everything runs on the CPU")
    if torch.version.cuda is None:
        return Finding(FAULT, f"there is a driver ({driver}), but torch {torch.__version__} is a build for CPUs",
                       "pip install torch from the index of a CUDA build, https://pytorch.org/get-started")  # fmt: skip
    told = subprocess.run([driver, "-L"], capture_output=True, text=True, check=False, timeout=30)
    said = (told.stdout or told.stderr).strip().splitlines()
    found = f"torch is for CUDA {torch.version.cuda} and sees no GPU; nvidia-smi says {(said or ['nothing'])[0]}"
    return Finding(FAULT, found,
                   "look at CUDA_VISIBLE_DEVICES, the container's --gpus, and the driver's age")  # fmt: skip


def triton() -> Finding:
    import torch

    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        state = FAULT if torch.cuda.is_available() else WARNING
        return Finding(state, "not installed; operators run on torch", "install a build of torch that brings triton")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if torch.cuda.is_available() and (compiler is None or shutil.which(compiler) is None):
        return Finding(FAULT, f"{version}, and no C compiler to build launchers with", "install gcc, or set CC")
    return Finding(OK, version)


def together(runs: Path) -> tuple[Finding, Finding]:
    """Whether the processes that this one was started with answer, and whether all see the same folder of runs."""
    unknown = Finding(OK, "not looked for: the processes do not answer")
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return Finding(FAULT, "torch was built without torch.distributed", "install another build of torch"), unknown
    from . import compat
    from .launching import launch

    wanted = "nccl" if compat.uses_cuda() else "gloo"
    if wanted == "nccl" and not dist.is_nccl_available():
        remedy = "install a Linux CUDA build of torch, or set DS_ACCELERATOR=cpu"
        return Finding(FAULT, "torch has no NCCL", remedy), unknown
    try:
        with launch.world() as world:
            answered = int(world.sum(torch.ones((), device=world.device)))
            is_shared = shared(runs, world)
    except InputError as error:
        return Finding(FAULT, str(error), "start the doctor as the run will be started"), unknown
    return Finding(OK, f"{wanted}: {answered} of {world.size} processes answered"), is_shared


def shared(runs: Path, world: "World") -> Finding:
    """Whether every process finds what rank 0 has written. Collective."""
    runs = runs.expanduser().resolve()
    if world.size == 1:
        return Finding(OK, "one process: start the doctor as the run will be started, to look from all of them")
    there = world.first_then_share(lambda: next(place for place in (runs, *runs.parents) if place.exists()))
    with contextlib.ExitStack() as stack:
        def write() -> str:
            return stack.enter_context(tempfile.NamedTemporaryFile(dir=there, prefix=".conceptron-doctor-")).name

        try:
            name = world.first_then_share(write)
        except OSError as error:
            return Finding(FAULT, f"{there}: {error.strerror}", "choose a folder that can be written")
        sees = world.gather((world.rank, socket.gethostname(), os.path.exists(name)))
    blind = [f"rank {rank} on {host}" for rank, host, is_seen in sees if not is_seen]
    if blind:
        remedy = "put run.folder on a disk that all machines mount at the same place"
        return Finding(FAULT, f"{there}: what rank 0 writes there is not seen by {', '.join(blind)}", remedy)
    return Finding(OK, f"{there}: seen by all {world.size} processes")


def cores() -> Finding:
    import torch

    given, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    load = os.getloadavg()[0]
    found = f"{given} cores for this process, {threads} torch threads, load {load:.1f}"
    if threads > given:
        return Finding(WARNING, found, f"unset OMP_NUM_THREADS, or set it to {given}")
    if load > 1.5 * given:
        return Finding(WARNING, found, "other programs want the same cores; timings will mean little")
    return Finding(OK, found)


def folder(path: Path) -> Finding:
    """Whether runs can live there: written, synced, renamed, locked, and room."""
    path = path.expanduser().resolve()
    there = next(place for place in (path, *path.parents) if place.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".conceptron-doctor-") as scratch:
            file = Path(scratch) / "a"
            with file.open("wb") as written:
                written.write(b"x")
                os.fsync(written.fileno())
                fcntl.flock(written, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.rename(Path(scratch) / "b")
    except OSError as error:
        return Finding(FAULT, f"{there}: {error.strerror}", "choose a folder that can be written and locked")
    free = shutil.disk_usage(there).free
    found = f"{path}: {free / GB:,.0f} GB free"
    if free < ENOUGH_BYTES:
        return Finding(WARNING, found, "make room: a checkpoint takes 12 bytes a parameter; keep_last of them stay")
    return Finding(OK, found)


def hub() -> Finding:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Finding(OK, "offline by HF_HUB_OFFLINE; recipes need folders or what is in the cache")
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=HUB_TIMEOUT_S):
            pass
    except OSError as error:
        return Finding(
            WARNING, f"{constants.ENDPOINT} cannot be reached ({getattr(error, 'reason', error)})",
            "name folders instead of hub ids (data.source, data.tokenizer), or set HF_ENDPOINT or a proxy",
        )  # fmt: skip
    return Finding(OK, f"{constants.ENDPOINT} answers")


def recipe(path: str, overrides: list[str]) -> dict[str, Callable[[], Finding]]:
    """The checks of one recipe: itself, the folder of its runs, its tokenizer and its text."""
    from .data import tokenizer
    from .data.pydocs import NAMES
    from .recipe.load import load_recipe

    try:
        loaded = load_recipe(path, overrides)
    except InputError as error:
        told = str(error)
        return {"recipe": lambda: Finding(FAULT, told, "mend the recipe"), **of_all(Path("runs"))}

    def words() -> Finding:
        if loaded.data.tokenizer in NAMES:
            return Finding(OK, f"{loaded.data.tokenizer}: trained on the text when the run begins")
        try:
            found = tokenizer.load(loaded.data.tokenizer)
        except InputError as error:
            return Finding(FAULT, str(error), "see above")
        return Finding(OK, f"{loaded.data.tokenizer}: {len(found)} entries")

    return {
        "recipe": lambda: Finding(OK, f"{path}: {loaded.train.steps} steps of {loaded.batch.tokens} tokens"),
        "run folder": lambda: folder(loaded.path), "tokenizer": words, **of_all(loaded.path),
    }  # fmt: skip


def of_all(runs: Path) -> dict[str, Callable[[], Finding]]:
    """Two checks of one meeting: processes meet once."""
    meeting = functools.cache(lambda: together(runs))
    return {"communication": lambda: meeting()[0], "shared folder": lambda: meeting()[1]}


def checks(path: str | None = None, overrides: Sequence[str] = ()) -> dict[str, Callable[[], Finding]]:
    """name -> check, cheapest first."""
    runs = Path("runs")
    of_recipe = {"run folder": lambda: folder(runs), **of_all(runs)} if path is None else recipe(path, list(overrides))
    return {
        "packages": packages, "GPU": gpu, "Triton": triton, "cores": cores, **of_recipe,
        "data cache": lambda: folder(cache_folder(None)), "hub": hub,
    }  # fmt: skip


def main(options: argparse.Namespace) -> int:
    """The command line; exit code 1 where a fault was found."""
    worst, say = 0, print if is_first(os.environ) else str
    for name, check in checks(options.recipe, options.overrides).items():
        state, found, remedy = check()
        worst = max(worst, state == FAULT)
        say(f"{state:<8} {name:<14} {found}")
        if remedy:
            say(f"{'':<8} {'':<14} -> {remedy}")
    say("this machine cannot train as it is" if worst else "this machine can train")
    return int(worst)
