"""Checkpoints: atomic, checksummed, readable at any world size and ZeRO stage, and free of pickle.

    RUN/checkpoints/step-00000100/
        MANIFEST.json                        written last: format, step, size and sha256 of every other file
        trainer.json                         step, tokens, what the run was started with
        state-00000-of-00002.safetensors     what rank 0 of 2 holds: ranges of the float32 weights, of both moments (or
                                             Muon's momentum), and of averaged weights (`ema.py`)

A tensor `encoder.w@4096:exp_avg` is the first moment of the flattened parameter `encoder.w` from element 4096 on. Every
rank writes what it holds, without communication; a reader picks the ranges it needs from all files. There is nothing
else to save: data order, masking and dropout are pure functions of (seed, step). Resuming in the same topology is
bitwise; in another one, float32 sums over ranks round differently.

All ranks read and write the same folder: on several machines it must lie on a shared disk.

DeepSpeed's own checkpoints are not used: `latest` is written before the other ranks have finished, a flipped bit
loads silently, loading unpickles, and a change of stage is refused.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import compat
from ..errors import InputError
from ..launching.launch import World
from ..optimizing.ema import KEY as AVERAGE
from .retention import MANIFEST, step_of

FORMAT = 2
TRAINER = "trainer.json"
WEIGHT, MOMENTS, MOMENTUM = "weight", ("exp_avg", "exp_avg_sq"), "momentum_buffer"  # the last is Muon's
UNFINISHED = ".unfinished-"


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0  # updates done, skipped ones included
    optimizer_steps: int = 0  # updates that changed the weights: AdamW's own count
    tokens: int = 0
    elapsed_s: float = 0.0
    identity: dict[str, Any] = field(default_factory=dict)  # what must not differ when the run is resumed
    spikes: dict[str, Any] = field(default_factory=dict)  # what `Spikes` has seen
    best: dict[str, Any] = field(default_factory=dict)  # metric, value and step of the best evaluation


def list_checkpoints(parent: Path) -> list[Path]:
    """Every `step-*` folder, newest first, whether valid or not."""
    return sorted((path for path in parent.glob("step-*") if path.is_dir()), reverse=True)


def find(world: World, parent: Path, before: float = math.inf) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is complete and unchanged, with a line for each newer one that is not. Collective.

    ``before``: only those of earlier steps are looked at.

    Raises:
        InputError: there are checkpoints, but none that can be trusted.
    """

    def search() -> tuple[Path | None, list[str]]:
        warnings: list[str] = []
        for candidate in list_checkpoints(parent):
            if step_of(candidate) >= before:
                continue
            fault = verify(candidate)
            if not fault:
                return candidate, warnings
            warnings.append(f"{candidate} is not used: {fault}")
        if warnings:
            raise InputError(
                f"{parent}: no valid checkpoint left ({warnings[0]}); restore one, or start again with another run.name"
            )
        return None, warnings

    return world.first_then_share(search)


def verify(folder: Path) -> str:
    """What is wrong with a checkpoint (a file missing, cut short, altered, ...); "" if nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        return f"{MANIFEST} is damaged"
    if manifest.get("format") != FORMAT:
        return f"its format is {manifest.get('format')!r}, this version reads {FORMAT}"
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if sha256(file) != digest:
            return f"{name} does not match its checksum"
    return ""


def load_progress(folder: Path) -> Progress:
    return Progress(**json.loads((folder / TRAINER).read_text()))


def load_weights(folder: Path, model: nn.Module, kind: str = WEIGHT) -> None:
    """Fills a plain model, before ZeRO divides it, with the float32 weights of a verified checkpoint.

    ``kind``: `ema.KEY` for the averages of those that have one.

    Raises:
        InputError: a parameter is missing, incomplete or of another size: the model is not the one that was saved.
    """
    state = State(folder)
    with torch.no_grad():
        for name, tensor in _own_tensors(model):
            flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
            state.read(name, kind if (name, kind) in state.ranges else WEIGHT, 0, flat)
            tensor.copy_(flat.view(tensor.shape))
    unread = state.names() - {name for name, _ in _own_tensors(model)}
    if unread:
        raise InputError(f"{folder}: holds {sorted(unread)[0]}, which the model of this recipe lacks")


def load_moments(folder: Path, engine: Any, optimizer_steps: int) -> None:
    """Gives the optimizer the moments and the step count of a verified checkpoint, each rank its own part, and the
    averaged weights if there are any."""
    if optimizer_steps == 0:
        return
    state, optimizer = State(folder), engine.optimizer.optimizer
    momenta = compat.momenta(engine)
    for name, start, momentum in momenta:
        state.read(name, MOMENTUM, start, momentum)
    by_muon = {name for name, *_ in momenta}
    for fragment in compat.fragments(engine):
        flat, is_adam = fragment.flat, fragment.name not in by_muon
        keys = [key for key in (*MOMENTS, AVERAGE) if (fragment.name, key) in state.ranges]
        of_flat = optimizer.state[flat]
        if is_adam and "step" not in of_flat:
            of_flat |= {"step": _adam_step(optimizer, flat, optimizer_steps)}
        for key in (*MOMENTS, *keys) if is_adam else keys:
            if key not in of_flat:
                of_flat[key] = torch.zeros_like(flat, requires_grad=False)
            state.read(fragment.name, key, fragment.start, fragment.of(of_flat[key]))


def has(folder: Path, kind: str) -> bool:
    """Whether a checkpoint holds any of this kind, such as `ema.KEY`."""
    return any(found == kind for _, found in State(folder).ranges)


class State:
    """All state files of a checkpoint as one map: (parameter, kind) -> its ranges."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = [safe_open(path, framework="pt") for path in sorted(folder.glob("state-*.safetensors"))]
        self.ranges: dict[tuple[str, str], list[tuple[int, str, Any]]] = {}
        for file in self.files:
            for key in file.keys():  # noqa: SIM118, it is no dict
                name, start, kind = _split(key)
                self.ranges.setdefault((name, kind), []).append((start, key, file))

    def names(self) -> set[str]:
        return {name for name, kind in self.ranges if kind == WEIGHT}

    def size(self, name: str, kind: str) -> int:
        return sum(file.get_slice(key).get_shape()[0] for _, key, file in self.ranges.get((name, kind), []))

    def read(self, name: str, kind: str, start: int, into: Tensor) -> None:
        """Copies elements `start ..` of a flattened parameter into the one-dimensional `into`."""
        end, filled = start + into.numel(), 0
        for begin, key, file in self.ranges.get((name, kind), []):
            part = file.get_slice(key)
            low, high = max(start, begin), min(end, begin + part.get_shape()[0])
            if low < high:
                into[low - start : high - start].copy_(part[low - begin : high - begin])
                filled += high - low
        if filled != into.numel():
            raise InputError(f"{self.folder}: {name} has {filled} of the {into.numel()} elements this model needs")


def begin(parent: Path, step: int) -> Path:
    """An empty folder for the files of a checkpoint; what an interrupted save has left is removed."""
    parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(parent)
    unfinished = parent / f"{UNFINISHED}step-{step:08d}"
    unfinished.mkdir()
    return unfinished


def remove_unfinished(parent: Path) -> None:
    for stale in parent.glob(f"{UNFINISHED}*"):
        shutil.rmtree(stale)


def capture(engine: Any, into: dict[str, Tensor], is_first: bool) -> None:
    """Copies what this rank holds into ``into``, whose memory of an earlier call is used again. Collective on stage 3.

    Names are those of the file. What is there afterwards is of this very step, whatever training does next.
    """
    optimizer = engine.optimizer.optimizer
    momenta = {name: (start, momentum) for name, start, momentum in compat.momenta(engine)}
    for fragment in compat.fragments(engine):
        of_flat = optimizer.state[fragment.flat]
        kinds = {WEIGHT: fragment.flat, **{key: of_flat.get(key) for key in (*MOMENTS, AVERAGE)}}
        parts = {kind: fragment.of(flat) for kind, flat in kinds.items() if flat is not None}  # moments: after a step
        if fragment.name in momenta:
            start, momentum = momenta[fragment.name]
            parts[MOMENTUM] = momentum.narrow(0, fragment.start - start, fragment.numel)
        for kind, part in parts.items():
            copy_to_host(into, f"{fragment.name}@{fragment.start}:{kind}", part.detach())
    for name, tensor in _own_tensors(engine.module):
        if not tensor.requires_grad:  # what no optimizer moves: frozen parameters and buffers
            value = compat.whole(tensor) if hasattr(tensor, "ds_id") else tensor.detach()
            if is_first:
                copy_to_host(into, f"{name}@0:{WEIGHT}", value.flatten())
    if compat.uses_cuda():
        torch.cuda.synchronize()  # the copies run beside this thread


def copy_to_host(into: dict[str, Tensor], key: str, tensor: Tensor) -> None:
    """Into memory of its own: fragments of one flat tensor share theirs, which safetensors refuses."""
    if key not in into:
        into[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    into[key].copy_(tensor, non_blocking=True)


def write_state(tensors: dict[str, Tensor], file: Path) -> tuple[str, dict[str, Any]]:
    """Writes and syncs one rank's file; returns its line of the manifest. No collective, so a thread may call it."""
    save_file(tensors, file)
    _sync(file)
    return file.name, {"size": file.stat().st_size, "sha256": sha256(file)}


def publish(unfinished: Path, progress: Progress, files: dict[str, Any], world_size: int) -> Path:
    """Gives a folder in which every rank has written its file the record, the manifest and its name."""
    final = unfinished.with_name(unfinished.name.removeprefix(UNFINISHED))
    trainer = unfinished / TRAINER
    _write_json(trainer, vars(progress))
    for name in files:
        shutil.copymode(trainer, unfinished / name)  # safetensors lets only the owner read
    files = {**files, TRAINER: {"size": trainer.stat().st_size, "sha256": sha256(trainer)}}
    _write_json(
        unfinished / MANIFEST, {"format": FORMAT, "step": progress.step, "world_size": world_size, "files": files}
    )
    _sync(unfinished)
    if final.exists():  # left by an earlier attempt that could not be verified
        shutil.rmtree(final)
    unfinished.rename(final)
    _sync(final.parent)
    return final


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers, each tied weight once."""
    seen: set[int] = set()
    skipped = {name for name, _ in module.named_buffers()} - set(module.state_dict(keep_vars=True))
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if id(tensor) not in seen and name not in skipped:
            seen.add(id(tensor))
            yield name, tensor


def _adam_step(optimizer: torch.optim.Optimizer, flat: Tensor, steps: int) -> Tensor:
    is_fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    device = flat.device if is_fused else "cpu"
    return torch.tensor(float(steps), dtype=torch.float32, device=device)


def _split(key: str) -> tuple[str, int, str]:
    name, _, rest = key.rpartition("@")
    start, _, kind = rest.partition(":")
    return name, int(start), kind


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False))
    _sync(path)


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
