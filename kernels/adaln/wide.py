"""The backward pass of adaptive layer norm for rows wider than a program's registers hold with their sums.

The same equations, launch and partial sums as fused.py's backward kernel. A row is taken in two halves: once for the
two sums over d that dx needs, once more (from the caches) for everything else.
"""

import triton
import triton.language as tl

from .slots import slot_rows


@triton.jit
def _half_sums(dy_ptr, h_ptr, scale_ptr, in_d, mean, rstd):
    """sum(g) and sum(g * xhat) of half a row, at whose elements the pointers point."""
    scale = tl.load(scale_ptr, mask=in_d, other=0.0).to(tl.float32)  # [BLOCK_D]
    g = tl.load(dy_ptr, mask=in_d, other=0.0, eviction_policy="evict_last").to(tl.float32) * (1.0 + scale)
    xhat = (tl.load(h_ptr, mask=in_d, other=0.0, eviction_policy="evict_last").to(tl.float32) - mean) * rstd
    return tl.sum(g, 0), tl.sum(g * xhat, 0)


@triton.jit
def _half_row(
    dy_ptr, dh_ptr, h_ptr, branch_ptr, gate_ptr, scale_ptr, dx_ptr, dbranch_ptr, d, in_d,
    dh_stride_d, branch_stride_d, gate_stride_d, mean, rstd, along_one, along_xhat, dshift, dscale, dgate,
    RESIDUAL: tl.constexpr, HAS_DH: tl.constexpr,
):  # fmt: skip
    """Writes dx and dbranch of half a row and returns its sums. dh, branch, gate and the outputs point at the row."""
    dy = tl.load(dy_ptr, mask=in_d, other=0.0, eviction_policy="evict_first").to(tl.float32)  # [BLOCK_D]
    h = tl.load(h_ptr, mask=in_d, other=0.0, eviction_policy="evict_first").to(tl.float32)
    xhat = (h - mean) * rstd
    dshift += dy
    dscale += dy * xhat
    g = dy * (1.0 + tl.load(scale_ptr, mask=in_d, other=0.0).to(tl.float32))
    dx = rstd * (g - along_one - xhat * along_xhat)
    if HAS_DH:
        dx += tl.load(dh_ptr + d * dh_stride_d, mask=in_d, other=0.0).to(tl.float32)
    if RESIDUAL:
        dgate += dx * tl.load(branch_ptr + d * branch_stride_d, mask=in_d, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + d * gate_stride_d, mask=in_d, other=0.0).to(tl.float32)
        tl.store(dbranch_ptr + d, (gate * dx).to(dbranch_ptr.dtype.element_ty), mask=in_d)
    tl.store(dx_ptr + d, dx.to(dx_ptr.dtype.element_ty), mask=in_d)
    return dshift, dscale, dgate


@triton.jit(do_not_specialize=["B", "N", "rows"])
def _wide_backward_kernel(
    dy_ptr, dh_ptr, h_ptr, branch_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr, cu_seqlens_ptr,
    dx_ptr, dbranch_ptr, partial_ptr,
    B, N, D, rows,
    dy_stride_b, dy_stride_t, dy_stride_d, dh_stride_b, dh_stride_t, dh_stride_d, h_stride_b, h_stride_t, h_stride_d,
    branch_stride_b, branch_stride_t, branch_stride_d, gate_stride_b, gate_stride_d, scale_stride_b, scale_stride_d,
    RESIDUAL: tl.constexpr, HAS_DH: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    tl.static_assert(BLOCK_T == 1)
    HALF: tl.constexpr = BLOCK_D // 2
    slot = tl.program_id(0)
    sequence, first, end = slot_rows(cu_seqlens_ptr, slot, rows, B, N, PACKED, BLOCK_B)
    sequence = sequence.to(tl.int64)
    low = tl.arange(0, HALF).to(tl.int64)  # [BLOCK_D / 2]
    high = low + HALF
    in_low, in_high = low < D, high < D
    scale = scale_ptr + sequence * scale_stride_b
    scale_low, scale_high = scale + low * scale_stride_d, scale + high * scale_stride_d
    gate = gate_ptr
    if RESIDUAL:
        gate += sequence * gate_stride_b
    dshift_low = tl.zeros([HALF], tl.float32)
    dscale_low, dgate_low = dshift_low, dshift_low
    dshift_high, dscale_high, dgate_high = dshift_low, dshift_low, dshift_low
    out_row = 0 if PACKED else sequence * N
    for row in tl.range(first, end, num_stages=STAGES):
        t = tl.full([], row, tl.int64)
        mean, rstd = tl.load(mean_ptr + out_row + t), tl.load(rstd_ptr + out_row + t)
        dy = dy_ptr + sequence * dy_stride_b + t * dy_stride_t
        h = h_ptr + sequence * h_stride_b + t * h_stride_t
        dx = dx_ptr + (out_row + t) * D
        dh, branch, dbranch = dh_ptr, branch_ptr, dbranch_ptr
        if HAS_DH:
            dh += sequence * dh_stride_b + t * dh_stride_t
        if RESIDUAL:
            branch += sequence * branch_stride_b + t * branch_stride_t
            dbranch += (out_row + t) * D
        dy_low, dy_high = dy + low * dy_stride_d, dy + high * dy_stride_d
        h_low, h_high = h + low * h_stride_d, h + high * h_stride_d
        one_low, xhat_low = _half_sums(dy_low, h_low, scale_low, in_low, mean, rstd)
        one_high, xhat_high = _half_sums(dy_high, h_high, scale_high, in_high, mean, rstd)
        one, xhat = (one_low + one_high) / D, (xhat_low + xhat_high) / D
        dshift_low, dscale_low, dgate_low = _half_row(
            dy_low, dh, h_low, branch, gate, scale_low, dx, dbranch, low, in_low,
            dh_stride_d, branch_stride_d, gate_stride_d, mean, rstd, one, xhat, dshift_low, dscale_low, dgate_low,
            RESIDUAL, HAS_DH,
        )  # fmt: skip
        dshift_high, dscale_high, dgate_high = _half_row(
            dy_high, dh, h_high, branch, gate, scale_high, dx, dbranch, high, in_high,
            dh_stride_d, branch_stride_d, gate_stride_d, mean, rstd, one, xhat, dshift_high, dscale_high, dgate_high,
            RESIDUAL, HAS_DH,
        )  # fmt: skip
    if first < end:
        partial = partial_ptr + slot.to(tl.int64) * (3 if RESIDUAL else 2) * D
        tl.store(partial + low, dshift_low, mask=in_low)
        tl.store(partial + high, dshift_high, mask=in_high)
        tl.store(partial + D + low, dscale_low, mask=in_low)
        tl.store(partial + D + high, dscale_high, mask=in_high)
        if RESIDUAL:
            tl.store(partial + 2 * D + low, dgate_low, mask=in_low)
            tl.store(partial + 2 * D + high, dgate_high, mask=in_high)
