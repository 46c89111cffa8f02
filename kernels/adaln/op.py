"""The door of adaptive layer norm: contract, checks, choice of backend."""

from typing import Literal

import torch
from torch import Tensor

from ..backend import choose
from ..checks import check_boundaries, check_float, check_like, check_size, check_tensor
from ..tracing import distinct
from .eager import torch_modulate, torch_residual_modulate

MAX_WIDTH = 8192  # of the Triton backend: a row must fit a program's registers


def adaln_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: Literal["auto", "triton", "torch"] = "auto",
) -> Tensor:
    """Layer norm without weights, modulated by one shift and one scale vector per sequence (DiT, Peebles and Xie 2023).

        y_t = (x_t - mean(x_t)) / sqrt(var(x_t) + eps) * (1 + scale_b) + shift_b        b: the sequence of row t

    Args:
        x: [T,d] rows of B packed sequences, with ``cu_seqlens``; or [B,N,d] without. Any strides.
        shift, scale: [B,d]. Any strides: the views of ``modulation.chunk(6, -1)`` are read where they are.
        cu_seqlens: [B+1] int32 boundaries of the packed sequences, on x's device. Empty sequences are legal.
        eps: added to the variance.
        backend: "auto" (Triton on CUDA, torch elsewhere), "triton" or "torch".

    Returns:
        y, shaped like x. Its dtype is x's, or autocast's while autocast is on. Moments and modulation are float32
        inside (float64 for float64).

    Dtypes: float32, float16, bfloat16 (float64 with the torch backend), the same for all inputs; while autocast is on
    they may differ, as a float32 residual stream and half-precision modulations do.

    Memory: Triton saves x and two float32 a row for the backward pass; shift and scale gradients are summed over fixed
    blocks of rows in a fixed order, so they are bitwise reproducible.

    Raises:
        TypeError, ValueError: a wrong type, rank, dtype, device or size; ``cu_seqlens`` that is not int32, does not
        start at 0, decreases or does not end at T (values are read on a GPU only with CONCEPTRON_CHECK=1).
    """
    check_inputs(x, {"shift": shift, "scale": scale}, cu_seqlens, eps)
    out_dtype = output_dtype(x)
    if choose(backend, x) == "triton":
        check_triton(x)
        from .library import Modulate

        return Modulate.apply(*distinct(x, shift, scale, cu_seqlens), float(eps), out_dtype)
    shift, scale = (modulation.to(x.dtype) for modulation in (shift, scale))
    with torch.autocast(x.device.type, enabled=False):
        return torch_modulate(x, shift, scale, cu_seqlens, eps).to(out_dtype)


def adaln_residual_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: Literal["auto", "triton", "torch"] = "auto",
) -> tuple[Tensor, Tensor]:
    """The gated residual and the modulated layer norm that follows it, in one pass (AdaLN-Zero; Peebles and Xie 2023).

        h_t = x_t + gate_b * branch_t
        y_t = (h_t - mean(h_t)) / sqrt(var(h_t) + eps) * (1 + scale_b) + shift_b        b: the sequence of row t

    Args:
        x: [T,d] rows of B packed sequences, with ``cu_seqlens``; or [B,N,d] without. Any strides.
        branch: shaped like x, the output of the block whose result is added.
        gate, shift, scale: [B,d], any strides.
        cu_seqlens, eps, backend: as in :func:`adaln_modulate`.

    Returns:
        (h, y), both shaped like x. h keeps x's dtype, y has x's dtype or autocast's while autocast is on. The moments
        are those of h as stored, so that y agrees with what later layers read.

    Dtypes and errors are those of :func:`adaln_modulate`. Memory: Triton saves h, branch and two float32 a row.
    """
    check_inputs(x, {"gate": gate, "shift": shift, "scale": scale}, cu_seqlens, eps, branch)
    out_dtype = output_dtype(x)
    if choose(backend, x) == "triton":
        check_triton(x)
        from .library import ResidualModulate

        tensors = distinct(x, branch, gate, shift, scale, cu_seqlens)
        return ResidualModulate.apply(*tensors, float(eps), out_dtype)
    branch, gate, shift, scale = (other.to(x.dtype) for other in (branch, gate, shift, scale))
    with torch.autocast(x.device.type, enabled=False):
        h, y = torch_residual_modulate(x, branch, gate, shift, scale, cu_seqlens, eps)
        return h, y.to(out_dtype)


def check_inputs(
    x: Tensor, modulations: dict[str, Tensor], cu_seqlens: Tensor | None, eps: float, branch: Tensor | None = None
) -> None:
    layout = "[B,N,d] (or [T,d] with cu_seqlens)" if cu_seqlens is None else "[T,d] (or [B,N,d] without cu_seqlens)"
    check_tensor("x", x, layout, 3 if cu_seqlens is None else 2)
    check_float("x", x)
    width = x.shape[-1]
    if width < 1:
        raise ValueError(f"x: expected a width d of at least 1, got shape {list(x.shape)}")
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, x.shape[0], x.device)
    num_sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    source = "from x" if cu_seqlens is None else "from cu_seqlens"
    if branch is not None:
        check_tensor("branch", branch, layout, x.ndim)
        check_same_kind("branch", branch, x)
        if branch.shape != x.shape:
            raise ValueError(f"branch: expected x's shape {list(x.shape)}, got {list(branch.shape)}")
    for name, value in modulations.items():
        check_tensor(name, value, "[B,d]", 2)
        check_same_kind(name, value, x)
        check_size(name, "B", value.shape[0], num_sequences, source)
        check_size(name, "d", value.shape[1], width, "x's width")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a Python number, got {type(eps).__name__}")
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"eps: expected a finite number >= 0, got {eps}")


def check_same_kind(name: str, value: Tensor, x: Tensor) -> None:
    """x's dtype and device; while autocast is on, any floating dtype."""
    if torch.is_autocast_enabled(x.device.type):
        check_float(name, value)
        if value.device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}, got {value.device}")
    else:
        check_like(name, value, "x", x)


def check_triton(x: Tensor) -> None:
    """What the kernels ask beyond the contract."""
    if x.dtype == torch.float64:
        raise TypeError("x: expected float32, float16 or bfloat16 with the triton backend, got torch.float64")
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"x: expected a width d of at most {MAX_WIDTH} with the triton backend, got {x.shape[-1]}")


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype of y."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
