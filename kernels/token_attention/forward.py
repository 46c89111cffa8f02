"""Forward of token_attention in Triton. Contract: op.py. Oracle: reference.py.

    s = scale * q k^T        p = exp(s - max_c s) / sum_c exp(s - max_c s)        out = p v

The G query heads that share a key head are rows of one product: row n * G + g is token n under head h' * G + g.
A program owns one chunk of one sequence for one key head and walks its rows in tiles of BLOCK_T. Concepts that fit one
tile are loaded once, before the walk, and the softmax is exact in one step; more are walked in blocks with a running
maximum. Nothing is kept for backward but the inputs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import Build
from ..philox import drop_threshold
from ..splits import Split, choose_chunk, locate, matrix_units, split_build
from ..tiles import attend_block, load_tile, store_tile

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def rows_at(first_row, head, GROUP: tl.constexpr, BLOCK_T: tl.constexpr):
    """(n, h), each [BLOCK_T]: token of the chunk and query head."""
    row = first_row + tl.arange(0, BLOCK_T)
    return row // GROUP, head * GROUP + row % GROUP


@triton.jit
def load_concepts(
    k_ptr, v_ptr, first, num_concepts, k_stride_c, v_stride_c,
    D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(in_c [BLOCK_C], k, v [BLOCK_C, BLOCK_D]) of the concepts from ``first`` on."""
    c = first + tl.arange(0, BLOCK_C)
    in_c = c < num_concepts
    k = load_tile(k_ptr, c.to(tl.int64) * k_stride_c, in_c, D, BLOCK_D, True)
    v = load_tile(v_ptr, c.to(tl.int64) * v_stride_c, in_c, D, BLOCK_D, True)
    return in_c, k, v


@triton.jit
def attend_concepts(
    q, k, v, in_c, k_ptr, v_ptr, num_concepts, k_stride_c, v_stride_c, scale_log2, seed, threshold, b, h, n,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    ONE_TILE: tl.constexpr, EVEN_C: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(m, l, acc) of tiles.attend_block over all concepts, for one tile of rows; k, v, in_c hold them with ONE_TILE."""
    m = tl.full([BLOCK_T], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if ONE_TILE:
        m, l, acc = attend_block(
            q, k, v, m, l, acc, in_c, scale_log2, seed, threshold, b, h, n, 0,
            BLOCK_T, BLOCK_C, True, not EVEN_C, DROPOUT, PRECISION,
        )  # fmt: skip
    else:
        for j in range(0, num_concepts, BLOCK_C):
            in_c, k, v = load_concepts(k_ptr, v_ptr, j, num_concepts, k_stride_c, v_stride_c, D, BLOCK_C, BLOCK_D)
            m, l, acc = attend_block(
                q, k, v, m, l, acc, in_c, scale_log2, seed, threshold, b, h, n, j,
                BLOCK_T, BLOCK_C, False, not EVEN_C, DROPOUT, PRECISION,
            )  # fmt: skip
    return m, l, acc


@triton.jit(do_not_specialize=["num_sequences", "num_concepts", "chunk", "threshold"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, seed_ptr, out_ptr,
    num_sequences, num_kv_heads, num_concepts, chunk,
    q_stride_t, q_stride_h, k_stride_b, k_stride_c, k_stride_h, v_stride_b, v_stride_c, v_stride_h,
    scale, threshold, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    ONE_TILE: tl.constexpr, EVEN_C: tl.constexpr, SINGLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % num_kv_heads
    b, first = locate(pid // num_kv_heads, cu_ptr, num_sequences, chunk, SINGLE)
    start = tl.load(cu_ptr + b)
    length = tl.minimum(tl.load(cu_ptr + b + 1) - start - first, chunk)
    if length > 0:
        token = (start + first).to(tl.int64)
        q_ptr += token * q_stride_t
        out_ptr += token * num_kv_heads * GROUP * D
        k_ptr += b.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
        v_ptr += b.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_h
        seed = tl.load(seed_ptr) if seed_ptr is not None else 0
        # read here with ONE_TILE only
        in_c, k, v = load_concepts(k_ptr, v_ptr, 0, num_concepts, k_stride_c, v_stride_c, D, BLOCK_C, BLOCK_D)
        for i in range(0, length * GROUP, BLOCK_T):
            n, h = rows_at(i, head, GROUP, BLOCK_T)
            in_t = n < length
            q_rows = n.to(tl.int64) * q_stride_t + h.to(tl.int64) * q_stride_h
            q = load_tile(q_ptr, q_rows, in_t, D, BLOCK_D, True)  # [BLOCK_T, BLOCK_D]
            _, l, acc = attend_concepts(
                q, k, v, in_c, k_ptr, v_ptr, num_concepts, k_stride_c, v_stride_c, scale * LOG2E,
                seed, threshold, b, h, first + n,
                D, BLOCK_T, BLOCK_C, BLOCK_D, ONE_TILE, EVEN_C, seed_ptr is not None, PRECISION,
            )  # fmt: skip
            rows = (n.to(tl.int64) * num_kv_heads * GROUP + h) * D  # of [T, H, D]
            store_tile(out_ptr, rows, acc * (keep_scale / l)[:, None], in_t, D, BLOCK_D, True)


# {(units, D > 64): {BLOCK_C: (BLOCK_T, num_warps)}}, the concepts of one tile; more take WALK's (BLOCK_C, BLOCK_T,
# num_warps). Units as splits.matrix_units; chosen from the compile table: the largest tiles that spill nothing. 256 in
# one tile leave no register for a mask.
ONE_TILE = {
    ("wgmma", False): {16: (64, 4), 32: (64, 4), 64: (64, 4), 128: (128, 8), 256: (128, 8)},
    ("wgmma", True): {16: (64, 4), 32: (64, 4), 64: (64, 4), 128: (128, 8)},
    ("mma", False): {16: (64, 4), 32: (64, 4), 64: (64, 4), 128: (128, 8)},
    ("mma", True): {16: (64, 4), 32: (64, 4), 64: (64, 8)},
    ("fma", False): {},
    ("fma", True): {},
}
ONE_TILE_DROPOUT = {
    **ONE_TILE,
    ("wgmma", False): {16: (64, 4), 32: (64, 4), 64: (64, 4)},
    ("wgmma", True): {16: (64, 4), 32: (64, 4), 64: (64, 4)},
}
WALK = {
    ("wgmma", False): (64, 128, 8),
    ("wgmma", True): (32, 128, 8),
    ("mma", False): (64, 128, 8),
    ("mma", True): (32, 128, 8),
    ("fma", False): (32, 64, 8),
    ("fma", True): (16, 64, 8),
}
NUM_STAGES = 2


def attend_config(
    num_concepts: int, block_d: int, units: str, dropout: bool, tiles: dict = ONE_TILE,
    tiles_dropout: dict = ONE_TILE_DROPOUT, walk: dict = WALK,
) -> dict[str, Any]:  # fmt: skip
    """Tile and launch shape of forward_kernel (and, with its own tables, of backward.row_kernel)."""
    key = units, block_d > 64
    table = (tiles_dropout if dropout else tiles)[key]
    block_c = max(triton.next_power_of_2(num_concepts), 16)
    is_one_tile = block_c in table and (block_c < 256 or num_concepts == 256)
    block_c, block_t, num_warps = (block_c, *table[block_c]) if is_one_tile else walk[key]
    return {
        "BLOCK_C": block_c, "BLOCK_T": block_t, "num_warps": num_warps, "num_stages": NUM_STAGES,
        "ONE_TILE": is_one_tile, "EVEN_C": num_concepts % block_c == 0,
    }  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    scale: float, dropout_p: float, seed: Tensor | None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """out [T, H, D]. ``chunk`` overrides the length of a chunk, in tokens (tests)."""
    (num_tokens, num_heads, head_dim), (num_sequences, num_concepts, num_kv_heads, _) = q.shape, k.shape
    group, block_d = num_heads // num_kv_heads, max(triton.next_power_of_2(head_dim), 16)
    config = attend_config(num_concepts, block_d, matrix_units(q), dropout_p > 0)
    if chunk is None:
        tile = max(config["BLOCK_T"] // group, 1)
        chunk = choose_chunk(num_tokens, max_seqlen, num_kv_heads, config["num_warps"], tile, min_tiles=1)
    split = Split(num_tokens, num_sequences, max_seqlen, chunk)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    forward_kernel[(split.num_slots * num_kv_heads,)](
        q, k, v, cu_seqlens, seed, out, num_sequences, num_kv_heads, num_concepts, chunk,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], scale, drop_threshold(dropout_p), 1 / (1 - dropout_p),
        GROUP=group, D=head_dim, BLOCK_D=block_d, SINGLE=split.single, PRECISION="ieee", enable_fp_fusion=True,
        **config,
    )  # fmt: skip
    return out


def builds() -> list[Build]:
    """Every tile in bfloat16 with its most demanding flags, at D = 64 and 128; float32; narrow heads."""
    found = []
    for dropout, tables in ((False, ONE_TILE), (True, ONE_TILE_DROPOUT)):
        for (units, wide), table in tables.items():
            shapes = [(block_c, *shape, True) for block_c, shape in table.items()] + [(*WALK[units, wide], False)]
            head_dim = 128 if wide else 64
            found += [attend_build("forward", forward_kernel, shape, head_dim, units, dropout) for shape in shapes]
    found.append(attend_build("forward", forward_kernel, (128, 128, 8, True), 32, "wgmma", False))
    found.append(attend_build("forward", forward_kernel, (64, 64, 4, True), 16, "mma", False))
    return found


def attend_build(
    kind: str, kernel: Any, shape: tuple[int, int, int, bool], head_dim: int, units: str, dropout: bool, **flags: bool
) -> Build:
    block_c, block_t, num_warps, is_one_tile = shape
    dtype = "fp32" if units == "fma" else "bf16"
    constants = {
        "GROUP": 2, "D": head_dim, "BLOCK_T": block_t, "BLOCK_C": block_c, "BLOCK_D": head_dim,
        "ONE_TILE": is_one_tile, "EVEN_C": block_c == 256, "SINGLE": False, "PRECISION": "ieee", **flags,
    }  # fmt: skip
    constants |= {} if dropout else {"seed_ptr": None}
    name = f"token_attention/{kind}/{units}/{dtype}/C{block_c}{'' if is_one_tile else '+'}xT{block_t}xD{head_dim}"
    name += "/dropout" * dropout
    return split_build(name, kernel, dtype, constants, (num_warps, NUM_STAGES), units, ("lse_ptr", "delta_ptr"))
