"""Backward of concept_attention in Triton. Contract: op.py. Oracle: reference.py. Rows and chunks as in forward.py.

    p  = exp(scale * q k^T - lse)      delta = rowsum(dout * out) - dlse
    dv = p^T dout                      ds = p * (dout v^T - delta)
    dk = scale * ds^T q                dq = scale * ds k

with, under dropout, p in dv and dout v^T in ds masked and divided by 1 - dropout_p.
One pass, five products, while the rows fit one tile: concepts lie on the long side of the tile, dk and dv leave it
transposed and are written once, dq stays in registers over the chunk. dq of several chunks (and of several sequences,
when q is shared) is summed from float32 partials in a fixed order by splits.sum_kernel.
More rows than one tile: dq_kernel (three products, also leaves delta) and dkv_kernel (four products), seven in all.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import Build
from ..philox import drop_threshold
from ..splits import Split, choose_chunk, locate, matrix_units, split_build, sum_build, sum_partials
from ..tiles import keep_tile, load_tile, store_tile
from .forward import LOG2E, rows_of, tile_rows


@triton.jit
def _gradients(
    q, dout, k, v, lse_log2, delta, scale_log2, in_n,
    seed, threshold, keep_scale, b, h, c, column,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(weights as applied to v, ds), both [BLOCK_R, BLOCK_N] float32."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    # a token that is not there has k = 0, hence exp(-lse), which may be infinite
    p = tl.where(in_n[None, :], tl.exp2(s * scale_log2 - lse_log2[:, None]), 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    applied = p
    if DROPOUT:
        keep = keep_tile(seed, threshold, b, h, c, column, BLOCK_R, BLOCK_N)
        applied = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    return applied, p * (dp - delta[:, None])


@triton.jit
def _delta(
    out_ptr, dlse_ptr, dout, c, h, head_row, num_heads, r, in_r,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    out = load_tile(out_ptr, (c.to(tl.int64) * num_heads + h) * D, in_r, D, BLOCK_D, True)  # [BLOCK_R, BLOCK_D]
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + head_row + r, mask=in_r, other=0.0)
    return delta


@triton.jit(do_not_specialize=["num_sequences", "num_rows", "num_concepts", "chunk", "threshold"])
def row_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, seed_ptr, out_ptr, lse_ptr, dout_ptr, dlse_ptr, dq_ptr, dk_ptr, dv_ptr, delta_ptr,
    num_sequences, num_kv_heads, num_rows, num_concepts, chunk,
    q_stride_b, q_stride_c, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    dout_stride_b, dout_stride_c, dout_stride_h,
    scale, threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ONE_PASS: tl.constexpr, SINGLE: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_R rows and one chunk. ONE_PASS: the rows are all there are, so it also writes dk and dv."""
    num_tiles = tl.cdiv(num_rows, BLOCK_R)
    pid = tl.program_id(0)
    tile = pid % num_tiles
    head = (pid // num_tiles) % num_kv_heads
    slot = pid // num_tiles // num_kv_heads
    b, first = locate(slot, cu_ptr, num_sequences, chunk, SINGLE)
    start = tl.load(cu_ptr + b)
    length = tl.minimum(tl.load(cu_ptr + b + 1) - start - first, chunk)

    r, c, h = rows_of(tile, head, num_rows, num_concepts, GROUP, BLOCK_R)
    in_r = r < num_rows
    sequence, num_heads = b.to(tl.int64), num_kv_heads * GROUP
    head_row = (sequence * num_kv_heads + head) * num_rows
    sequence_cell = sequence * num_rows * num_kv_heads * D  # of [B, C, H, D]
    dq = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if length > 0:
        q_rows = c.to(tl.int64) * q_stride_c + h.to(tl.int64) * q_stride_h
        q = load_tile(q_ptr + sequence * q_stride_b, q_rows, in_r, D, BLOCK_D, True)  # [BLOCK_R, BLOCK_D]
        dout_rows = c.to(tl.int64) * dout_stride_c + h.to(tl.int64) * dout_stride_h
        dout = load_tile(dout_ptr + sequence * dout_stride_b, dout_rows, in_r, D, BLOCK_D, True)
        delta = _delta(
            out_ptr + sequence_cell, dlse_ptr, dout, c, h, head_row, num_heads, r, in_r, D, BLOCK_D
        )
        if not ONE_PASS and first == 0:
            tl.store(delta_ptr + head_row + r, delta, mask=in_r)
        lse_log2 = tl.load(lse_ptr + head_row + r, mask=in_r, other=0.0) * LOG2E
        token = (start + first).to(tl.int64)
        k_ptr += head.to(tl.int64) * k_stride_h
        v_ptr += head.to(tl.int64) * v_stride_h
        d_stride_t = num_kv_heads * D  # dk and dv are [T, Hkv, D], contiguous
        scale_log2 = scale * LOG2E
        seed = tl.load(seed_ptr) if seed_ptr is not None else 0
        n = tl.arange(0, BLOCK_N)
        wide_n = n.to(tl.int64)  # times a stride it may pass 2^31
        for i in range(0, length, BLOCK_N):
            in_n = n < length - i
            # k, v [BLOCK_N, BLOCK_D]
            k = load_tile(k_ptr + (token + i) * k_stride_t, wide_n * k_stride_t, in_n, D, BLOCK_D, True)
            v = load_tile(v_ptr + (token + i) * v_stride_t, wide_n * v_stride_t, in_n, D, BLOCK_D, True)
            applied, ds = _gradients(
                q, dout, k, v, lse_log2, delta, scale_log2, in_n, seed, threshold, keep_scale, b, h, c, first + i,
                BLOCK_R, BLOCK_N, seed_ptr is not None, PRECISION,
            )  # fmt: skip
            ds = ds.to(q.dtype)
            if ONE_PASS:  # dk, dv [BLOCK_D, BLOCK_N]
                cell = (token + i) * d_stride_t + head * D
                dv = tl.dot(tl.trans(dout), applied.to(dout.dtype), input_precision=PRECISION)
                store_tile(dv_ptr + cell, n * d_stride_t, tl.trans(dv), in_n, D, BLOCK_D, True)
                dk = tl.dot(tl.trans(q), ds, input_precision=PRECISION) * scale
                store_tile(dk_ptr + cell, n * d_stride_t, tl.trans(dk), in_n, D, BLOCK_D, True)
            dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    if SINGLE and not SHARED:  # [B, C, H, D]
        rows = (c.to(tl.int64) * num_heads + h) * D
        store_tile(dq_ptr + sequence_cell, rows, dq * scale, in_r, D, BLOCK_D, True)
    elif SHARED or length > 0:  # partials [slots, Hkv, R, D]
        row = (slot.to(tl.int64) * num_kv_heads + head) * num_rows + r
        store_tile(dq_ptr, row * D, dq, in_r, D, BLOCK_D, True)


@triton.jit(do_not_specialize=["num_sequences", "num_rows", "num_concepts", "threshold"])
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, seed_ptr, lse_ptr, delta_ptr, dout_ptr, dk_ptr, dv_ptr,
    num_sequences, num_kv_heads, num_rows, num_concepts,
    q_stride_b, q_stride_c, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    dout_stride_b, dout_stride_c, dout_stride_h,
    scale, threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N tokens for one key head and walks the rows; tokens on the long side of the tile."""
    pid = tl.program_id(0)
    head = pid % num_kv_heads
    b, first = locate(pid // num_kv_heads, cu_ptr, num_sequences, BLOCK_N, False)
    start = tl.load(cu_ptr + b)
    length = tl.load(cu_ptr + b + 1) - start - first
    if length > 0:
        sequence, head_row = b.to(tl.int64), (b.to(tl.int64) * num_kv_heads + head) * num_rows
        n = tl.arange(0, BLOCK_N)
        wide_n = n.to(tl.int64)  # times a stride it may pass 2^31
        in_n = n < length
        token = (start + first).to(tl.int64)
        k_base = k_ptr + token * k_stride_t + head.to(tl.int64) * k_stride_h
        v_base = v_ptr + token * v_stride_t + head.to(tl.int64) * v_stride_h
        k = load_tile(k_base, wide_n * k_stride_t, in_n, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
        v = load_tile(v_base, wide_n * v_stride_t, in_n, D, BLOCK_D, True)
        seed = tl.load(seed_ptr) if seed_ptr is not None else 0
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for i in range(0, num_rows, BLOCK_R):
            r, c, h = rows_of(i // BLOCK_R, head, num_rows, num_concepts, GROUP, BLOCK_R)
            in_r = r < num_rows
            q_rows = c.to(tl.int64) * q_stride_c + h.to(tl.int64) * q_stride_h
            q = load_tile(q_ptr + sequence * q_stride_b, q_rows, in_r, D, BLOCK_D, True)  # [BLOCK_R, BLOCK_D]
            dout_rows = c.to(tl.int64) * dout_stride_c + h.to(tl.int64) * dout_stride_h
            dout = load_tile(dout_ptr + sequence * dout_stride_b, dout_rows, in_r, D, BLOCK_D, True)
            # a row past R has q = dout = 0 and adds nothing
            lse_log2 = tl.load(lse_ptr + head_row + r, mask=in_r, other=0.0) * LOG2E
            delta = tl.load(delta_ptr + head_row + r, mask=in_r, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_R]
            p = tl.exp2(s * (scale * LOG2E) - lse_log2[None, :])
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            applied = p
            if seed_ptr is not None:
                keep = tl.trans(keep_tile(seed, threshold, b, h, c, first, BLOCK_R, BLOCK_N))
                applied = tl.where(keep, p * keep_scale, 0.0)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            dv = tl.dot(applied.to(dout.dtype), dout, dv, input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        d_stride_t = num_kv_heads * D  # [T, Hkv, D], contiguous
        row = token * d_stride_t + head * D
        store_tile(dk_ptr + row, n * d_stride_t, dk * scale, in_n, D, BLOCK_D, True)
        store_tile(dv_ptr + row, n * d_stride_t, dv, in_n, D, BLOCK_D, True)


# {(units, D > 64): {BLOCK_R: (BLOCK_N, num_warps, num_stages)}}, the rows of one pass. More rows take TWO_PASS:
# row_kernel's (BLOCK_R, BLOCK_N, num_warps, num_stages) and dkv_kernel's. Chosen as in forward.py.
ONE_PASS = {
    ("wgmma", False): {16: (32, 4, 2), 32: (32, 4, 2), 64: (64, 4, 2), 128: (64, 8, 2), 256: (32, 8, 2)},
    ("wgmma", True): {16: (32, 4, 2), 32: (32, 4, 2), 64: (32, 8, 2), 128: (32, 8, 2)},
    ("mma", False): {16: (32, 4, 2), 32: (32, 4, 2), 64: (32, 4, 2), 128: (32, 8, 2)},
    ("mma", True): {16: (32, 4, 2), 32: (32, 4, 2), 64: (32, 8, 2)},
    ("fma", False): {},
    ("fma", True): {},
}
ONE_PASS_DROPOUT = {**ONE_PASS, ("wgmma", False): {**ONE_PASS["wgmma", False], 64: (32, 4, 2), 256: (16, 8, 2)}}
TWO_PASS = {
    ("wgmma", False): ((128, 64, 8, 2), (64, 128, 8, 2)),
    ("wgmma", True): ((128, 32, 8, 2), (32, 128, 8, 2)),
    ("mma", False): ((128, 64, 8, 2), (64, 128, 8, 2)),
    ("mma", True): ((128, 32, 8, 2), (32, 128, 8, 2)),
    ("fma", False): ((64, 16, 8, 2), (32, 16, 4, 2)),
    ("fma", True): ((64, 16, 8, 2), (32, 16, 4, 2)),
}
TWO_PASS_DROPOUT = {
    **TWO_PASS,
    ("mma", False): ((128, 64, 8, 2), (32, 128, 8, 2)),
    ("mma", True): ((128, 32, 8, 2), (32, 64, 4, 2)),
    ("fma", True): ((64, 16, 8, 2), (32, 16, 8, 2)),
}
FIELDS = ("BLOCK_R", "BLOCK_N", "num_warps", "num_stages")


def backward_config(
    num_rows: int, block_d: int, units: str, dropout: bool
) -> tuple[dict[str, int | bool], dict[str, int] | None]:
    """Tile and launch shape of row_kernel, and of dkv_kernel where two passes are needed."""
    key = units, block_d > 64
    table = (ONE_PASS_DROPOUT if dropout else ONE_PASS)[key]
    if table and num_rows <= max(table):
        block_r = tile_rows(num_rows, table)
        return dict(zip(FIELDS, (block_r, *table[block_r]), strict=True), ONE_PASS=True), None
    rows, tokens = (dict(zip(FIELDS, shape, strict=True)) for shape in (TWO_PASS_DROPOUT if dropout else TWO_PASS)[key])
    return {**rows, "ONE_PASS": False}, tokens


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, scale: float, dropout_p: float, seed: Tensor | None, chunk: int | None = None,
    dq_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq in ``dq_dtype``, by default q's, dk, dv), contiguous. ``chunk`` overrides the length of a chunk (tests)."""
    num_sequences, (num_tokens, num_kv_heads, head_dim) = cu_seqlens.shape[0] - 1, k.shape
    num_concepts, num_heads = q.shape[-3:-1]
    num_rows, is_shared = num_heads // num_kv_heads * num_concepts, q.ndim == 3
    block_d = max(triton.next_power_of_2(head_dim), 16)
    config, dkv_config = backward_config(num_rows, block_d, matrix_units(q), dropout_p > 0)
    num_programs = triton.cdiv(num_rows, config["BLOCK_R"]) * num_kv_heads
    if chunk is None:
        chunk = choose_chunk(num_tokens, max_seqlen, num_programs, config["num_warps"], config["BLOCK_N"])
    split = Split(num_tokens, num_sequences, max_seqlen, chunk)
    dq = torch.empty(q.shape, dtype=dq_dtype or q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    is_direct = split.single and not is_shared
    part = dq
    if not is_direct:
        part = torch.empty(split.num_slots, num_kv_heads, num_rows, head_dim, dtype=torch.float32, device=q.device)
    delta = torch.empty_like(lse) if dkv_config else None
    dlse = None if dlse is None else dlse.contiguous()
    dout = dout if dout.stride(-1) == 1 or head_dim == 1 else dout.contiguous()  # a gradient from sum() is expanded
    sizes = num_sequences, num_kv_heads, num_rows, num_concepts
    strides = (
        0 if is_shared else q.stride(0), *q.stride()[-3:-1], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:3],
    )  # fmt: skip
    scalars = scale, drop_threshold(dropout_p), 1 / (1 - dropout_p)
    constants = {
        "GROUP": num_heads // num_kv_heads, "D": head_dim, "BLOCK_D": block_d,
        "PRECISION": "ieee", "enable_fp_fusion": True,
    }  # fmt: skip
    row_kernel[(split.num_slots * num_programs,)](
        q, k, v, cu_seqlens, seed, out, lse, dout, dlse, part, dk, dv, delta,
        *sizes, chunk, *strides, *scalars,
        SINGLE=split.single, SHARED=is_shared, **constants, **config,
    )  # fmt: skip
    if dkv_config:
        num_slots = num_tokens // dkv_config["BLOCK_N"] + num_sequences
        dkv_kernel[(num_slots * num_kv_heads,)](
            q, k, v, cu_seqlens, seed, lse, delta, dout, dk, dv, *sizes, *strides, *scalars, **constants, **dkv_config
        )
    if not is_direct:
        sum_partials(part, cu_seqlens, dq, split, scale, is_shared)
    return dq, dk, dv


def builds() -> list[Build]:
    """Every tile in bfloat16 with its most demanding flags, at D = 64 and 128; float32; narrow heads; the sums."""
    found = []
    for dropout, one_pass, two_pass in ((False, ONE_PASS, TWO_PASS), (True, ONE_PASS_DROPOUT, TWO_PASS_DROPOUT)):
        for (units, wide), (rows, tokens) in two_pass.items():
            head_dim = 128 if wide else 64
            for block_r, shape in one_pass[units, wide].items():
                found.append(_build("one_pass", row_kernel, (block_r, *shape), head_dim, units, dropout))
            found.append(_build("rows", row_kernel, rows, head_dim, units, dropout))
            found.append(_build("tokens", dkv_kernel, tokens, head_dim, units, dropout))
    found.append(_build("one_pass", row_kernel, (256, 16, 8, 2), 32, "wgmma", True))
    found.append(_build("one_pass", row_kernel, (128, 64, 8, 2), 16, "wgmma", False))
    found.append(sum_build("concept_attention", "bf16", 64, 1, True))
    found.append(sum_build("concept_attention", "bf16", 128, 2, False))
    return found


def _build(kind: str, kernel: Any, shape: tuple[int, int, int, int], head_dim: int, units: str, dropout: bool) -> Build:
    block_r, block_n, num_warps, num_stages = shape
    dtype = "fp32" if units == "fma" else "bf16"
    constants = {
        "GROUP": 2, "D": head_dim, "BLOCK_R": block_r, "BLOCK_N": block_n, "BLOCK_D": head_dim, "PRECISION": "ieee",
    }  # fmt: skip
    if kernel is row_kernel:
        constants |= {"ONE_PASS": kind == "one_pass", "SINGLE": False, "SHARED": True}
    constants |= {} if dropout else {"seed_ptr": None}
    constants |= {"delta_ptr": None} if kind == "one_pass" else {}
    singles = ("lse_ptr", "dlse_ptr", "delta_ptr", "dq_ptr")
    name = f"concept_attention/backward/{kind}/{units}/{dtype}/R{block_r}xN{block_n}xD{head_dim}" + "/dropout" * dropout
    return split_build(name, kernel, dtype, constants, (num_warps, num_stages), units, singles)
