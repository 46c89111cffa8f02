"""What both Triton modes need before and around their loops: the facts of each target row, and shared device functions.

    row_i    = index_i                               word_i = target, -1 where ignored
    z_iy     = x_i . W_y + b_y                       zbar_i = x_i . mean_v W_v + mean_v b_v
    pull     = sum_i g_i x_i                         (partials per program, summed in order)

An index or target out of range reads nothing: its z_iy is NaN, and so becomes its loss.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import Build

BLOCK_M, BLOCK_D, NUM_WARPS = 16, 128, 4


class Tile(NamedTuple):
    """A static configuration: rows, words and channels of one tile, warps and stages."""

    block_m: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int


class Rows(NamedTuple):
    """Facts of the M target rows, each [M]."""

    row: Tensor  # int32, in hidden
    word: Tensor  # int32, -1 where the row is ignored
    target_logit: Tensor  # float32
    mean_logit: Tensor | None  # float32, with label smoothing
    weight: Tensor  # float32, g: 0 where the row is ignored


@triton.jit
def scores(x_rows, w_rows, stride_xd, stride_wd, width, EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr,
           BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """z = x W^T in float32, [BLOCK_M, BLOCK_V], from pointers to the first element of each row."""
    d = tl.arange(0, BLOCK_D)
    wide_d = d.to(tl.int64)  # times a stride it may pass 2^31
    x_cells = x_rows[:, None] + wide_d[None, :] * stride_xd
    w_cells = w_rows[None, :] + wide_d[:, None] * stride_wd
    z = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, width, BLOCK_D):
        if EVEN_D:
            x = tl.load(x_cells)
            w = tl.load(w_cells)
        else:
            x = tl.load(x_cells, mask=(start + d < width)[None, :], other=0.0)
            w = tl.load(w_cells, mask=(start + d < width)[:, None], other=0.0)
        z = tl.dot(x, w, z, input_precision="ieee")
        x_cells += tl.cast(stride_xd, tl.int64) * BLOCK_D
        w_cells += tl.cast(stride_wd, tl.int64) * BLOCK_D
    return z


@triton.jit
def nll_of(others, own, shift):
    """shift + log(own + others): the loss of a row whose exponentials were taken at an offset ``shift`` above z_iy.

    Without a shift own is 1, and a small sum of the others keeps its relative accuracy: log1p through its series.
    """
    r = others / (2.0 + others)
    r2 = r * r
    series = 2.0 * r * (1.0 + r2 * (1 / 3 + r2 * (1 / 5 + r2 * (1 / 7 + r2 * (1 / 9)))))
    return tl.where((shift == 0.0) & (others < 0.25), series, shift + tl.log(own + others))


@triton.jit(do_not_specialize=["num_rows", "num_hidden", "ignore_index"])
def _rows_kernel(
    hidden_ptr, weight_ptr, bias_ptr, index_ptr, target_ptr, row_weight_ptr, mean_word_ptr, mean_bias_ptr,
    row_ptr, word_ptr, target_logit_ptr, mean_logit_ptr, pull_ptr,
    num_rows, num_hidden, num_words, width, ignore_index,
    stride_xt, stride_xd, stride_wv, stride_wd,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i = pid * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    there = i < num_rows
    row = i.to(tl.int64) if index_ptr is None else tl.load(index_ptr + i, mask=there, other=0)
    target = tl.load(target_ptr + i, mask=there, other=0)
    live = there & (target != ignore_index)
    right = (target >= 0) & (target < num_words) & (row >= 0) & (row < num_hidden)
    row = tl.where(live & right, row, 0)
    target = tl.where(live & right, target, 0)
    tl.store(row_ptr + i, row.to(tl.int32), mask=there)
    tl.store(word_ptr + i, tl.where(live, target, -1).to(tl.int32), mask=there)
    own = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D]
        mask = (live & right)[:, None] & (d < width)[None, :]
        x = tl.load(hidden_ptr + row[:, None] * stride_xt + d[None, :] * stride_xd, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + target[:, None] * stride_wv + d[None, :] * stride_wd, mask=mask, other=0.0)
        own += tl.sum(x * w.to(tl.float32), 1)
        if mean_word_ptr is not None:
            mean += tl.sum(x * tl.load(mean_word_ptr + d, mask=d < width, other=0.0)[None, :], 1)
        if pull_ptr is not None:
            gain = tl.load(row_weight_ptr + i, mask=live & right, other=0.0)
            tl.store(pull_ptr + pid.to(tl.int64) * width + d, tl.sum(gain[:, None] * x, 0), mask=d < width)
    if bias_ptr is not None:
        own += tl.load(bias_ptr + target, mask=live & right, other=0.0).to(tl.float32)
    tl.store(target_logit_ptr + i, tl.where(right | ~live, own, float("nan")), mask=there)
    if mean_word_ptr is not None:
        if mean_bias_ptr is not None:
            mean += tl.load(mean_bias_ptr)
        tl.store(mean_logit_ptr + i, mean, mask=there)


def gather_rows(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weight: Tensor, index: Tensor | None, bias: Tensor | None,
    ignore_index: int, mean_word: Tensor | None, want_pull: bool,
) -> tuple[Rows, Tensor | None]:  # fmt: skip
    """The facts of the rows, and pull [d] where it is wanted."""
    num_rows, (num_words, width), device = targets.shape[0], weight.shape, hidden.device
    programs = triton.cdiv(num_rows, BLOCK_M)
    row, word = (torch.empty(num_rows, dtype=torch.int32, device=device) for _ in range(2))
    target_logit = torch.empty(num_rows, dtype=torch.float32, device=device)
    mean_logit = None if mean_word is None else torch.empty_like(target_logit)
    mean_bias = None if mean_word is None or bias is None else bias.mean(dtype=torch.float32)
    pull = torch.empty(programs, width, dtype=torch.float32, device=device) if want_pull else None
    _rows_kernel[(programs,)](
        hidden, weight, bias, index, targets, row_weight, mean_word, mean_bias,
        row, word, target_logit, mean_logit, pull,
        num_rows, hidden.shape[0], num_words, width, ignore_index,
        *hidden.stride(), *weight.stride(),
        BLOCK_M=BLOCK_M, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return Rows(row, word, target_logit, mean_logit, row_weight), None if pull is None else pull.sum(0)


def builds() -> list[Build]:
    return [_build(dtype, extras) for dtype in ("bf16", "fp32") for extras in (False, True)]


def _build(dtype: str, extras: bool) -> Build:
    """With index, bias and label smoothing, or without."""
    absent = [] if extras else ["bias_ptr", "index_ptr", "mean_word_ptr", "mean_bias_ptr", "mean_logit_ptr", "pull_ptr"]
    kinds = {"hidden_ptr": dtype, "weight_ptr": dtype, "bias_ptr": dtype, "index_ptr": "i64", "target_ptr": "i64"}
    kinds |= {"row_ptr": "i32", "word_ptr": "i32"}
    constants = dict.fromkeys(absent) | {"stride_xd": 1, "stride_wd": 1, "BLOCK_M": BLOCK_M, "BLOCK_D": BLOCK_D}
    return build("rows" + ("/extras" if extras else ""), _rows_kernel, dtype, kinds, constants, NUM_WARPS, 3, False)


def build(
    name: str, kernel, dtype: str, kinds: dict[str, str], constants: dict, num_warps: int, num_stages: int,
    has_dot: bool, archs: tuple[str, ...] | None = None,
) -> Build:  # fmt: skip
    """A Build whose pointers are float32 but for ``kinds``, and whose other arguments are int32."""
    signature = {}
    for argument in kernel.arg_names:
        pointer = argument.endswith("_ptr")
        kind = "*" + kinds.get(argument, "fp32") if pointer else kinds.get(argument, "i32")
        signature[argument] = "constexpr" if argument in constants else kind
    whole = tuple(a for a in kernel.arg_names if a == "width" or a.startswith("stride_"))
    name = f"linear_cross_entropy/{name}/{dtype}"
    return Build(name, kernel, signature, constants, num_warps, num_stages, has_dot, whole, archs)
