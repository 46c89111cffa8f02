"""Triton helpers that two operators or more share."""

import triton
import triton.language as tl


@triton.jit
def load_tile(ptr, rows, in_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr):
    """[BLOCK, BLOCK_D] rows that start at the element offsets ``rows``; 0 outside ``in_rows`` and past D."""
    d = tl.arange(0, BLOCK_D)
    cells = ptr + (rows[:, None] + d[None, :])
    if D == BLOCK_D:
        if MASK_ROWS:
            return tl.load(cells, mask=in_rows[:, None], other=0.0)
        else:
            return tl.load(cells)
    elif MASK_ROWS:
        return tl.load(cells, mask=in_rows[:, None] & (d < D)[None, :], other=0.0)
    else:
        return tl.load(cells, mask=(d < D)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, rows, tile, in_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Stores [BLOCK, BLOCK_D] at the element offsets ``rows``, in the pointer's dtype; the mirror of load_tile."""
    d = tl.arange(0, BLOCK_D)
    cells = ptr + (rows[:, None] + d[None, :])
    tile = tile.to(ptr.dtype.element_ty)
    if D == BLOCK_D:
        if MASK_ROWS:
            tl.store(cells, tile, mask=in_rows[:, None])
        else:
            tl.store(cells, tile)
    elif MASK_ROWS:
        tl.store(cells, tile, mask=in_rows[:, None] & (d < D)[None, :])
    else:
        tl.store(cells, tile, mask=(d < D)[None, :])


@triton.jit
def keep_tile(
    seed, threshold, b, h, row, first_column,
    BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr,
):  # fmt: skip
    """Bool [BLOCK_ROW, BLOCK_COLUMN]: philox.keep_mask for rows ``row`` of heads ``h`` (both [BLOCK_ROW]), sequence b.

    ``first_column`` is a multiple of 4; one Philox call serves four columns.
    """
    group = first_column // 4 + tl.arange(0, BLOCK_COLUMN // 4)
    none = tl.zeros([BLOCK_ROW, BLOCK_COLUMN // 4], tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, none + group[None, :], none + row[:, None], none + h[:, None], none + b, 7)
    even = tl.interleave(w0.to(tl.int32, bitcast=True) >= threshold, w2.to(tl.int32, bitcast=True) >= threshold)
    odd = tl.interleave(w1.to(tl.int32, bitcast=True) >= threshold, w3.to(tl.int32, bitcast=True) >= threshold)
    return tl.interleave(even, odd)


@triton.jit
def attend_block(
    q, k, v, m, l, acc, in_columns, scale_log2, seed, threshold, b, h, row, first_column,
    BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr,
    FIRST: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of a running softmax over a block of keys: (m, l, acc) with m the maximum of the raw products q k^T,
    l = sum exp2((s - m) * scale_log2) and acc the sum of those times v, dropped weights left out of acc alone.

    q [BLOCK_ROW, D]   k, v [BLOCK_COLUMN, D]   m, l [BLOCK_ROW]   in_columns [BLOCK_COLUMN], true somewhere (with MASK)
    FIRST: nothing came before, so m, l and acc are not read.
    """
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_ROW, BLOCK_COLUMN]
    if MASK:
        s = tl.where(in_columns[None, :], s, -float("inf"))
    new_m = tl.max(s, 1) if FIRST else tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s * scale_log2 - (new_m * scale_log2)[:, None])
    new_l = tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(keep_tile(seed, threshold, b, h, row, first_column, BLOCK_ROW, BLOCK_COLUMN), p, 0.0)
    if FIRST:
        acc = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    else:
        alpha = tl.exp2((m - new_m) * scale_log2)
        new_l += l * alpha
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return new_m, new_l, acc
