"""Bias, RMSNorm and rotation of a chunk's keys in Triton, forward and backward, each in one pass over them.

    u = w_key x + bias        z = u / rms(u)        k = turn(z * norm, angles)
    dz = turn back(dk) * norm                       du = (dz - z mean(dz z)) / rms(u)
    dnorm = sum of turn back(dk) * z                dbias = sum of du

A program owns STEPS tiles of BLOCK_T tokens of one head; a tile is two halves [BLOCK_T, HALF], because what turns
together is (u[i], u[i + D/2]). Everything between the loads and the one rounding of the results is float32. The
gradients of norm and bias leave a program as one float32 row, and are added in the order of the tokens.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import Build

STEPS = 8  # tiles of a backward program, so that rows of partial sums are few
FORWARD_TILE, BACKWARD_TILE = 2048, 1024  # elements of a half; backward also holds u, z and four running sums


@triton.jit
def _halves(ptr, rows, in_rows, D: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr):
    """Both halves [BLOCK_T, BLOCK_H], float32, of rows that start at the element offsets ``rows``; 0 outside."""
    i = tl.arange(0, BLOCK_H)
    cells = ptr + (rows[:, None] + i[None, :])
    first = tl.load(cells, mask=in_rows[:, None] & (i < HALF)[None, :], other=0.0).to(tl.float32)
    second = tl.load(cells + HALF, mask=in_rows[:, None] & (i + HALF < D)[None, :], other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_halves(ptr, rows, in_rows, first, second, D: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr):
    i = tl.arange(0, BLOCK_H)
    cells = ptr + (rows[:, None] + i[None, :])
    tl.store(cells, first.to(ptr.dtype.element_ty), mask=in_rows[:, None] & (i < HALF)[None, :])
    tl.store(cells + HALF, second.to(ptr.dtype.element_ty), mask=in_rows[:, None] & (i + HALF < D)[None, :])


@triton.jit
def _vector(ptr, D: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr):
    """Both halves [BLOCK_H], float32, of a vector [D]."""
    i = tl.arange(0, BLOCK_H)
    first = tl.load(ptr + i, mask=i < HALF, other=0.0).to(tl.float32)
    return first, tl.load(ptr + HALF + i, mask=i + HALF < D, other=0.0).to(tl.float32)


@triton.jit
def _angles(cos_ptr, sin_ptr, t, in_t, HALF: tl.constexpr, BLOCK_H: tl.constexpr):
    """cos and sin [BLOCK_T, BLOCK_H] of tokens t, from tables [n, HALF]."""
    i = tl.arange(0, BLOCK_H)
    cells, there = (t * HALF)[:, None] + i[None, :], in_t[:, None] & (i < HALF)[None, :]
    return tl.load(cos_ptr + cells, mask=there, other=0.0), tl.load(sin_ptr + cells, mask=there, other=0.0)


@triton.jit
def _normalised(
    u_ptr, bias_ptr, rows, in_t, eps,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """(both halves of z, 1 / rms [BLOCK_T]); without NORM z is u and the last is 1."""
    first, second = _halves(u_ptr, rows, in_t, D, HALF, BLOCK_H)
    if bias_ptr is not None:
        bias_first, bias_second = _vector(bias_ptr, D, HALF, BLOCK_H)
        first += bias_first[None, :]
        second += bias_second[None, :]
    inverse = tl.full([first.shape[0]], 1.0, tl.float32)
    if NORM:
        inverse = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D + eps)
        inverse = tl.where(in_t, inverse, 0.0)
        first *= inverse[:, None]
        second *= inverse[:, None]
    return first, second, inverse


@triton.jit(do_not_specialize=["num_tokens"])
def heads_kernel(
    u_ptr, bias_ptr, norm_ptr, cos_ptr, sin_ptr, k_ptr,
    num_tokens, num_heads, u_stride_t,
    eps,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """k [n, Hkv, D], contiguous, of u [n, Hkv * D]."""
    head = tl.program_id(0) % num_heads
    t = (tl.program_id(0) // num_heads * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)  # [BLOCK_T]
    in_t = t < num_tokens
    first, second, _ = _normalised(
        u_ptr, bias_ptr, t * u_stride_t + head * D, in_t, eps, D, HALF, BLOCK_H, norm_ptr is not None
    )
    if norm_ptr is not None:
        norm_first, norm_second = _vector(norm_ptr, D, HALF, BLOCK_H)
        first *= norm_first[None, :]
        second *= norm_second[None, :]
    if cos_ptr is not None:
        cos, sin = _angles(cos_ptr, sin_ptr, t, in_t, HALF, BLOCK_H)
        turned = first * cos - second * sin
        second = second * cos + first * sin
        first = turned
    _store_halves(k_ptr, (t * num_heads + head) * D, in_t, first, second, D, HALF, BLOCK_H)


@triton.jit(do_not_specialize=["num_tokens"])
def heads_backward_kernel(
    u_ptr, bias_ptr, norm_ptr, cos_ptr, sin_ptr, dk_ptr, part_ptr,
    num_tokens, num_heads, u_stride_t,
    eps,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """du over dk [n, Hkv, D], where it lies; dbias and dnorm of the program, part [slots, Hkv, 2, D] float32."""
    head = tl.program_id(0) % num_heads
    slot = tl.program_id(0) // num_heads
    if norm_ptr is not None:
        norm_first, norm_second = _vector(norm_ptr, D, HALF, BLOCK_H)
    dbias_first, dbias_second = tl.zeros([BLOCK_T, BLOCK_H], tl.float32), tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    dnorm_first, dnorm_second = tl.zeros([BLOCK_T, BLOCK_H], tl.float32), tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for step in range(STEPS):
        t = ((slot * STEPS + step) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)  # [BLOCK_T]
        in_t = t < num_tokens
        row = (t * num_heads + head) * D
        first, second = _halves(dk_ptr, row, in_t, D, HALF, BLOCK_H)
        if cos_ptr is not None:
            cos, sin = _angles(cos_ptr, sin_ptr, t, in_t, HALF, BLOCK_H)
            turned = first * cos + second * sin
            second = second * cos - first * sin
            first = turned
        if norm_ptr is not None:
            z_first, z_second, inverse = _normalised(
                u_ptr, bias_ptr, t * u_stride_t + head * D, in_t, eps, D, HALF, BLOCK_H, True
            )
            dnorm_first += first * z_first  # 0 past the last token, where dk is
            dnorm_second += second * z_second
            first *= norm_first[None, :]
            second *= norm_second[None, :]
            mean = (tl.sum(first * z_first, 1) + tl.sum(second * z_second, 1)) / D
            first = (first - z_first * mean[:, None]) * inverse[:, None]
            second = (second - z_second * mean[:, None]) * inverse[:, None]
        if bias_ptr is not None:
            dbias_first += tl.where(in_t[:, None], first, 0.0)
            dbias_second += tl.where(in_t[:, None], second, 0.0)
        _store_halves(dk_ptr, row, in_t, first, second, D, HALF, BLOCK_H)
    i = tl.arange(0, BLOCK_H)
    cell = part_ptr + (slot.to(tl.int64) * num_heads + head) * 2 * D + i
    if bias_ptr is not None:
        tl.store(cell, tl.sum(dbias_first, 0), mask=i < HALF)
        tl.store(cell + HALF, tl.sum(dbias_second, 0), mask=i + HALF < D)
    if norm_ptr is not None:
        tl.store(cell + D, tl.sum(dnorm_first, 0), mask=i < HALF)
        tl.store(cell + D + HALF, tl.sum(dnorm_second, 0), mask=i + HALF < D)


def heads_config(head_dim: int, tile: int) -> dict[str, int]:
    half = -(-head_dim // 2)
    block_h = max(triton.next_power_of_2(half), 8)
    return {"D": head_dim, "HALF": half, "BLOCK_H": block_h, "BLOCK_T": max(tile // block_h, 16)}


def make(
    u: Tensor, bias: Tensor | None, norm: Tensor | None, tables: tuple[Tensor, Tensor] | None, head_dim: int, eps: float
) -> Tensor:
    """u [n, Hkv * D], rows of any stride; cos and sin [n, D/2] float32 -> keys [n, Hkv, D]."""
    num_tokens, num_heads = u.shape[0], u.shape[1] // head_dim
    config = heads_config(head_dim, FORWARD_TILE)
    keys = torch.empty(num_tokens, num_heads, head_dim, dtype=u.dtype, device=u.device)
    cos, sin = (None, None) if tables is None else tables
    heads_kernel[(triton.cdiv(num_tokens, config["BLOCK_T"]) * num_heads,)](
        u, bias, norm, cos, sin, keys, num_tokens, num_heads, u.stride(0), eps, **config, num_warps=4, num_stages=1
    )
    return keys


def backward(
    dkeys: Tensor, u: Tensor, bias: Tensor | None, norm: Tensor | None, tables: tuple[Tensor, Tensor] | None,
    head_dim: int, eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(du [n, Hkv * D] where dkeys [n, Hkv, D] lay, dbias [D], dnorm [D] float32)."""
    num_tokens, num_heads = u.shape[0], u.shape[1] // head_dim
    config = heads_config(head_dim, BACKWARD_TILE)
    num_slots = triton.cdiv(num_tokens, config["BLOCK_T"] * STEPS)
    part = torch.empty(num_slots, num_heads, 2, head_dim, dtype=torch.float32, device=u.device)
    cos, sin = (None, None) if tables is None else tables
    if not (bias is None and norm is None and tables is None):
        heads_backward_kernel[(num_slots * num_heads,)](
            u, bias, norm, cos, sin, dkeys, part, num_tokens, num_heads, u.stride(0), eps,
            **config, STEPS=STEPS, num_warps=4, num_stages=1,
        )  # fmt: skip
    dbias = None if bias is None else part[:, :, 0].sum((0, 1))
    return dkeys.flatten(1), dbias, None if norm is None else part[:, :, 1].sum((0, 1))


def builds() -> list[Build]:
    """Every width of head in bfloat16 with all there is to do, the narrowest and widest in float32, and each part
    left out once."""
    found = []
    for dtype, head_dims in (("bf16", (16, 32, 64, 80, 128)), ("fp32", (16, 64, 128))):
        found += [_build(kernel, dtype, head_dim, ()) for head_dim in head_dims for kernel in KERNELS]
    for absent in ("bias", "norm", "turn"):
        found += [_build(kernel, "bf16", 64, (absent,)) for kernel in KERNELS]
    return found


KERNELS = {heads_kernel: "forward", heads_backward_kernel: "backward"}
POINTERS = {"bias": ("bias_ptr",), "norm": ("norm_ptr",), "turn": ("cos_ptr", "sin_ptr")}


def _build(kernel: Any, dtype: str, head_dim: int, absent: tuple[str, ...]) -> Build:
    is_backward = kernel is heads_backward_kernel
    constants: dict[str, Any] = dict(heads_config(head_dim, BACKWARD_TILE if is_backward else FORWARD_TILE))
    constants |= {"STEPS": STEPS} if is_backward else {}
    constants |= {pointer: None for part in absent for pointer in POINTERS[part]}
    types = {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "part_ptr": "*fp32", "eps": "fp32"}

    def kind(name: str) -> str:
        return "constexpr" if name in constants else types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")

    name = f"streamed_attention/heads/{KERNELS[kernel]}/{dtype}/D{head_dim}" + "".join(f"/no {part}" for part in absent)
    signature = {name: kind(name) for name in kernel.arg_names}
    return Build(name, kernel, signature, constants, 4, 1, False, ("u_stride_t",))
