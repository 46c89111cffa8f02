"""Adaptive layer norm in Triton, one pass each way.

Forward, per row t of sequence b:
    h = x + gate * branch               (residual variant; rounded to x's dtype, then used as stored)
    xhat = (h - mean) * rstd            moments over d, two passes over registers
    y = xhat * (1 + scale) + shift
Backward, from dy and the gradient dh that arrives at h:
    g = dy * (1 + scale)
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dh
    dbranch = gate * dx
    dshift = sum_t dy     dscale = sum_t dy * xhat     dgate = sum_t dx * branch

A program owns a slot (slots.py): a few consecutive rows of one sequence, so shift, scale and gate are loaded once and
their gradients add up in registers.

Deterministic: each program writes its sums to its own slot, and a second kernel adds the slots of a sequence in order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import Build
from .slots import num_slots, row_strides, sizes, slot_rows
from .wide import _wide_backward_kernel

BLOCK_B = 256  # sequence starts compared at once by the slot search
STAGE_BYTES = 64 * 1024  # tiles in flight, small enough for every architecture's shared memory
REDUCE_SLOTS, REDUCE_D = 64, 32
OPTIONS = {"enable_fp_fusion": True}  # triton 3.9 warns about its changing default


class Config(NamedTuple):
    """Rows of a tile, such that a thread holds 16 elements of it, and warps. Chosen by compiling, not yet on a GPU."""

    forward_tile: int
    forward_warps: int
    backward_tile: int
    backward_warps: int


CONFIGS = {  # by the power of two that holds d
    128: Config(16, 4, 16, 4),
    256: Config(8, 4, 8, 4),
    512: Config(4, 4, 4, 4),
    1024: Config(2, 4, 2, 4),
    2048: Config(2, 8, 2, 8),
    4096: Config(1, 8, 1, 8),
    8192: Config(1, 16, 1, 8),
}
WIDE = 8192  # whose backward pass takes a row in two halves


def width_block(width: int) -> int:
    """The power of two that holds a row: a key of CONFIGS."""
    return max(min(CONFIGS), triton.next_power_of_2(width))


def num_stages(tile_bytes: int, num_tensors: int) -> int:
    """One tile of each tensor being used, and as many in flight, two at most, as STAGE_BYTES hold."""
    return 1 + min(2, STAGE_BYTES // (num_tensors * tile_bytes))


def backward_stages(block: int, itemsize: int, residual: bool) -> int:
    return 1 if block == WIDE else num_stages(CONFIGS[block].backward_tile * block * itemsize, 4 if residual else 2)


def forward_rows(num_rows: int, tile: int) -> int:
    """Rows a program owns: about 2048 programs (a few waves of a large GPU) up to four tiles each."""
    return tile * min(max(triton.cdiv(num_rows, 2048 * tile), 1), 4)


def backward_rows(num_rows: int, tile: int) -> int:
    """Rows a program owns: about 512 programs, but 8 to 64 rows each, so that partial sums stay few."""
    return triton.cdiv(min(max(triton.cdiv(num_rows, 512), 8), 64), tile) * tile


@triton.jit(do_not_specialize=["B", "N", "rows"])
def _forward_kernel(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, cu_seqlens_ptr, h_ptr, y_ptr, mean_ptr, rstd_ptr,
    B, N, D, rows, eps,
    x_stride_b, x_stride_t, x_stride_d, branch_stride_b, branch_stride_t, branch_stride_d,
    gate_stride_b, gate_stride_d, shift_stride_b, shift_stride_d, scale_stride_b, scale_stride_d,
    RESIDUAL: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    sequence, first, end = slot_rows(cu_seqlens_ptr, tl.program_id(0), rows, B, N, PACKED, BLOCK_B)
    sequence = sequence.to(tl.int64)
    d = tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D]; d * stride passes 2^31 in a transposed x
    in_d = d < D
    shift = tl.load(shift_ptr + sequence * shift_stride_b + d * shift_stride_d, mask=in_d, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + sequence * scale_stride_b + d * scale_stride_d, mask=in_d, other=0.0).to(tl.float32)
    if RESIDUAL:
        gate = tl.load(gate_ptr + sequence * gate_stride_b + d * gate_stride_d, mask=in_d, other=0.0).to(tl.float32)
    out_row = 0 if PACKED else sequence * N  # outputs are contiguous
    # exact division costs little a row; the plain one is off by two units, which a constant row would multiply by rstd
    width, one = tl.full([BLOCK_T], D, tl.float32), tl.full([BLOCK_T], 1.0, tl.float32)
    for start in tl.range(first, end, BLOCK_T, num_stages=STAGES):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)  # [BLOCK_T]
        in_t = t < end
        mask = in_t[:, None] & in_d[None, :]
        x_cell = sequence * x_stride_b + t[:, None] * x_stride_t + d[None, :] * x_stride_d
        out_cell = (out_row + t)[:, None] * D + d[None, :]
        h = tl.load(x_ptr + x_cell, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
        if RESIDUAL:
            branch_cell = sequence * branch_stride_b + t[:, None] * branch_stride_t + d[None, :] * branch_stride_d
            branch = tl.load(branch_ptr + branch_cell, mask=mask, other=0.0).to(tl.float32)
            stored = (h + gate[None, :] * branch).to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + out_cell, stored, mask=mask)
            h = stored.to(tl.float32)
        mean = tl.div_rn(tl.sum(h, 1), width)  # [BLOCK_T]
        centred = tl.where(in_d[None, :], h - mean[:, None], 0.0)
        variance = tl.div_rn(tl.sum(centred * centred, 1), width)
        rstd = tl.div_rn(one, tl.sqrt_rn(variance + eps))
        y = centred * rstd[:, None] * (1.0 + scale[None, :]) + shift[None, :]
        tl.store(y_ptr + out_cell, y.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(mean_ptr + out_row + t, mean, mask=in_t)
        tl.store(rstd_ptr + out_row + t, rstd, mask=in_t)


@triton.jit(do_not_specialize=["B", "N", "rows"])
def _backward_kernel(
    dy_ptr, dh_ptr, h_ptr, branch_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr, cu_seqlens_ptr,
    dx_ptr, dbranch_ptr, partial_ptr,
    B, N, D, rows,
    dy_stride_b, dy_stride_t, dy_stride_d, dh_stride_b, dh_stride_t, dh_stride_d, h_stride_b, h_stride_t, h_stride_d,
    branch_stride_b, branch_stride_t, branch_stride_d, gate_stride_b, gate_stride_d, scale_stride_b, scale_stride_d,
    RESIDUAL: tl.constexpr, HAS_DH: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    sequence, first, end = slot_rows(cu_seqlens_ptr, slot, rows, B, N, PACKED, BLOCK_B)
    sequence = sequence.to(tl.int64)
    d = tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D]; d * stride passes 2^31 in a transposed x
    in_d = d < D
    scale = tl.load(scale_ptr + sequence * scale_stride_b + d * scale_stride_d, mask=in_d, other=0.0).to(tl.float32)
    if RESIDUAL:
        gate = tl.load(gate_ptr + sequence * gate_stride_b + d * gate_stride_d, mask=in_d, other=0.0).to(tl.float32)
        dgate = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    # one sum a tile row, so that warps that own different rows meet only once, after the loop
    dshift = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    dscale = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    out_row = 0 if PACKED else sequence * N
    for start in tl.range(first, end, BLOCK_T, num_stages=STAGES):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)  # [BLOCK_T]
        in_t = t < end
        mask = in_t[:, None] & in_d[None, :]
        dy_cell = sequence * dy_stride_b + t[:, None] * dy_stride_t + d[None, :] * dy_stride_d
        h_cell = sequence * h_stride_b + t[:, None] * h_stride_t + d[None, :] * h_stride_d
        out_cell = (out_row + t)[:, None] * D + d[None, :]
        dy = tl.load(dy_ptr + dy_cell, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
        h = tl.load(h_ptr + h_cell, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + out_row + t, mask=in_t, other=0.0)
        rstd = tl.load(rstd_ptr + out_row + t, mask=in_t, other=0.0)
        xhat = (h - mean[:, None]) * rstd[:, None]  # beyond D dy is 0, and so is every product below
        g = dy * (1.0 + scale[None, :])
        along_one = tl.sum(g, 1) / D
        along_xhat = tl.sum(g * xhat, 1) / D
        dx = rstd[:, None] * (g - along_one[:, None] - xhat * along_xhat[:, None])
        dshift += dy
        dscale += dy * xhat
        if HAS_DH:
            dh_cell = sequence * dh_stride_b + t[:, None] * dh_stride_t + d[None, :] * dh_stride_d
            dx += tl.load(dh_ptr + dh_cell, mask=mask, other=0.0).to(tl.float32)
        if RESIDUAL:
            branch_cell = sequence * branch_stride_b + t[:, None] * branch_stride_t + d[None, :] * branch_stride_d
            branch = tl.load(branch_ptr + branch_cell, mask=mask, other=0.0).to(tl.float32)
            dgate += dx * branch
            tl.store(dbranch_ptr + out_cell, (gate[None, :] * dx).to(dbranch_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + out_cell, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if first < end:
        partial = partial_ptr + slot.to(tl.int64) * (3 if RESIDUAL else 2) * D + d
        tl.store(partial, tl.sum(dshift, 0), mask=in_d)
        tl.store(partial + D, tl.sum(dscale, 0), mask=in_d)
        if RESIDUAL:
            tl.store(partial + 2 * D, tl.sum(dgate, 0), mask=in_d)


@triton.jit(do_not_specialize=["N", "rows"])
def _reduce_kernel(
    partial_ptr, cu_seqlens_ptr, dshift_ptr, dscale_ptr, dgate_ptr,
    N, D, rows,
    RESIDUAL: tl.constexpr, PACKED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    which = tl.program_id(2)  # 0 dshift, 1 dscale, 2 dgate
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    in_d = d < D
    if PACKED:
        begin = tl.load(cu_seqlens_ptr + sequence)
        first_slot = begin // rows + sequence
        num_slots = tl.cdiv(tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), N) - begin, rows)
    else:
        num_slots = tl.cdiv(N, rows)
        first_slot = sequence * num_slots
    total = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for start in range(0, num_slots, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        cell = ((first_slot + s).to(tl.int64) * (3 if RESIDUAL else 2) + which)[:, None] * D + d[None, :]
        total += tl.load(partial_ptr + cell, mask=(s < num_slots)[:, None] & in_d[None, :], other=0.0)
    total = tl.sum(total, 0)  # [BLOCK_D]
    out = sequence.to(tl.int64) * D + d
    if which == 0:
        tl.store(dshift_ptr + out, total.to(dshift_ptr.dtype.element_ty), mask=in_d)
    elif which == 1:
        tl.store(dscale_ptr + out, total.to(dscale_ptr.dtype.element_ty), mask=in_d)
    elif RESIDUAL:
        tl.store(dgate_ptr + out, total.to(dgate_ptr.dtype.element_ty), mask=in_d)


def forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, cu_seqlens: Tensor | None,
    eps: float, out_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """(h, y, mean, rstd); h is None without a branch."""
    h = None if branch is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return h, y, mean, rstd
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    block = width_block(x.shape[-1])
    chosen = CONFIGS[block]
    tile = chosen.forward_tile
    rows = forward_rows(mean.numel(), tile)
    with torch.cuda.device_of(x):
        _forward_kernel[(num_slots(x.shape, cu_seqlens, rows),)](
            x, branch, gate, shift, scale, cu_seqlens, h, y, mean, rstd,
            *sizes(x.shape, cu_seqlens), x.shape[-1], rows, eps,
            *row_strides(x), *row_strides(branch),
            *((0, 1) if gate is None else gate.stride()), *shift.stride(), *scale.stride(),
            RESIDUAL=branch is not None, PACKED=cu_seqlens is not None,
            STAGES=num_stages(tile * block * x.element_size(), 1 if branch is None else 2),
            BLOCK_T=tile, BLOCK_D=block, BLOCK_B=BLOCK_B,
            num_warps=chosen.forward_warps, num_stages=1, **OPTIONS,
        )  # fmt: skip
    return h, y, mean, rstd


def backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor,
    mean: Tensor, rstd: Tensor, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """(dx, dbranch, dgate, dshift, dscale), each in its input's dtype; h is x without a branch."""
    dx, dbranch, dgate, dshift, dscale = (
        None if like is None else torch.empty(like.shape, dtype=like.dtype, device=h.device)
        for like in (h, branch, gate, shift, scale)
    )
    if dshift.numel() == 0:
        return dx, dbranch, dgate, dshift, dscale
    width, residual = h.shape[-1], branch is not None
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    block = width_block(width)
    chosen = CONFIGS[block]
    rows = backward_rows(mean.numel(), chosen.backward_tile)
    slots = num_slots(h.shape, cu_seqlens, rows)
    num_sequences, length = sizes(h.shape, cu_seqlens)
    partial = torch.empty((slots, 3 if residual else 2, width), dtype=torch.float32, device=h.device)
    with torch.cuda.device_of(h):
        if slots > 0:
            kernel = _wide_backward_kernel if block == WIDE else _backward_kernel
            kernel[(slots,)](
                dy, dh, h, branch, gate, scale, mean, rstd, cu_seqlens, dx, dbranch, partial,
                num_sequences, length, width, rows,
                *row_strides(dy), *row_strides(dh), *row_strides(h), *row_strides(branch),
                *((0, 1) if gate is None else gate.stride()), *scale.stride(),
                RESIDUAL=residual, HAS_DH=dh is not None, PACKED=cu_seqlens is not None,
                STAGES=backward_stages(block, h.element_size(), residual),
                BLOCK_T=chosen.backward_tile, BLOCK_D=block, BLOCK_B=BLOCK_B,
                num_warps=chosen.backward_warps, num_stages=1, **OPTIONS,
            )  # fmt: skip
        _reduce_kernel[(num_sequences, triton.cdiv(width, REDUCE_D), 3 if residual else 2)](
            partial, cu_seqlens, dshift, dscale, dgate, length, width, rows,
            RESIDUAL=residual, PACKED=cu_seqlens is not None, BLOCK_S=REDUCE_SLOTS, BLOCK_D=REDUCE_D,
            num_warps=4, num_stages=1, **OPTIONS,
        )  # fmt: skip
    return dx, dbranch, dgate, dshift, dscale


SIZES = {"bf16": 2, "fp32": 4}  # bytes


def _build(name: str, kernel, dtype: str, constants: dict, num_warps: int) -> Build:
    """A launch as a contiguous x, and modulations that are views of one [B,6d], make it."""
    names = kernel.arg_names
    constants = {**{name: 1 for name in names if name.endswith("_stride_d")}, **constants}
    types = {"cu_seqlens_ptr": "*i32", "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "partial_ptr": "*fp32", "eps": "fp32"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in names
    }
    divisible = tuple(n for n in names if n == "D" or n.endswith(("_stride_b", "_stride_t")))
    return Build(f"adaln/{name}", kernel, signature, constants, num_warps, 1, False, divisible)


def _forward_build(block: int, dtype: str, residual: bool, packed: bool) -> Build:
    chosen = CONFIGS[block]
    stages = num_stages(chosen.forward_tile * block * SIZES[dtype], 2 if residual else 1)
    constants = dict(RESIDUAL=residual, PACKED=packed, STAGES=stages, BLOCK_T=chosen.forward_tile)
    constants |= dict(BLOCK_D=block, BLOCK_B=BLOCK_B)
    constants |= {} if residual else dict(branch_ptr=None, gate_ptr=None, h_ptr=None)
    constants |= {} if packed else dict(cu_seqlens_ptr=None)
    name = f"forward/{'residual' if residual else 'plain'}/{'packed' if packed else 'padded'}/{dtype}/d{block}"
    return _build(name, _forward_kernel, dtype, constants, chosen.forward_warps)


def _backward_build(block: int, dtype: str, residual: bool, packed: bool, has_dh: bool) -> Build:
    chosen = CONFIGS[block]
    stages = backward_stages(block, SIZES[dtype], residual)
    constants = dict(RESIDUAL=residual, HAS_DH=has_dh, PACKED=packed, STAGES=stages, BLOCK_T=chosen.backward_tile)
    constants |= dict(BLOCK_D=block, BLOCK_B=BLOCK_B)
    constants |= {} if residual else dict(branch_ptr=None, gate_ptr=None, dbranch_ptr=None)
    constants |= {} if has_dh else dict(dh_ptr=None)
    constants |= {} if packed else dict(cu_seqlens_ptr=None)
    kind = ("residual" if has_dh else "residual-no-dh") if residual else "plain"
    name = f"backward/{kind}/{'packed' if packed else 'padded'}/{dtype}/d{block}"
    kernel = _wide_backward_kernel if block == WIDE else _backward_kernel
    return _build(name, kernel, dtype, constants, chosen.backward_warps)


def _reduce_build(dtype: str, residual: bool, packed: bool) -> Build:
    constants = dict(RESIDUAL=residual, PACKED=packed, BLOCK_S=REDUCE_SLOTS, BLOCK_D=REDUCE_D)
    constants |= {} if residual else dict(dgate_ptr=None)
    constants |= {} if packed else dict(cu_seqlens_ptr=None)
    name = f"reduce/{'residual' if residual else 'plain'}/{'packed' if packed else 'padded'}/{dtype}"
    return _build(name, _reduce_kernel, dtype, constants, 4)


def builds() -> list[Build]:
    """Every width in bfloat16, packed; the other layouts at one width; float32 at the widths with the largest tiles."""
    found = []
    for residual in (True, False):
        for block in CONFIGS:
            found.append(_forward_build(block, "bf16", residual, True))
            found.append(_backward_build(block, "bf16", residual, True, residual))
        for block in (512, 8192):
            found.append(_forward_build(block, "fp32", residual, True))
            found.append(_backward_build(block, "fp32", residual, True, residual))
        found.append(_forward_build(512, "bf16", residual, False))
        found.append(_backward_build(512, "bf16", residual, False, residual))
        found.append(_reduce_build("bf16", residual, True))
    found.append(_backward_build(512, "bf16", True, True, False))
    found.append(_reduce_build("bf16", True, False))
    return found
