"""The Triton mode without logits in memory: each pass computes the tiles of z again and uses them at once.

    statistics:  running maximum m_i >= z_iy and S_i = sum_{v != y} exp(z_iv - m_i) over a share of V, joined in order
    dX_i  = g_i (sum_v G_iv W_v - eps wbar)              a program per block of rows and of d; V passes by
    dW_v  = sum_i g_i G_iv x_i - eps/V sum_i g_i x_i     a program per block of words and of d; the rows pass by
    db_v  = sum_i g_i G_iv - eps/V sum_i g_i
    G_iv  = exp(z_iv - m_i) / total_i,   total_i = exp(z_iy - m_i) + S_i,   at v = y: eps - S_i / total_i, which is
            p - (1 - eps) without its cancellation

This is attention with the rows as queries and the words as keys and values. The first pass alone serves a loss without
gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import Build
from .rows import Rows, Tile, build, nll_of, scores

LOG2E = tl.constexpr(1.4426950408889634)
BOOST = tl.constexpr(10.0)  # G enters its product as 2^10 G, above the subnormal numbers of float16
# By dtype and architecture; sm_80 also serves parts with 99 KB of shared memory.
STATISTICS = {
    "half": {"sm_80": Tile(128, 128, 32, 8, 3), "sm_90": Tile(128, 128, 64, 8, 3), "sm_100": Tile(128, 128, 64, 8, 3)},
    "float32": {arch: Tile(64, 64, 32, 4, 3) for arch in ("sm_80", "sm_90", "sm_100")},
}
DROWS = {  # with the columns of the accumulator
    "half": {
        "sm_80": (Tile(64, 64, 64, 8, 2), 256),
        "sm_90": (Tile(64, 64, 64, 8, 2), 512),
        "sm_100": (Tile(64, 64, 64, 8, 2), 256),
    },
    "float32": {arch: (Tile(32, 32, 32, 4, 2), 128) for arch in ("sm_80", "sm_90", "sm_100")},
}
DWORDS = {
    "half": {
        "sm_80": (Tile(64, 64, 64, 8, 2), 256),
        "sm_90": (Tile(32, 64, 64, 8, 2), 512),
        "sm_100": (Tile(64, 64, 64, 8, 2), 256),
    },
    "float32": {arch: (Tile(32, 32, 32, 4, 2), 128) for arch in ("sm_80", "sm_90", "sm_100")},
}
JOIN_M = 128
TARGET_PROGRAMS = (
    264  # two on each multiprocessor of the largest supported part; fixed, so that sums never depend on it
)


@triton.jit(do_not_specialize=["num_rows", "span"])
def _statistics_kernel(
    hidden_ptr, weight_ptr, bias_ptr, row_ptr, word_ptr, target_logit_ptr, peak_ptr, sum_ptr,
    num_rows, num_words, width, span,
    stride_xt, stride_xd, stride_wv, stride_wd,
    EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """peak and sum [splits, M]: m_i and S_i over the words of one split, ``span`` of them."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    split = tl.program_id(1)
    there = i < num_rows
    row = tl.load(row_ptr + i, mask=there, other=0).to(tl.int64)
    word = tl.load(word_ptr + i, mask=there, other=-1)
    x_rows = hidden_ptr + row * stride_xt
    peak = tl.load(target_logit_ptr + i, mask=there, other=0.0)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(split * span, tl.minimum(split * span + span, num_words), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)  # [BLOCK_V]
        w_rows = weight_ptr + tl.minimum(v, num_words - 1).to(tl.int64) * stride_wv
        z = scores(x_rows, w_rows, stride_xd, stride_wd, width, EVEN_D, BLOCK_M, BLOCK_V, BLOCK_D)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + v, mask=v < num_words, other=0.0).to(tl.float32)[None, :]
        keep = (v < num_words)[None, :] & (v[None, :] != word[:, None])
        z = tl.where(keep, z, float("-inf"))
        higher = tl.maximum(peak, tl.max(z, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2((peak - base) * LOG2E) + tl.sum(tl.exp2((z - base[:, None]) * LOG2E), 1)
        peak = higher
    at = split.to(tl.int64) * num_rows + i
    tl.store(peak_ptr + at, peak, mask=there)
    tl.store(sum_ptr + at, total, mask=there)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _join_kernel(
    word_ptr, target_logit_ptr, mean_logit_ptr, peak_ptr, sum_ptr, nll_ptr, top_ptr, inverse_ptr, hit_ptr,
    num_rows, num_splits,
    smoothing,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """nll, m, 1 / total and G at the target, [M], from the splits in order."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    there = i < num_rows
    live = tl.load(word_ptr + i, mask=there, other=-1) >= 0
    own = tl.load(target_logit_ptr + i, mask=there, other=0.0)
    peak = own
    others = tl.zeros([BLOCK_M], tl.float32)
    for split in range(num_splits):
        at = tl.cast(split, tl.int64) * num_rows + i
        part = tl.load(peak_ptr + at, mask=there, other=0.0)
        higher = tl.maximum(peak, part)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.load(sum_ptr + at, mask=there, other=0.0) * tl.exp2((part - base) * LOG2E)
        others = others * tl.exp2((peak - base) * LOG2E) + share
        peak = higher
    first = tl.where(peak == own, 1.0, tl.exp2((own - peak) * LOG2E))
    total = first + others
    nll = nll_of(others, first, peak - own)
    if mean_logit_ptr is not None:
        nll += smoothing * (own - tl.load(mean_logit_ptr + i, mask=there, other=0.0))
    tl.store(nll_ptr + i, tl.where(live, nll, 0.0), mask=there)
    tl.store(top_ptr + i, peak, mask=there)
    tl.store(inverse_ptr + i, 1.0 / total, mask=there)
    tl.store(hit_ptr + i, smoothing - others / total, mask=there)


@triton.jit(do_not_specialize=["num_rows", "span"])
def _drows_kernel(
    hidden_ptr, weight_ptr, bias_ptr, row_ptr, word_ptr, top_ptr, inverse_ptr, hit_ptr, out_ptr,
    num_rows, num_words, width, span,
    stride_xt, stride_xd, stride_wv, stride_wd,
    EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """out [splits, M, d] = G W over the words of one split, BLOCK_OUT columns a program."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    d = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT).to(tl.int64)  # [BLOCK_OUT]
    split = tl.program_id(2)
    there = i < num_rows
    row = tl.load(row_ptr + i, mask=there, other=0).to(tl.int64)
    word = tl.load(word_ptr + i, mask=there, other=-1)
    top = tl.load(top_ptr + i, mask=there, other=0.0)
    inverse = tl.load(inverse_ptr + i, mask=there, other=0.0) * tl.exp2(BOOST)
    hit = tl.load(hit_ptr + i, mask=there, other=0.0) * tl.exp2(BOOST)
    x_rows = hidden_ptr + row * stride_xt
    acc = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
    for start in range(split * span, tl.minimum(split * span + span, num_words), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)  # [BLOCK_V]
        inside = v < num_words
        w_rows = weight_ptr + tl.minimum(v, num_words - 1).to(tl.int64) * stride_wv
        z = scores(x_rows, w_rows, stride_xd, stride_wd, width, EVEN_D, BLOCK_M, BLOCK_V, BLOCK_D)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + v, mask=inside, other=0.0).to(tl.float32)[None, :]
        g = tl.exp2((z - top[:, None]) * LOG2E) * inverse[:, None]
        g = tl.where(v[None, :] == word[:, None], hit[:, None], g)
        g = tl.where(inside[None, :] & (word >= 0)[:, None], g, 0.0)
        w = tl.load(w_rows[:, None] + d[None, :] * stride_wd, mask=(d < width)[None, :], other=0.0)
        acc = tl.dot(g.to(w.dtype), w, acc, input_precision="ieee")
    cells = out_ptr + (split.to(tl.int64) * num_rows + i)[:, None] * width + d[None, :]
    tl.store(cells, acc * tl.exp2(-BOOST), mask=there[:, None] & (d < width)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _dwords_kernel(
    hidden_ptr, weight_ptr, bias_ptr, row_ptr, word_ptr, top_ptr, inverse_ptr, hit_ptr, share_ptr, unit_ptr, pull_ptr,
    out_ptr, dbias_ptr,
    num_rows, num_words, width,
    stride_xt, stride_xd, stride_wv, stride_wd,
    EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """out [V, d] = unit (G diag(share))^T X + pull and dbias [V] += unit G^T share, with g = unit share."""
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)  # [BLOCK_V]
    d = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT).to(tl.int64)  # [BLOCK_OUT]
    inside = v < num_words
    w_rows = weight_ptr + tl.minimum(v, num_words - 1).to(tl.int64) * stride_wv
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + v, mask=inside, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_V, BLOCK_OUT], tl.float32)
    sums = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, num_rows, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        there = i < num_rows
        row = tl.load(row_ptr + i, mask=there, other=0).to(tl.int64)
        word = tl.load(word_ptr + i, mask=there, other=-1)
        top = tl.load(top_ptr + i, mask=there, other=0.0)
        share = tl.load(share_ptr + i, mask=there, other=0.0) * tl.exp2(BOOST)
        inverse = tl.load(inverse_ptr + i, mask=there, other=0.0) * share
        hit = tl.load(hit_ptr + i, mask=there, other=0.0) * share
        x_rows = hidden_ptr + row * stride_xt
        z = scores(w_rows, x_rows, stride_wd, stride_xd, width, EVEN_D, BLOCK_V, BLOCK_M, BLOCK_D)  # [BLOCK_V, BLOCK_M]
        if bias_ptr is not None:
            z += bias[:, None]
        g = tl.exp2((z - top[None, :]) * LOG2E) * inverse[None, :]
        g = tl.where(v[:, None] == word[None, :], hit[None, :], g)
        g = tl.where((word >= 0)[None, :], g, 0.0)
        mask = (word >= 0)[:, None] & (d < width)[None, :]
        x = tl.load(x_rows[:, None] + d[None, :] * stride_xd, mask=mask, other=0.0)
        acc = tl.dot(g.to(x.dtype), x, acc, input_precision="ieee")
        sums += tl.sum(g, 1)
    unit = tl.load(unit_ptr) * tl.exp2(-BOOST)
    if out_ptr is not None:
        cells = out_ptr + v.to(tl.int64)[:, None] * width + d[None, :]
        acc *= unit
        if pull_ptr is not None:
            acc += tl.load(pull_ptr + d, mask=d < width, other=0.0)[None, :]
        tl.store(cells, acc, mask=inside[:, None] & (d < width)[None, :])
    if dbias_ptr is not None:  # noqa: SIM102  (one condition is known to the compiler, the other is not)
        if tl.program_id(1) == 0:
            tl.store(dbias_ptr + v, tl.load(dbias_ptr + v, mask=inside, other=0.0) + sums * unit, mask=inside)


def statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, nll: Tensor, smoothing: float, arch: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills nll [M]; returns m, 1 / total and G at the target, [M]."""
    num_rows, (num_words, width) = nll.shape[0], weight.shape
    tile = STATISTICS["float32" if hidden.dtype == torch.float32 else "half"][arch]
    blocks = triton.cdiv(num_rows, tile.block_m)
    num_splits, span = _split(num_words, tile.block_v, blocks)
    peak, total = (nll.new_empty(num_splits, num_rows) for _ in range(2))
    top, inverse, hit = (torch.empty_like(nll) for _ in range(3))
    _statistics_kernel[(blocks, num_splits)](
        hidden, weight, bias, rows.row, rows.word, rows.target_logit, peak, total,
        num_rows, num_words, width, span,
        *hidden.stride(), *weight.stride(),
        EVEN_D=width % tile.block_d == 0, BLOCK_M=tile.block_m, BLOCK_V=tile.block_v, BLOCK_D=tile.block_d,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    _join_kernel[(triton.cdiv(num_rows, JOIN_M),)](
        rows.word, rows.target_logit, rows.mean_logit, peak, total, nll, top, inverse, hit,
        num_rows, num_splits,
        smoothing,
        BLOCK_M=JOIN_M, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return top, inverse, hit


def gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, nll: Tensor, smoothing: float,
    mean_word: Tensor | None, pull: Tensor | None, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None,
    arch: str,
) -> None:  # fmt: skip
    """Fills nll [M], dx [M, d] and dweight [V, d], to which it adds pull [d], and adds to dbias [V]."""
    num_rows, (num_words, width) = nll.shape[0], weight.shape
    facts = statistics(hidden, weight, bias, rows, nll, smoothing, arch)
    kind = "float32" if hidden.dtype == torch.float32 else "half"
    shared = (*hidden.stride(), *weight.stride())
    if dx is not None:
        tile, columns = DROWS[kind][arch]
        num_columns, constants = _launch(tile, columns, width)
        blocks = triton.cdiv(num_rows, tile.block_m)
        num_splits, span = _split(num_words, tile.block_v, blocks * num_columns)
        parts = dx[None] if num_splits == 1 else dx.new_empty(num_splits, *dx.shape)
        _drows_kernel[(blocks, num_columns, num_splits)](
            hidden, weight, bias, rows.row, rows.word, *facts, parts,
            num_rows, num_words, width, span, *shared, **constants,
        )  # fmt: skip
        if num_splits > 1:
            torch.sum(parts, 0, out=dx)
        dx.mul_(rows.weight[:, None])
        if mean_word is not None:
            dx.addr_(rows.weight, mean_word, alpha=-smoothing)
    if dweight is not None or dbias is not None:
        tile, columns = DWORDS[kind][arch]
        num_columns, constants = _launch(tile, columns, width)
        unit = rows.weight.abs().amax()
        share = rows.weight / unit.where(unit > 0, 1)  # float16 could not hold small weights
        _dwords_kernel[(triton.cdiv(num_words, tile.block_v), 1 if dweight is None else num_columns)](
            hidden, weight, bias, rows.row, rows.word, *facts, share, unit, pull, dweight, dbias,
            num_rows, num_words, width, *shared, **constants,
        )  # fmt: skip


def _launch(tile: Tile, columns: int, width: int) -> tuple[int, dict]:
    """Programs along d, and the constants of a gradient kernel."""
    columns = min(columns, max(triton.next_power_of_2(width), 16))
    return triton.cdiv(width, columns), {
        "EVEN_D": width % tile.block_d == 0, "BLOCK_M": tile.block_m, "BLOCK_V": tile.block_v, "BLOCK_D": tile.block_d,
        "BLOCK_OUT": columns, "num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip


def _split(num_words: int, block: int, programs: int) -> tuple[int, int]:
    """How many splits of V fill the GPU, and the words of one: whole tiles, at least four."""
    tiles = triton.cdiv(num_words, block)
    wanted = max(min(TARGET_PROGRAMS // max(programs, 1), tiles // 4), 1)
    span = triton.cdiv(tiles, wanted)
    return triton.cdiv(tiles, span), span * block


def builds() -> list[Build]:
    """Every tile, in bfloat16 without and in float16 with the branches for a bias and any width; float32 with bias."""
    found = [_join_build()]
    for arch, tile in STATISTICS["half"].items():
        found.append(_statistics_build(tile, "bf16", True, False, (arch,)))
        found.append(_statistics_build(tile, "fp16", False, True, (arch,)))
    found.append(_statistics_build(STATISTICS["float32"]["sm_80"], "fp32", True, True, None))
    for kernel, table in ((_drows_kernel, DROWS), (_dwords_kernel, DWORDS)):
        for arch, (tile, columns) in table["half"].items():
            found.append(_gradient_build(kernel, tile, columns, "bf16", True, False, (arch,)))
            found.append(_gradient_build(kernel, tile, columns, "fp16", False, True, (arch,)))
        found.append(_gradient_build(kernel, *table["float32"]["sm_80"], "fp32", True, True, None))
    return found


def _common(tile: Tile, dtype: str, even: bool, bias: bool) -> tuple[dict[str, str], dict]:
    kinds = dict.fromkeys(("hidden_ptr", "weight_ptr", "bias_ptr"), dtype) | {"row_ptr": "i32", "word_ptr": "i32"}
    constants = {"BLOCK_M": tile.block_m, "BLOCK_V": tile.block_v, "BLOCK_D": tile.block_d, "EVEN_D": even}
    absent = {} if bias else dict.fromkeys(("bias_ptr", "pull_ptr", "dbias_ptr"))
    return kinds, constants | absent | {"stride_xd": 1, "stride_wd": 1}


def _statistics_build(tile: Tile, dtype: str, even: bool, bias: bool, archs: tuple[str, ...] | None) -> Build:
    kinds, constants = _common(tile, dtype, even, bias)
    constants = {name: value for name, value in constants.items() if name in _statistics_kernel.arg_names}
    name = "statistics/" + _title(tile, even, bias)
    matrix = dtype != "fp32"  # float32 is exact, without matrix instructions
    return build(name, _statistics_kernel, dtype, kinds, constants, tile.num_warps, tile.num_stages, matrix, archs)


def _gradient_build(
    kernel, tile: Tile, columns: int, dtype: str, even: bool, bias: bool, archs: tuple[str, ...] | None
) -> Build:
    kinds, constants = _common(tile, dtype, even, bias)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names} | {"BLOCK_OUT": columns}
    name = "drows/" if kernel is _drows_kernel else "dwords/"
    name += _title(tile, even, bias) + f"/{columns}"
    return build(name, kernel, dtype, kinds, constants, tile.num_warps, tile.num_stages, dtype != "fp32", archs)


def _title(tile: Tile, even: bool, bias: bool) -> str:
    return "x".join(str(size) for size in tile[:3]) + ("" if even else "/any d") + "/bias" * bias


def _join_build() -> Build:
    return build(
        "join", _join_kernel, "fp32", {"word_ptr": "i32", "smoothing": "fp32"}, {"BLOCK_M": JOIN_M}, 4, 3, False
    )
