"""Backward of token_attention in Triton. Contract: op.py. Oracle: reference.py. Rows and chunks as in forward.py.

    p  = softmax_c(scale * q k^T)      delta = rowsum(dout * out)
    dv = p^T dout                      ds = p * (dout v^T - delta)
    dk = scale * ds^T q                dq = scale * ds k

with, under dropout, p in dv and dout v^T in ds masked and divided by 1 - dropout_p.

row_kernel recomputes the softmax with tokens on the long side of the tile, where its reductions are cheap, and leaves
lse and delta [T, H]: 8 bytes a row instead of a saved out. concept_kernel then has the concepts on the long side, no
reduction at all, dk and dv in registers over its chunk and dq written once: seven products, q and dout read twice.
Concepts that do not fit one tile are blocks of the grid; row_kernel then also makes dq, in a second walk over them.
dk and dv of several chunks are summed from float32 partials in a fixed order by splits.sum_kernel.
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
from .forward import LOG2E, NUM_STAGES, attend_build, attend_concepts, attend_config, load_concepts, rows_at


@triton.jit(do_not_specialize=["num_sequences", "num_concepts", "chunk", "threshold"])
def row_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, seed_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    num_sequences, num_kv_heads, num_concepts, chunk,
    q_stride_t, q_stride_h, k_stride_b, k_stride_c, k_stride_h, v_stride_b, v_stride_c, v_stride_h,
    dout_stride_t, dout_stride_h,
    scale, threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    ONE_TILE: tl.constexpr, EVEN_C: tl.constexpr, WITH_DQ: tl.constexpr,
    SINGLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns one chunk for one key head, as in the forward. lse [T, H] is kept in units of log2."""
    pid = tl.program_id(0)
    head = pid % num_kv_heads
    b, first = locate(pid // num_kv_heads, cu_ptr, num_sequences, chunk, SINGLE)
    start = tl.load(cu_ptr + b)
    length = tl.minimum(tl.load(cu_ptr + b + 1) - start - first, chunk)
    if length > 0:
        token = (start + first).to(tl.int64)
        q_ptr += token * q_stride_t
        dout_ptr += token * dout_stride_t
        k_ptr += b.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
        v_ptr += b.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_h
        scale_log2 = scale * LOG2E
        seed = tl.load(seed_ptr) if seed_ptr is not None else 0
        # read here with ONE_TILE only
        in_c, k, v = load_concepts(k_ptr, v_ptr, 0, num_concepts, k_stride_c, v_stride_c, D, BLOCK_C, BLOCK_D)
        for i in range(0, length * GROUP, BLOCK_T):
            n, h = rows_at(i, head, GROUP, BLOCK_T)
            in_t = n < length
            q_rows = n.to(tl.int64) * q_stride_t + h.to(tl.int64) * q_stride_h
            q = load_tile(q_ptr, q_rows, in_t, D, BLOCK_D, True)  # [BLOCK_T, BLOCK_D]
            dout_rows = n.to(tl.int64) * dout_stride_t + h.to(tl.int64) * dout_stride_h
            dout = load_tile(dout_ptr, dout_rows, in_t, D, BLOCK_D, True)
            m, l, acc = attend_concepts(
                q, k, v, in_c, k_ptr, v_ptr, num_concepts, k_stride_c, v_stride_c, scale_log2,
                seed, threshold, b, h, first + n,
                D, BLOCK_T, BLOCK_C, BLOCK_D, ONE_TILE, EVEN_C, seed_ptr is not None, PRECISION,
            )  # fmt: skip
            lse_log2 = m * scale_log2 + tl.log2(l)
            delta = tl.sum(acc * dout.to(tl.float32), 1) * (keep_scale / l)
            rows = (token + n) * num_kv_heads * GROUP + h  # of [T, H]
            tl.store(lse_ptr + rows, lse_log2, mask=in_t)
            tl.store(delta_ptr + rows, delta, mask=in_t)
            if WITH_DQ:
                dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
                for j in range(0, num_concepts, BLOCK_C):
                    in_c, k, v = load_concepts(
                        k_ptr, v_ptr, j, num_concepts, k_stride_c, v_stride_c, D, BLOCK_C, BLOCK_D
                    )
                    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_T, BLOCK_C]
                    p = tl.where(in_c[None, :], tl.exp2(s * scale_log2 - lse_log2[:, None]), 0.0)
                    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
                    if seed_ptr is not None:
                        keep = keep_tile(seed, threshold, b, h, first + n, j, BLOCK_T, BLOCK_C)
                        dp = tl.where(keep, dp * keep_scale, 0.0)
                    ds = p * (dp - delta[:, None])
                    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
                store_tile(dq_ptr, rows * D, dq * scale, in_t, D, BLOCK_D, True)


@triton.jit(do_not_specialize=["num_sequences", "num_concepts", "chunk", "threshold"])
def concept_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, seed_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr,
    num_sequences, num_kv_heads, num_concepts, chunk,
    q_stride_t, q_stride_h, k_stride_b, k_stride_c, k_stride_h, v_stride_b, v_stride_c, v_stride_h,
    dout_stride_t, dout_stride_h,
    scale, threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    WITH_DQ: tl.constexpr, SINGLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_C concepts of one key head and one chunk. WITH_DQ: they are all, so it makes dq."""
    num_blocks = tl.cdiv(num_concepts, BLOCK_C)
    pid = tl.program_id(0)
    first_c = pid % num_blocks * BLOCK_C
    head = (pid // num_blocks) % num_kv_heads
    slot = pid // num_blocks // num_kv_heads
    b, first = locate(slot, cu_ptr, num_sequences, chunk, SINGLE)
    start = tl.load(cu_ptr + b)
    length = tl.minimum(tl.load(cu_ptr + b + 1) - start - first, chunk)
    dk = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    if length > 0:
        token = (start + first).to(tl.int64)
        q_ptr += token * q_stride_t
        dout_ptr += token * dout_stride_t
        k_ptr += b.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
        v_ptr += b.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_h
        scale_log2 = scale * LOG2E
        seed = tl.load(seed_ptr) if seed_ptr is not None else 0
        in_c, k, v = load_concepts(k_ptr, v_ptr, first_c, num_concepts, k_stride_c, v_stride_c, D, BLOCK_C, BLOCK_D)
        for i in range(0, length * GROUP, BLOCK_T):
            n, h = rows_at(i, head, GROUP, BLOCK_T)
            in_t = n < length
            q_rows = n.to(tl.int64) * q_stride_t + h.to(tl.int64) * q_stride_h
            q = load_tile(q_ptr, q_rows, in_t, D, BLOCK_D, True)  # [BLOCK_T, BLOCK_D]
            dout_rows = n.to(tl.int64) * dout_stride_t + h.to(tl.int64) * dout_stride_h
            dout = load_tile(dout_ptr, dout_rows, in_t, D, BLOCK_D, True)
            rows = (token + n) * num_kv_heads * GROUP + h  # of [T, H]
            # a row that is not there has q = dout = 0 and adds nothing
            lse_log2 = tl.load(lse_ptr + rows, mask=in_t, other=0.0)
            delta = tl.load(delta_ptr + rows, mask=in_t, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_C, BLOCK_T]
            # a concept that is not there has k = 0, hence exp(-lse), which may be infinite
            p = tl.where(in_c[:, None], tl.exp2(s * scale_log2 - lse_log2[None, :]), 0.0)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            applied = p
            if seed_ptr is not None:
                keep = tl.trans(keep_tile(seed, threshold, b, h, first + n, first_c, BLOCK_T, BLOCK_C))
                applied = tl.where(keep, p * keep_scale, 0.0)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            dv = tl.dot(applied.to(dout.dtype), dout, dv, input_precision=PRECISION)
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
            if WITH_DQ:
                dq = tl.trans(tl.dot(tl.trans(k), ds, input_precision=PRECISION))  # [BLOCK_T, BLOCK_D]
                store_tile(dq_ptr, rows * D, dq * scale, in_t, D, BLOCK_D, True)
    c = first_c + tl.arange(0, BLOCK_C)
    in_c = c < num_concepts
    if SINGLE:  # [B, C, Hkv, D]
        cells = ((b.to(tl.int64) * num_concepts + c) * num_kv_heads + head) * D
        store_tile(dk_ptr, cells, dk * scale, in_c, D, BLOCK_D, True)
        store_tile(dv_ptr, cells, dv, in_c, D, BLOCK_D, True)
    elif length > 0:  # partials [slots, Hkv, C, D]
        cells = ((slot.to(tl.int64) * num_kv_heads + head) * num_concepts + c) * D
        store_tile(dk_ptr, cells, dk, in_c, D, BLOCK_D, True)
        store_tile(dv_ptr, cells, dv, in_c, D, BLOCK_D, True)


# {(units, D > 64): {BLOCK_C: (BLOCK_T, num_warps)}}: concepts of one tile of concept_kernel, with dq; more take BLOCKS'
# (BLOCK_C, BLOCK_T, num_warps), and row_kernel makes dq. Chosen as in forward.py, row_kernel's ROW_* too. 256 concepts
# in one tile with dq would leave room for 16 tokens (32 take 88 bytes of stack on Triton 3.6), under dropout for none.
ONE_TILE = {
    ("wgmma", False): {16: (64, 4), 32: (64, 4), 64: (64, 4), 128: (64, 8)},
    ("wgmma", True): {16: (32, 4), 32: (32, 4), 64: (32, 8), 128: (32, 8)},
    ("mma", False): {16: (32, 4), 32: (32, 4), 64: (32, 4), 128: (32, 8)},
    ("mma", True): {16: (16, 4), 32: (16, 4), 64: (16, 8)},
    ("fma", False): {},
    ("fma", True): {},
}
ONE_TILE_DROPOUT = {
    **ONE_TILE,
    ("wgmma", False): {16: (64, 4), 32: (64, 4), 64: (32, 4), 128: (64, 8)},
    ("wgmma", True): {16: (32, 4), 32: (32, 4), 64: (32, 8), 128: (16, 8)},
}
BLOCKS = {
    ("wgmma", False): (128, 64, 8),
    ("wgmma", True): (128, 32, 8),
    ("mma", False): (128, 32, 8),
    ("mma", True): (64, 32, 8),
    ("fma", False): (16, 32, 4),
    ("fma", True): (16, 32, 4),
}
ROW_TILES = {
    ("wgmma", False): {16: (64, 4), 32: (64, 4), 64: (64, 4), 128: (128, 8)},
    ("wgmma", True): {16: (64, 4), 32: (64, 4), 64: (64, 4), 128: (128, 8)},
    ("mma", False): {16: (64, 4), 32: (64, 4), 64: (64, 4), 128: (128, 8)},
    ("mma", True): {16: (64, 4), 32: (64, 4), 64: (64, 8)},
    ("fma", False): {},
    ("fma", True): {},
}
ROW_TILES_DROPOUT = {
    **ROW_TILES,
    ("wgmma", False): {16: (64, 4), 32: (64, 4), 64: (64, 4), 128: (128, 8)},
    ("wgmma", True): {16: (64, 4), 32: (64, 4), 64: (64, 4)},
}
ROW_WALK = {
    ("wgmma", False): (32, 128, 8),
    ("wgmma", True): (32, 64, 8),
    ("mma", False): (64, 128, 8),
    ("mma", True): (32, 64, 8),
    ("fma", False): (16, 64, 8),
    ("fma", True): (16, 64, 8),
}


def backward_config(
    num_concepts: int, block_d: int, units: str, dropout: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tile and launch shape of row_kernel and of concept_kernel; exactly one of them makes dq."""
    key = units, block_d > 64
    table = (ONE_TILE_DROPOUT if dropout else ONE_TILE)[key]
    block_c = max(triton.next_power_of_2(num_concepts), 16)
    is_one_tile = block_c in table
    block_c, block_t, num_warps = (block_c, *table[block_c]) if is_one_tile else BLOCKS[key]
    concepts = {
        "BLOCK_C": block_c, "BLOCK_T": block_t, "WITH_DQ": is_one_tile,
        "num_warps": num_warps, "num_stages": NUM_STAGES,
    }  # fmt: skip
    rows = attend_config(num_concepts, block_d, units, dropout, ROW_TILES, ROW_TILES_DROPOUT, ROW_WALK)
    return rows | {"WITH_DQ": not is_one_tile}, concepts


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    scale: float, dropout_p: float, seed: Tensor | None, chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), contiguous. ``chunk`` overrides the length of a chunk, in tokens (tests)."""
    (num_tokens, num_heads, head_dim), (num_sequences, num_concepts, num_kv_heads, _) = q.shape, k.shape
    group, block_d = num_heads // num_kv_heads, max(triton.next_power_of_2(head_dim), 16)
    rows, concepts = backward_config(num_concepts, block_d, matrix_units(q), dropout_p > 0)
    dout = dout if dout.stride(-1) == 1 or head_dim == 1 else dout.contiguous()  # a gradient from sum() is expanded
    lse = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=q.device)
    delta = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=q.device)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    sizes = num_sequences, num_kv_heads, num_concepts
    strides = *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:2]
    scalars = scale, drop_threshold(dropout_p), 1 / (1 - dropout_p)
    constants = {"GROUP": group, "D": head_dim, "BLOCK_D": block_d, "PRECISION": "ieee", "enable_fp_fusion": True}

    def split_for(config: dict[str, Any], programs: int, min_tiles: int) -> Split:
        tile = max(config["BLOCK_T"] // group, 1)
        chosen = choose_chunk(num_tokens, max_seqlen, programs, config["num_warps"], tile, min_tiles)
        return Split(num_tokens, num_sequences, max_seqlen, chosen if chunk is None else chunk)

    split = split_for(rows, num_kv_heads, 1)
    row_kernel[(split.num_slots * num_kv_heads,)](
        q, k, v, cu_seqlens, seed, dout, lse, delta, dq, *sizes, split.chunk, *strides, *scalars,
        SINGLE=split.single, **constants, **rows,
    )  # fmt: skip
    num_programs = triton.cdiv(num_concepts, concepts["BLOCK_C"]) * num_kv_heads
    split = split_for(concepts, num_programs, 4)
    dk_part, dv_part = dk, dv
    if not split.single:
        shape = split.num_slots, num_kv_heads, num_concepts, head_dim
        dk_part = torch.empty(shape, dtype=torch.float32, device=q.device)
        dv_part = torch.empty(shape, dtype=torch.float32, device=q.device)
    concept_kernel[(split.num_slots * num_programs,)](
        q, k, v, cu_seqlens, seed, dout, lse, delta, dq, dk_part, dv_part, *sizes, split.chunk, *strides, *scalars,
        SINGLE=split.single, **constants, **concepts,
    )  # fmt: skip
    if not split.single:
        sum_partials(dk_part, cu_seqlens, dk, split, scale)
        sum_partials(dv_part, cu_seqlens, dv, split, 1.0)
    return dq, dk, dv


def builds() -> list[Build]:
    """Every tile in bfloat16 with its most demanding flags, at D = 64 and 128; float32; narrow heads; the sums."""
    found = []
    for dropout, tables, row_tables in ((False, ONE_TILE, ROW_TILES), (True, ONE_TILE_DROPOUT, ROW_TILES_DROPOUT)):
        for (units, wide), table in tables.items():
            head_dim, walk, blocks = 128 if wide else 64, ROW_WALK[units, wide], BLOCKS[units, wide]
            for block_c, shape in row_tables[units, wide].items():
                found.append(_row_build((block_c, *shape, True), head_dim, units, dropout, False))
            found.append(_row_build((*walk, False), head_dim, units, dropout, True))
            if table.keys() - row_tables[units, wide].keys():
                found.append(_row_build((*walk, False), head_dim, units, dropout, False))
            for block_c, shape in table.items():
                found.append(_concept_build((block_c, *shape), head_dim, units, dropout, True))
            found.append(_concept_build(blocks, head_dim, units, dropout, False))
    found.append(_concept_build((128, 64, 8), 32, "wgmma", True, True))
    return [*found, sum_build("token_attention", "bf16", 64, 1, False)]


def _row_build(shape: tuple[int, int, int, bool], head_dim: int, units: str, dropout: bool, dq: bool) -> Build:
    return attend_build("backward/rows" + "/dq" * dq, row_kernel, shape, head_dim, units, dropout, WITH_DQ=dq)


def _concept_build(shape: tuple[int, int, int], head_dim: int, units: str, dropout: bool, dq: bool) -> Build:
    block_c, block_t, num_warps = shape
    dtype = "fp32" if units == "fma" else "bf16"
    constants = {
        "GROUP": 2, "D": head_dim, "BLOCK_T": block_t, "BLOCK_C": block_c, "BLOCK_D": head_dim,
        "WITH_DQ": dq, "SINGLE": False, "PRECISION": "ieee",
    }  # fmt: skip
    constants |= {} if dropout else {"seed_ptr": None}
    name = f"token_attention/backward/concepts{'/dq' * dq}/{units}/{dtype}/C{block_c}xT{block_t}xD{head_dim}"
    singles = ("lse_ptr", "delta_ptr", "dk_ptr", "dv_ptr")
    name += "/dropout" * dropout
    return split_build(name, concept_kernel, dtype, constants, (num_warps, NUM_STAGES), units, singles)
