"""Forward of concept_attention in Triton. Contract: op.py. Oracle: reference.py.

    s   = scale * q k^T      per row r: running maximum m, l = sum_n exp(s - m), acc = sum_n exp(s - m) v
    out = acc / l            lse = m + log l

The R = G * C rows of one key head are its concepts under each of the G query heads that share it (row g * C + c).
A program owns one chunk of one sequence for one key head and up to BLOCK_R rows, and walks the chunk in tiles of
BLOCK_N tokens; the maximum is kept of the raw products, so that the exponent is one fused multiply-add. With several
chunks a sequence, every program leaves (out, lse) of its chunk in float32, and merge_kernel merges them in their order.
Float32 products are IEEE ("ieee": as exact as torch's, on the ordinary units), those of 16-bit inputs exact in float32.
"""

from collections.abc import Collection

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import Build
from ..philox import drop_threshold
from ..splits import REDUCE, Split, choose_chunk, locate, matrix_units, slots_of, split_build
from ..tiles import attend_block, load_tile, store_tile

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def rows_of(tile, head, num_rows, num_concepts, GROUP: tl.constexpr, BLOCK_R: tl.constexpr):
    """(r, c, h), each [BLOCK_R]: row r of key head ``head`` is concept c of query head h."""
    r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    g = r // num_concepts if GROUP > 1 else tl.zeros([BLOCK_R], tl.int32)
    return r, r - g * num_concepts, head * GROUP + g


@triton.jit(do_not_specialize=["num_sequences", "num_rows", "num_concepts", "chunk", "threshold"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, seed_ptr, out_ptr, lse_ptr,
    num_sequences, num_kv_heads, num_rows, num_concepts, chunk,
    q_stride_b, q_stride_c, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    scale, threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SINGLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
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
    m = tl.full([BLOCK_R], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if length > 0:
        q_rows = c.to(tl.int64) * q_stride_c + h.to(tl.int64) * q_stride_h
        q = load_tile(q_ptr + b.to(tl.int64) * q_stride_b, q_rows, in_r, D, BLOCK_D, True)  # [BLOCK_R, BLOCK_D]
        token = (start + first).to(tl.int64)
        k_ptr += head.to(tl.int64) * k_stride_h
        v_ptr += head.to(tl.int64) * v_stride_h
        scale_log2 = scale * LOG2E
        seed = tl.load(seed_ptr) if seed_ptr is not None else 0
        n = tl.arange(0, BLOCK_N)
        wide_n = n.to(tl.int64)  # times a stride it may pass 2^31
        for i in range(0, length, BLOCK_N):
            in_n = n < length - i
            # k, v [BLOCK_N, BLOCK_D]
            k = load_tile(k_ptr + (token + i) * k_stride_t, wide_n * k_stride_t, in_n, D, BLOCK_D, True)
            v = load_tile(v_ptr + (token + i) * v_stride_t, wide_n * v_stride_t, in_n, D, BLOCK_D, True)
            m, l, acc = attend_block(
                q, k, v, m, l, acc, in_n, scale_log2, seed, threshold, b, h, c, first + i,
                BLOCK_R, BLOCK_N, False, True, seed_ptr is not None, PRECISION,
            )  # fmt: skip
    # a chunk without tokens: acc = 0, l = 0, and lse = -inf
    safe_l = tl.where(l > 0, l, 1.0)
    out = acc * (keep_scale / safe_l)[:, None]
    lse = tl.where(l > 0, m * scale + tl.log2(safe_l) * LN2, -float("inf"))
    if SINGLE:  # [B, C, H, D] and [B, H, C]
        rows = (c.to(tl.int64) * num_kv_heads * GROUP + h) * D
        store_tile(out_ptr + b.to(tl.int64) * num_rows * num_kv_heads * D, rows, out, in_r, D, BLOCK_D, True)
        tl.store(lse_ptr + (b.to(tl.int64) * num_kv_heads + head) * num_rows + r, lse, mask=in_r)
    elif length > 0:  # partials [slots, Hkv, R, D] and [slots, Hkv, R]
        row = (slot.to(tl.int64) * num_kv_heads + head) * num_rows + r
        store_tile(out_ptr, row * D, out, in_r, D, BLOCK_D, True)
        tl.store(lse_ptr + row, lse, mask=in_r)


@triton.jit(do_not_specialize=["num_rows", "num_concepts", "chunk"])
def merge_kernel(
    part_ptr, part_lse_ptr, cu_ptr, out_ptr, lse_ptr,
    num_kv_heads, num_rows, num_concepts, chunk,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merges the chunks of one sequence, in their order, for one key head and BLOCK_R rows; BLOCK_S chunks a step."""
    num_tiles = tl.cdiv(num_rows, BLOCK_R)
    pid = tl.program_id(0)
    head = (pid // num_tiles) % num_kv_heads
    b = (pid // num_tiles // num_kv_heads).to(tl.int64)
    r, c, h = rows_of(pid % num_tiles, head, num_rows, num_concepts, GROUP, BLOCK_R)
    in_r = r < num_rows
    slot, count = slots_of(b, cu_ptr, chunk, False)
    j = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    m = tl.full([BLOCK_R], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for s in range(0, count, BLOCK_S):
        # row, lse [BLOCK_S, BLOCK_R]
        row = ((slot + s + j).to(tl.int64) * num_kv_heads + head)[:, None] * num_rows + r[None, :]
        there = (s + j < count)[:, None] & in_r[None, :]
        lse = tl.load(part_lse_ptr + row, mask=there, other=-float("inf"))
        new_m = tl.maximum(m, tl.max(lse, 0))
        finite_m = tl.where(new_m == -float("inf"), 0.0, new_m)  # rows past R: exp(-inf - 0) = 0, not NaN
        weight = tl.exp2((lse - finite_m[None, :]) * LOG2E)
        alpha = tl.exp2((m - finite_m) * LOG2E)
        mask = there[:, :, None] & (d < D)[None, None, :]
        part = tl.load(part_ptr + row[:, :, None] * D + d[None, None, :], mask=mask, other=0.0)
        l = l * alpha + tl.sum(weight, 0)
        acc = acc * alpha[:, None] + tl.sum(part * weight[:, :, None], 0)
        m = new_m
    safe_l = tl.where(l > 0, l, 1.0)
    rows = (c.to(tl.int64) * num_kv_heads * GROUP + h) * D
    store_tile(out_ptr + b * num_rows * num_kv_heads * D, rows, acc / safe_l[:, None], in_r, D, BLOCK_D, True)
    lse = tl.where(l > 0, m + tl.log2(safe_l) * LN2, -float("inf"))
    tl.store(lse_ptr + (b * num_kv_heads + head) * num_rows + r, lse, mask=in_r)


# {(units, D > 64): {BLOCK_R: (BLOCK_N, num_warps, num_stages)}}; units as splits.matrix_units. Chosen from the compile
# table: the largest tiles that spill nothing, two programs a multiprocessor where registers allow. 512 rows in one tile
# of 16 warps spill 48 bytes on sm_90 and 136 on sm_100, so they are two tiles in adjacent programs (K, V from L2).
TILES = {
    ("wgmma", False): {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 4, 3), 128: (64, 8, 3), 256: (64, 8, 3)},
    ("wgmma", True): {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 4, 3), 128: (64, 8, 3), 256: (32, 8, 3)},
    ("mma", False): {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 4, 3), 128: (64, 8, 3), 256: (32, 8, 3)},
    ("mma", True): {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 8, 3), 128: (32, 8, 3)},
    ("fma", False): {16: (32, 4, 2), 32: (32, 4, 2), 64: (32, 8, 2)},
    ("fma", True): {16: (16, 4, 2), 32: (16, 4, 2), 64: (16, 8, 2)},
}
TILES_DROPOUT = {
    **TILES,
    ("wgmma", False): {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 4, 3), 128: (64, 8, 3), 256: (32, 8, 3)},
    ("wgmma", True): {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 4, 3), 128: (64, 8, 3)},
}


def tile_rows(num_rows: int, sizes: Collection[int]) -> int:
    """One of ``sizes``: the smallest that holds all rows, else the one that pads least (the larger of equals)."""
    holding = [size for size in sizes if size >= num_rows]
    return min(holding) if holding else min(sizes, key=lambda size: (-(-num_rows // size) * size, -size))


def forward_config(num_rows: int, block_d: int, units: str, dropout: bool) -> dict[str, int]:
    table = (TILES_DROPOUT if dropout else TILES)[units, block_d > 64]
    block_r = tile_rows(num_rows, table)
    block_n, num_warps, num_stages = table[block_r]
    return {"BLOCK_R": block_r, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    scale: float, dropout_p: float, seed: Tensor | None, chunk: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out in ``out_dtype``, by default q's, lse). ``chunk`` overrides the length of a chunk, in tokens (tests)."""
    num_sequences, (num_tokens, num_kv_heads, head_dim) = cu_seqlens.shape[0] - 1, k.shape
    num_concepts, num_heads = q.shape[-3:-1]
    num_rows = num_heads // num_kv_heads * num_concepts
    block_d = max(triton.next_power_of_2(head_dim), 16)
    config = forward_config(num_rows, block_d, matrix_units(q), dropout_p > 0)
    num_programs = triton.cdiv(num_rows, config["BLOCK_R"]) * num_kv_heads
    if chunk is None:
        chunk = choose_chunk(num_tokens, max_seqlen, num_programs, config["num_warps"], config["BLOCK_N"])
    split = Split(num_tokens, num_sequences, max_seqlen, chunk)
    out = torch.empty(num_sequences, num_concepts, num_heads, head_dim, dtype=out_dtype or q.dtype, device=q.device)
    lse = torch.empty(num_sequences, num_heads, num_concepts, dtype=torch.float32, device=q.device)
    part, part_lse = out, lse
    if not split.single:
        part_lse = torch.empty(split.num_slots, num_kv_heads, num_rows, dtype=torch.float32, device=q.device)
        part = torch.empty(*part_lse.shape, head_dim, dtype=torch.float32, device=q.device)
    shared = {"GROUP": num_heads // num_kv_heads, "D": head_dim, "BLOCK_D": block_d, "enable_fp_fusion": True}
    forward_kernel[(split.num_slots * num_programs,)](
        q, k, v, cu_seqlens, seed, part, part_lse,
        num_sequences, num_kv_heads, num_rows, num_concepts, chunk,
        0 if q.ndim == 3 else q.stride(0), *q.stride()[-3:-1], *k.stride()[:2], *v.stride()[:2],
        scale, drop_threshold(dropout_p), 1 / (1 - dropout_p),
        SINGLE=split.single, PRECISION="ieee", **shared, **config,
    )  # fmt: skip
    if not split.single:
        merge_kernel[(triton.cdiv(num_rows, REDUCE["BLOCK_R"]) * num_kv_heads * num_sequences,)](
            part, part_lse, cu_seqlens, out, lse, num_kv_heads, num_rows, num_concepts, chunk, **shared, **REDUCE,
        )  # fmt: skip
    return out, lse


def builds() -> list[Build]:
    """Every tile in bfloat16 with its most demanding flags, at D = 64 and 128; float32; narrow heads; the merge."""
    found = []
    for dropout, tables in ((False, TILES), (True, TILES_DROPOUT)):
        for (units, wide), table in tables.items():
            dtype = "fp32" if units == "fma" else "bf16"
            for block_r, (block_n, num_warps, num_stages) in table.items():
                tile = block_r, block_n, 128 if wide else 64
                found.append(_build(dtype, tile, (num_warps, num_stages), units, dropout, 2, False))
    found.append(_build("bf16", (128, 64, 64), (8, 3), "wgmma", False, 1, True))
    found.append(_build("bf16", (128, 64, 32), (8, 3), "wgmma", True, 1, False))
    found.append(_build("fp16", (64, 64, 16), (4, 3), "mma", False, 1, False))
    for head_dim, group in ((64, 1), (128, 2)):
        constants = {"GROUP": group, "D": head_dim, "BLOCK_D": head_dim}
        constants |= {"BLOCK_S": REDUCE["BLOCK_S"], "BLOCK_R": REDUCE["BLOCK_R"]}
        name, launch = f"concept_attention/merge/bf16/D{head_dim}", (REDUCE["num_warps"], REDUCE["num_stages"])
        singles = ("part_ptr", "part_lse_ptr", "lse_ptr")
        found.append(split_build(name, merge_kernel, "bf16", constants, launch, "fma", singles))
    return found


def _build(
    dtype: str, tile: tuple[int, int, int], launch: tuple[int, int], units: str, dropout: bool, group: int, single: bool
) -> Build:
    block_r, block_n, head_dim = tile
    constants = {
        "GROUP": group, "D": head_dim, "BLOCK_R": block_r, "BLOCK_N": block_n, "BLOCK_D": head_dim,
        "SINGLE": single, "PRECISION": "ieee",
    }  # fmt: skip
    constants |= {} if dropout else {"seed_ptr": None}
    name = f"concept_attention/forward/{units}/{dtype}/R{block_r}xN{block_n}xD{head_dim}" + "/dropout" * dropout
    singles = ("lse_ptr",) if single else ("lse_ptr", "out_ptr")
    return split_build(name + "/single" * single, forward_kernel, dtype, constants, launch, units, singles)
