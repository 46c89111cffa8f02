"""Input checks shared by the doors: raised before any launch, naming the argument, what was expected, what came."""

import math
import os
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def thorough() -> bool:
    """True when checks that read values back from a GPU (a host synchronisation) are wanted: CONCEPTRON_CHECK=1."""
    given = os.environ.get("CONCEPTRON_CHECK", "0")
    if given not in ("0", "1"):
        raise ValueError(f"CONCEPTRON_CHECK: expected 0 or 1, got {given!r}")
    return given == "1"


def readable(tensor: Tensor) -> bool:
    """True when looking at ``tensor``'s values costs no synchronisation, or was asked for, and the values exist."""
    if torch.compiler.is_compiling() or type(tensor).__name__ == "FakeTensor" or tensor.is_meta:
        return False
    return not tensor.is_cuda or thorough()


def check_tensor(name: str, value: object, shape: str, ndim: int | Sequence[int]) -> Tensor:
    """``value`` is a tensor of ``ndim`` dimensions (one of them when a sequence); ``shape`` is only for the message."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    allowed = (ndim,) if isinstance(ndim, int) else tuple(ndim)
    if value.ndim not in allowed:
        raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")
    return value


def check_float(name: str, value: Tensor) -> None:
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {value.dtype}")


def check_like(name: str, value: Tensor, first: str, other: Tensor) -> None:
    """``value`` has the dtype and device of ``other``, whose argument is called ``first``."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: expected {first}'s dtype {other.dtype}, got {value.dtype}")
    if value.device != other.device:
        raise ValueError(f"{name}: expected {first}'s device {other.device}, got {value.device}")


def check_size(name: str, axis: str, got: int, expected: int, why: str) -> None:
    if got != expected:
        raise ValueError(f"{name}: expected {axis} = {expected} ({why}), got {got}")


def check_scale(scale: object, head_dim: int) -> float:
    """A positive, finite scale of attention scores; 1/sqrt(head_dim) for None."""
    if scale is None:
        return 1 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a float or None, got {type(scale).__name__}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: expected a positive, finite number, got {scale}")
    return float(scale)


def check_boundaries(cu_seqlens: object, num_tokens: int, device: torch.device) -> list[int] | None:
    """cu_seqlens [B+1] int32 on ``device``, starting at 0, never decreasing, ending at ``num_tokens``.

    Values are checked on the CPU always, on a GPU only with CONCEPTRON_CHECK=1 (it costs a synchronisation). Returns
    the sequence lengths where the values were read, else None.
    """
    tensor = check_tensor("cu_seqlens", cu_seqlens, "[B+1]", 1)
    if tensor.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: expected int32, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"cu_seqlens: expected device {device}, got {tensor.device}")
    if tensor.shape[0] < 1:
        raise ValueError("cu_seqlens: expected shape [B+1] with at least one entry, got [0]")
    if not readable(tensor):
        return None
    values = tensor.tolist()
    if values[0] != 0:
        raise ValueError(f"cu_seqlens: expected to start at 0, got {values[0]}")
    lengths = [end - start for start, end in pairwise(values)]
    if lengths and min(lengths) < 0:
        at = next(i for i, n in enumerate(lengths) if n < 0)
        step = f"{values[at]} then {values[at + 1]} at entry {at + 1}"
        raise ValueError(f"cu_seqlens: expected never to decrease, got {step}")
    if values[-1] != num_tokens:
        raise ValueError(f"cu_seqlens: expected to end at T = {num_tokens}, got {values[-1]}")
    return lengths


def check_cu_seqlens(cu_seqlens: object, max_seqlen: object, num_tokens: int, device: torch.device) -> None:
    """``check_boundaries``, and max_seqlen an int that is at least the longest sequence."""
    check_tensor("cu_seqlens", cu_seqlens, "[B+1]", 1)
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)):
        raise TypeError(f"max_seqlen: expected a Python int (no device read), got {type(max_seqlen).__name__}")
    lengths = check_boundaries(cu_seqlens, num_tokens, device)
    if lengths and max(lengths) > max_seqlen:
        raise ValueError(f"max_seqlen: expected at least the longest sequence, {max(lengths)}, got {max_seqlen}")
