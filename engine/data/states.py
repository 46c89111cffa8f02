"""What a frozen backbone makes of every window, computed once and mapped into memory.

A folder of the cache, named after text, windows, tokenizer and backbone, holds 16-bit states [T, e] window by window.
It is written from front to back and says how far it has come, so that a process that was stopped is gone on with.

T tokens of all windows, e width of a state.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...models.backbone import Backbone
from ...models.packing import Packed, pack
from ..errors import InputError
from .cache import UNUSABLE, fingerprint, locked, say
from .windows import Windows

STATES, PROGRESS = "states.bin", "progress.json"
AT_ONCE = 65536  # tokens between two notes of the progress
GB = 1e9


class StateStore:
    """The states of windows, read by their numbers."""

    def __init__(self, file: Path, windows: Windows, width: int) -> None:
        self.offsets = np.concatenate([[0], np.cumsum(windows.lengths, dtype=np.int64)])
        shape = int(self.offsets[-1]), width
        self.states = np.memmap(file, dtype=np.float16, mode="r", shape=shape) if shape[0] else np.zeros(shape)

    def __getitem__(self, index: int) -> Tensor:
        """[N, e] float16 of one window."""
        return torch.from_numpy(np.array(self.states[self.offsets[index] : self.offsets[index + 1]]))

    def attach(self, batch: Packed, rows: np.ndarray) -> Packed:
        """The batch of these very windows, whole and in order, with their states."""
        return batch._replace(states=torch.cat([self[int(row)] for row in rows]))


def open_states(
    cache: Path, windows: Windows, backbone: Backbone, key: dict[str, Any], limit_gb: float, batch_tokens: int = 8192
) -> StateStore:
    """Opens the store of these windows; what of it is missing is computed first. One process writes, others wait.

    Args:
        backbone: frozen, on the device where it is to be computed.
        key: what else decides the states: ids of text and tokenizer, and the backbone's description.
        limit_gb: of 1e9 bytes, that the file may take.

    Raises:
        InputError: it would be larger than the limit (before anything is written), or the disk is full.
    """
    width, total = backbone.mean.shape[0], windows.num_tokens
    size = 2 * total * width
    if size > limit_gb * GB:
        raise InputError(
            f"data.states_gb: {total} tokens of {width} 16-bit numbers take {size / GB:.2f} GB, the limit is "
            f"{limit_gb:g}; raise it, or leave it out to compute states in every step"
        )
    cuts = [backbone.capacity, backbone.overlap, len(backbone.prefix), len(backbone.suffix)]
    name = fingerprint([key, cuts, int(total), fingerprint(windows.lengths.tolist())])
    folder = cache / f"states-{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock"):
            write(folder, windows, backbone, size, batch_tokens)
    except OSError as error:
        if error.errno not in UNUSABLE:
            raise
        raise InputError(
            f"{error.filename or folder}: cannot write stored states ({error.strerror}); make room, set data.cache to "
            "another folder, or leave data.states_gb out"
        ) from error
    return StateStore(folder / STATES, windows, width)


def write(folder: Path, windows: Windows, backbone: Backbone, size: int, batch_tokens: int) -> None:
    """Goes on from the last window that is noted as written."""
    done, num_bytes = read_progress(folder)
    if done == len(windows):
        return
    part = f", {done} of {len(windows)} windows are there" if done else ""
    say(f"computing the states of {windows.num_tokens} tokens: {size / GB:.2f} GB in {folder}{part}")
    device = backbone.mean.device
    with (folder / STATES).open("r+b" if done else "wb") as file:
        file.truncate(num_bytes)
        file.seek(num_bytes)
        since = 0
        while done < len(windows):
            until, tokens = done + 1, int(windows.lengths[done])
            while until < len(windows) and tokens + windows.lengths[until] <= batch_tokens:
                tokens += int(windows.lengths[until])
                until += 1
            with torch.no_grad():
                states = backbone(pack([windows[row] for row in range(done, until)]).to(device))
            if not states.isfinite().all() or states.abs().max() > torch.finfo(torch.float16).max:
                raise InputError("data.states_gb: a state of the backbone does not fit into 16 bits; leave it out")
            file.write(states.to(torch.float16).cpu().numpy().tobytes())
            done, since = until, since + tokens
            if since >= AT_ONCE or done == len(windows):
                file.flush()
                os.fsync(file.fileno())
                note_progress(folder, done, file.tell())
                since = 0


def read_progress(folder: Path) -> tuple[int, int]:
    """Windows and bytes that are surely there."""
    note, file = folder / PROGRESS, folder / STATES
    if not note.exists() or not file.exists():
        return 0, 0
    try:
        entry = json.loads(note.read_text())
        windows, num_bytes = int(entry["windows"]), int(entry["bytes"])
    except (ValueError, KeyError, TypeError, RecursionError):  # damaged: they are computed again
        return 0, 0
    return (windows, num_bytes) if file.stat().st_size >= num_bytes else (0, 0)


def note_progress(folder: Path, windows: int, num_bytes: int) -> None:
    unfinished = folder / f".{PROGRESS}"
    unfinished.write_text(json.dumps({"windows": windows, "bytes": num_bytes}, allow_nan=False))
    unfinished.replace(folder / PROGRESS)
