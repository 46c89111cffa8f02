"""The default Triton mode: three matrix products, with the exponentials of one chunk of rows at a time in memory.

    E_iv     = exp(z_iv - z_iy), 0 at v = y, stored once;   S_i = sum_v E_iv in float32, before rounding
    total_i  = 1 + S_i,   nll_i = log1p(S_i) + eps (z_iy - zbar_i),   s_i = g_i / total_i
    E_iy    := eps total_i - S_i                            the one-hot and the smoothed target, without cancellation
    dX       = diag(s) (E W) - eps g wbar^T                 cuBLAS, float32 out
    dW       = sum over chunks E^T (diag(s) X) - eps/V sum_i g_i x_i    cuBLAS, accumulated in float32

The target's own logit is the offset, so no maximum is searched and nothing is rescaled. A row whose target is so
unlikely (S_i above 2^80: nll above 55) that this could overflow is done again with its true maximum as the offset, by
the program that finds it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import Build
from .products import add_product, product
from .rows import Rows, Tile, build, nll_of, scores

LOG2E = tl.constexpr(1.4426950408889634)
LARGE = tl.constexpr(2.0**80)


# Of _exponentials_kernel, by dtype and architecture. Half precision fits two programs on a multiprocessor, so that the
# exponentials of one overlap the products of the other; sm_80 also serves parts with 99 KB of shared memory.
TILES = {
    "half": {"sm_80": Tile(128, 128, 32, 4, 3), "sm_90": Tile(128, 128, 64, 4, 3), "sm_100": Tile(128, 128, 64, 4, 3)},
    "float32": {arch: Tile(64, 64, 32, 4, 3) for arch in ("sm_80", "sm_90", "sm_100")},
}
FINISH = Tile(16, 64, 64, 4, 2)
FINISH_TILES = 32  # partial sums of so many tiles are read at once
SUM_M, SUM_V, SUM_WARPS = 64, 128, 4
ROW_MULTIPLE = 128  # rows of a chunk


@triton.jit(do_not_specialize=["num_rows"])
def _exponentials_kernel(
    hidden_ptr, weight_ptr, bias_ptr, row_ptr, word_ptr, target_logit_ptr, e_ptr, part_ptr,
    num_rows, num_words, width,
    stride_xt, stride_xd, stride_wv, stride_wd, stride_ei,
    EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """E [rows, V] and its row sums per tile, part [tiles, rows]. Neighbouring programs share a tile of weight."""
    num_blocks = tl.cdiv(num_rows, BLOCK_M)
    pid = tl.program_id(0)
    i = pid % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    tile = pid // num_blocks
    v = tile * BLOCK_V + tl.arange(0, BLOCK_V)  # [BLOCK_V]
    there = i < num_rows
    row = tl.load(row_ptr + i, mask=there, other=0).to(tl.int64)
    x_rows = hidden_ptr + row * stride_xt
    w_rows = weight_ptr + tl.minimum(v, num_words - 1).to(tl.int64) * stride_wv
    z = scores(x_rows, w_rows, stride_xd, stride_wd, width, EVEN_D, BLOCK_M, BLOCK_V, BLOCK_D)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + v, mask=v < num_words, other=0.0).to(tl.float32)[None, :]
    own = tl.load(target_logit_ptr + i, mask=there, other=0.0)
    word = tl.load(word_ptr + i, mask=there, other=-1)
    keep = (word >= 0)[:, None] & (v < num_words)[None, :] & (v[None, :] != word[:, None])
    e = tl.where(keep, tl.exp2((z - own[:, None]) * LOG2E), 0.0)
    tl.store(part_ptr + tile.to(tl.int64) * num_rows + i, tl.sum(e, 1), mask=there)
    cells = e_ptr + i.to(tl.int64)[:, None] * stride_ei + v[None, :]
    tl.store(cells, e.to(e_ptr.dtype.element_ty), mask=there[:, None] & (v < num_words)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _finish_kernel(
    hidden_ptr, weight_ptr, bias_ptr, row_ptr, word_ptr, target_logit_ptr, mean_logit_ptr, row_weight_ptr,
    e_ptr, part_ptr, nll_ptr, scale_ptr, scaled_ptr,
    num_rows, num_words, width, num_tiles,
    smoothing,
    stride_xt, stride_xd, stride_wv, stride_wd, stride_ei,
    EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums in order, mends rows that overflowed, and leaves nll, s, E_iy and s_i x_i."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    there = i < num_rows
    word = tl.load(word_ptr + i, mask=there, other=-1)
    live = word >= 0
    own = tl.load(target_logit_ptr + i, mask=there, other=0.0)
    row = tl.load(row_ptr + i, mask=there, other=0).to(tl.int64)
    x_rows = hidden_ptr + row * stride_xt
    e_rows = e_ptr + i.to(tl.int64) * stride_ei
    others = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, num_tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        cells = part_ptr + t.to(tl.int64)[:, None] * num_rows + i[None, :]
        others += tl.sum(tl.load(cells, mask=(t < num_tiles)[:, None] & there[None, :], other=0.0), 0)
    first = tl.full([BLOCK_M], 1.0, tl.float32)  # exp(z_iy - offset)
    shift = tl.zeros([BLOCK_M], tl.float32)  # offset - z_iy
    large = live & ~(others < LARGE)  # NaN too
    if tl.max(large.to(tl.int32), 0) > 0:
        peak = own
        for start in range(0, num_words, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            w_rows = weight_ptr + tl.minimum(v, num_words - 1).to(tl.int64) * stride_wv
            z = scores(x_rows, w_rows, stride_xd, stride_wd, width, EVEN_D, BLOCK_M, BLOCK_V, BLOCK_D)
            if bias_ptr is not None:
                z += tl.load(bias_ptr + v, mask=v < num_words, other=0.0).to(tl.float32)[None, :]
            peak = tl.maximum(peak, tl.max(tl.where((v < num_words)[None, :], z, float("-inf")), 1))
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, num_words, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            w_rows = weight_ptr + tl.minimum(v, num_words - 1).to(tl.int64) * stride_wv
            z = scores(x_rows, w_rows, stride_xd, stride_wd, width, EVEN_D, BLOCK_M, BLOCK_V, BLOCK_D)
            if bias_ptr is not None:
                z += tl.load(bias_ptr + v, mask=v < num_words, other=0.0).to(tl.float32)[None, :]
            keep = (v < num_words)[None, :] & (v[None, :] != word[:, None])
            e = tl.where(keep, tl.exp2((z - peak[:, None]) * LOG2E), 0.0)
            total += tl.sum(e, 1)
            cells = e_rows[:, None] + v[None, :]
            tl.store(cells, e.to(e_ptr.dtype.element_ty), mask=large[:, None] & keep)  # the target's cell is for below
        others = tl.where(large, total, others)
        first = tl.where(large, tl.exp2((own - peak) * LOG2E), first)
        shift = tl.where(large, peak - own, shift)
    total = first + others
    nll = nll_of(others, first, shift)
    if mean_logit_ptr is not None:
        nll += smoothing * (own - tl.load(mean_logit_ptr + i, mask=there, other=0.0))
    tl.store(nll_ptr + i, tl.where(live, nll, 0.0), mask=there)
    scale = tl.load(row_weight_ptr + i, mask=live, other=0.0) / total
    tl.store(scale_ptr + i, scale, mask=there)
    entry = smoothing * total - others
    tl.store(e_rows + tl.where(live, word, 0), entry.to(e_ptr.dtype.element_ty), mask=live)
    if scaled_ptr is not None:
        for start in range(0, width, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D).to(tl.int64)
            mask = there[:, None] & (d < width)[None, :]
            x = tl.load(x_rows[:, None] + d[None, :] * stride_xd, mask=mask, other=0.0).to(tl.float32)
            x = tl.where(live[:, None], x * scale[:, None], 0.0)
            cells = scaled_ptr + i.to(tl.int64)[:, None] * width + d[None, :]
            tl.store(cells, x.to(scaled_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_columns_kernel(
    e_ptr, scale_ptr, sum_ptr,
    num_rows, num_words,
    stride_ei,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """sum [V] += E^T s, the gradient of the bias; one program a block of words, over all rows in order."""
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    acc = tl.load(sum_ptr + v, mask=v < num_words, other=0.0)
    for start in range(0, num_rows, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        mask = (i < num_rows)[:, None] & (v < num_words)[None, :]
        e = tl.load(e_ptr + i.to(tl.int64)[:, None] * stride_ei + v[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += tl.sum(e * tl.load(scale_ptr + i, mask=i < num_rows, other=0.0)[:, None], 0)
    tl.store(sum_ptr + v, acc, mask=v < num_words)


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of E and s x: bfloat16 where float16 would overflow at an nll of 11."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def row_stride(num_words: int) -> int:
    """Of E: whole cache lines, so that vector stores and cuBLAS stay aligned for any V."""
    return -(-num_words // 64) * 64


def gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, nll: Tensor, smoothing: float, chunk: int,
    mean_word: Tensor | None, pull: Tensor | None, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None,
    arch: str,
) -> None:  # fmt: skip
    """Fills nll [M], dx [M, d] and dweight [V, d], to which it adds pull [d], and adds to dbias [V].

    ``chunk`` rows at a time.
    """
    num_rows, (num_words, width), device = rows.row.shape[0], weight.shape, hidden.device
    tile = TILES["float32" if hidden.dtype == torch.float32 else "half"][arch]
    stored = stored_dtype(hidden.dtype)
    words = weight.to(stored)
    num_tiles = triton.cdiv(num_words, tile.block_v)
    room = min(chunk, num_rows)
    e = torch.empty(room, row_stride(num_words), dtype=stored, device=device)
    part = torch.empty(num_tiles, room, dtype=torch.float32, device=device)
    scaled = None if dweight is None else torch.empty(room, width, dtype=stored, device=device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=device)
    shared = (*hidden.stride(), *weight.stride(), e.stride(0))
    if dweight is not None:  # every row of it starts from the uniform part of the smoothed targets
        dweight.zero_() if pull is None else dweight.copy_(pull.expand_as(dweight))
    for start in range(0, num_rows, chunk):
        here = slice(start, min(start + chunk, num_rows))
        count = here.stop - start
        facts = (rows.row[here], rows.word[here], rows.target_logit[here])
        _exponentials_kernel[(triton.cdiv(count, tile.block_m) * num_tiles,)](
            hidden, weight, bias, *facts, e, part,
            count, num_words, width, *shared,
            EVEN_D=width % tile.block_d == 0, BLOCK_M=tile.block_m, BLOCK_V=tile.block_v, BLOCK_D=tile.block_d,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
        mean_logit = None if rows.mean_logit is None else rows.mean_logit[here]
        _finish_kernel[(triton.cdiv(count, FINISH.block_m),)](
            hidden, weight, bias, *facts, mean_logit, rows.weight[here],
            e, part, nll[here], scale[here], scaled,
            count, num_words, width, num_tiles, smoothing, *shared,
            EVEN_D=width % FINISH.block_d == 0, BLOCK_M=FINISH.block_m, BLOCK_V=FINISH.block_v,
            BLOCK_D=FINISH.block_d, BLOCK_T=FINISH_TILES,
            num_warps=FINISH.num_warps, num_stages=FINISH.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
        live = e[:count, :num_words]
        if dx is not None:
            product(live, words, dx[here])
        if dweight is not None:
            add_product(dweight, live.t(), scaled[:count])
        if dbias is not None:
            _sum_columns_kernel[(triton.cdiv(num_words, SUM_V),)](
                e, scale[here], dbias,
                count, num_words, e.stride(0),
                BLOCK_M=SUM_M, BLOCK_V=SUM_V, num_warps=SUM_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    if dx is not None:
        dx.mul_(scale[:, None])
        if mean_word is not None:
            dx.addr_(rows.weight, mean_word, alpha=-smoothing)


def builds() -> list[Build]:
    """Every tile, in bfloat16 without and in float16 with the branches for a bias and any width; float32 with bias."""
    found = []
    for arch, tile in TILES["half"].items():
        found.append(_exponentials_build(tile, "bf16", True, False, (arch,)))
        found.append(_exponentials_build(tile, "fp16", False, True, (arch,)))
    found.append(_exponentials_build(TILES["float32"]["sm_80"], "fp32", True, True, None))
    for dtype in ("bf16", "fp16", "fp32"):
        found.append(_finish_build(dtype))
    for dtype in ("bf16", "fp32"):
        kinds, constants = {"e_ptr": dtype}, {"BLOCK_M": SUM_M, "BLOCK_V": SUM_V}
        found.append(build("sum_columns", _sum_columns_kernel, dtype, kinds, constants, SUM_WARPS, 3, False))
    return found


def _kinds(dtype: str) -> dict[str, str]:
    stored = "fp32" if dtype == "fp32" else "bf16"
    inputs = dict.fromkeys(("hidden_ptr", "weight_ptr", "bias_ptr"), dtype)
    return inputs | {"row_ptr": "i32", "word_ptr": "i32", "e_ptr": stored, "scaled_ptr": stored, "smoothing": "fp32"}


def _constants(tile: Tile, even: bool) -> dict:
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_V": tile.block_v, "BLOCK_D": tile.block_d}
    return {"stride_xd": 1, "stride_wd": 1, "EVEN_D": even, **blocks}


def _exponentials_build(tile: Tile, dtype: str, even: bool, bias: bool, archs: tuple[str, ...] | None) -> Build:
    constants = _constants(tile, even) | ({} if bias else {"bias_ptr": None})
    name = "exponentials/" + "x".join(str(size) for size in tile[:3]) + ("" if even else "/any d") + ("/bias" * bias)
    half = dtype != "fp32"  # float32 is exact, without matrix instructions
    return build(
        name, _exponentials_kernel, dtype, _kinds(dtype), constants, tile.num_warps, tile.num_stages, half, archs
    )


def _finish_build(dtype: str) -> Build:
    constants = _constants(FINISH, True) | {"BLOCK_T": FINISH_TILES}
    return build(
        "finish", _finish_kernel, dtype, _kinds(dtype), constants, FINISH.num_warps, FINISH.num_stages, dtype != "fp32"
    )
