"""What a frozen backbone makes of windows of text, computed once and mapped into memory.

    CACHE/states-FINGERPRINT/states.bin   [T, e] float16: the states of all windows end to end; sparse
                            /done.bin     [n] uint8: 1 where those of a window are written

The fingerprint is that of the text, its tokenizer and the backbone, so a store is never out of date. Only windows that
a run will read are computed, and each of them once: those of another run, or of one that was stopped, are there.

T tokens of all windows, n windows, e width of a state.
"""

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

FORMAT = 2
STATES, DONE = "states.bin", "done.bin"
AT_ONCE = 65536  # tokens between two marks of what is done
GB = 1e9


class StateStore:
    """The states of windows, read by their numbers."""

    def __init__(self, folder: Path, windows: Windows, width: int) -> None:
        self.folder, self.windows, self.width = folder, windows, width
        self.offsets = np.concatenate([[0], np.cumsum(windows.lengths, dtype=np.int64)])
        self.states: np.ndarray | None = None  # mapped at the first read

    def open(self, mode: str = "r") -> tuple[np.ndarray, np.ndarray]:
        shape = max(1, int(self.offsets[-1])), self.width  # an empty file cannot be mapped
        states = np.memmap(self.folder / STATES, np.float16, mode, shape=shape)
        return states, np.memmap(self.folder / DONE, np.uint8, mode, shape=(len(self.windows),))

    def missing(self, rows: np.ndarray) -> np.ndarray:
        rows = np.unique(rows)
        if not (self.folder / DONE).is_file():
            return rows
        _, done = self.open()
        return rows[done[rows] == 0]

    def __getitem__(self, index: int) -> Tensor:
        """[N, e] float16 of one window.

        Raises:
            RuntimeError: it was never computed.
        """
        if self.states is None:
            self.states, self.done = self.open()
        if not self.done[index]:
            raise RuntimeError(f"{self.folder}: holds no states of window {index}")
        return torch.from_numpy(np.array(self.states[self.offsets[index] : self.offsets[index + 1]]))

    def attach(self, batch: Packed, rows: np.ndarray) -> Packed:
        """The batch of these very windows, whole and in order, with their states."""
        return batch._replace(states=torch.cat([self[int(row)] for row in rows]))


def open_states(
    cache: Path, windows: Windows, rows: np.ndarray, backbone: Backbone | None, width: int, key: Any, limit_gb: float,
    batch_tokens: int = 8192, field: str = "data.states_gb",
) -> StateStore:  # fmt: skip
    """The store of these windows, in which all of ``rows`` are there: what is missing is computed first. One process
    writes, others wait.

    Args:
        backbone: frozen, on the device where it is to be computed; None: nothing can be computed.
        key: JSON, what else decides the states: the tokenizer's id and the backbone's description.
        limit_gb: of 1e9 bytes, that the states of ``rows`` may take.
        field: of the recipe that gives the limit, for errors.

    Raises:
        InputError: they would take more (before anything is written), the disk is full, a state does not fit into 16
            bits, or some are missing and there is no backbone.
    """
    num_tokens = int(windows.lengths[np.unique(rows)].sum(dtype=np.int64))
    size = 2 * num_tokens * width
    if size > limit_gb * GB:
        raise InputError(
            f"{field}: {num_tokens:,} tokens of {width} 16-bit numbers take {size / GB:.2f} GB, the limit is "
            f"{limit_gb:g}; raise it, or leave it out to compute states in every step"
        )
    folder = cache / f"states-{fingerprint([FORMAT, windows.fingerprint, key])}"
    store = StateStore(folder, windows, width)
    missing = store.missing(rows)
    if not len(missing):
        return store
    if backbone is None:
        raise InputError(
            f"{field}: {folder}: the states of {len(missing)} windows are not there, and a run that goes on "
            f"does not compute them; leave {field} out, or set {cache_field(field)} to where they are"
        )
    left = int(windows.lengths[missing].sum(dtype=np.int64))
    say(f"states of {left:,} tokens: {2 * left * width / GB:.2f} GB into {folder}, once")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock"):
            write(store, store.missing(rows), backbone, batch_tokens, field)
    except OSError as error:
        if error.errno not in UNUSABLE:
            raise
        raise InputError(
            f"{error.filename or folder}: cannot write stored states ({error.strerror}); make room, set "
            f"{cache_field(field)} to another folder, or leave {field} out"
        ) from error
    return store


def cache_field(field: str) -> str:
    """That says where the store lies, beside the one that says how large it may be."""
    return f"{field.partition('.')[0]}.cache"


def write(store: StateStore, missing: np.ndarray, backbone: Backbone, batch_tokens: int, field: str) -> None:
    states, done = store.open("r+" if (store.folder / DONE).is_file() else "w+")
    device, windows, begin, unmarked = backbone.mean.device, store.windows, 0, []
    while begin < len(missing):
        ends = np.cumsum(windows.lengths[missing[begin:]], dtype=np.int64)
        rows = missing[begin : begin + max(1, int(np.searchsorted(ends, batch_tokens, side="right")))]
        with torch.no_grad():
            made = backbone(pack([windows[int(row)] for row in rows]).to(device))
        if not made.isfinite().all() or (made.numel() and made.abs().max() > torch.finfo(torch.float16).max):
            raise InputError(f"{field}: a state of the backbone does not fit into 16 bits; leave it out")
        parts = made.to(torch.float16).cpu().split(windows.lengths[rows].tolist())
        for row, part in zip(rows, parts, strict=True):
            states[store.offsets[row] : store.offsets[row + 1]] = part.numpy()
        begin, unmarked = begin + len(rows), [*unmarked, *rows]
        if windows.lengths[unmarked].sum() >= AT_ONCE or begin == len(missing):
            states.flush()
            done[unmarked] = 1  # only now: a run that is stopped before computes these again
            done.flush()
            unmarked = []
