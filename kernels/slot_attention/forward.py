"""Forward of slot_attention in Triton. Contract: op.py. Oracle: reference.py.

    A = softmax over concepts of scale * q k^T        mass_c = sum_n A_cn        U_c = sum_n (A_cn + eps) v_n
    "mean": out = U / (mass + N eps)                  "sum": out = U / (N / C), without eps

U and mass are plain sums over tokens, so chunks merge by addition. A program owns one chunk of one sequence, one head
and up to BLOCK_C concepts, and walks the chunk in tiles of BLOCK_N tokens. Where one tile holds all concepts, the
softmax is exact inside it: two products, keys and values read once. Where it does not, token_kernel first leaves the
log-sum-exp of every token, [T, H]. With several chunks a sequence, (U, mass) leave in float32 and merge_kernel adds
them in their order.

float16 weights are scaled by 2**13 on their way into the product: eps = 1e-8 and weights near it would vanish.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import Build
from ..concept_attention.forward import LOG2E
from ..splits import REDUCE, locate, slots_of, split_build
from ..tiles import load_tile, store_tile
from .launch import TOKEN_TILES, Launch, one_build, tile_builds, with_eps
from .tokens import normalizer, token_kernel


@triton.jit(do_not_specialize=["num_sequences", "num_concepts", "chunk"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, token_lse_ptr, out_ptr, mass_ptr,
    num_sequences, num_heads, num_concepts, chunk,
    q_stride_b, q_stride_c, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    scale, eps,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    GAIN: tl.constexpr, MEAN: tl.constexpr, ONE_TILE: tl.constexpr, EVEN_C: tl.constexpr, SINGLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(num_concepts, BLOCK_C)
    pid = tl.program_id(0)
    head = ((pid // num_tiles) % num_heads).to(tl.int64)
    slot = pid // num_tiles // num_heads
    b, first = locate(slot, cu_ptr, num_sequences, chunk, SINGLE)
    start = tl.load(cu_ptr + b)
    length = tl.minimum(tl.load(cu_ptr + b + 1) - start - first, chunk)

    c = pid % num_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < num_concepts
    sequence = b.to(tl.int64)
    mass = tl.zeros([BLOCK_C], tl.float32)
    acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    if length > 0:
        q_ptr += sequence * q_stride_b + head * q_stride_h
        q = load_tile(q_ptr, c.to(tl.int64) * q_stride_c, in_c, D, BLOCK_D, not EVEN_C)  # [BLOCK_C, BLOCK_D]
        token = (start + first).to(tl.int64)
        k_ptr += head // GROUP * k_stride_h
        v_ptr += head // GROUP * v_stride_h
        scale_log2 = scale * LOG2E
        n = tl.arange(0, BLOCK_N)
        wide_n = n.to(tl.int64)  # times a stride it may pass 2^31
        for i in range(0, length, BLOCK_N):
            in_n = n < length - i
            # k, v [BLOCK_N, BLOCK_D]
            k = load_tile(k_ptr + (token + i) * k_stride_t, wide_n * k_stride_t, in_n, D, BLOCK_D, True)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_C, BLOCK_N]
            if not EVEN_C:
                s = tl.where(in_c[:, None], s, -float("inf"))
            if ONE_TILE:
                a = tl.exp2(s * scale_log2 - (tl.max(s, 0) * scale_log2)[None, :])
                a *= tl.where(in_n, 1.0 / tl.sum(a, 0), 0.0)[None, :]
            else:  # a token that is not there: lse = +inf, weight 0
                token_lse = tl.load(token_lse_ptr + (token + i + n) * num_heads + head, mask=in_n, other=float("inf"))
                a = tl.exp2(s * scale_log2 - token_lse[None, :])
            mass += tl.sum(a, 1)
            if MEAN:
                a += eps  # of a token that is not there, v = 0
            v = load_tile(v_ptr + (token + i) * v_stride_t, wide_n * v_stride_t, in_n, D, BLOCK_D, True)
            acc = tl.dot((a * GAIN).to(v.dtype), v, acc, input_precision=PRECISION)
    acc *= 1.0 / GAIN
    if SINGLE:  # [B, C, H, D] and [B, H, C]
        share = normalizer(mass, tl.maximum(length, 0), num_concepts, eps, MEAN)
        rows = ((sequence * num_concepts + c) * num_heads + head) * D
        store_tile(out_ptr, rows, acc * share[:, None], in_c, D, BLOCK_D, not EVEN_C)
        tl.store(mass_ptr + (sequence * num_heads + head) * num_concepts + c, mass, mask=in_c)
    elif length > 0:  # partials [slots, H, C, D] and [slots, H, C]
        row = (slot.to(tl.int64) * num_heads + head) * num_concepts + c
        store_tile(out_ptr, row * D, acc, in_c, D, BLOCK_D, not EVEN_C)
        tl.store(mass_ptr + row, mass, mask=in_c)


@triton.jit(do_not_specialize=["num_concepts", "chunk"])
def merge_kernel(
    part_ptr, part_mass_ptr, cu_ptr, out_ptr, mass_ptr,
    num_heads, num_concepts, chunk,
    eps,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Adds the chunks of one sequence, BLOCK_S a step and in their order, for BLOCK_R concepts of one head."""
    num_tiles = tl.cdiv(num_concepts, BLOCK_R)
    pid = tl.program_id(0)
    c = pid % num_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    in_c = c < num_concepts
    head = (pid // num_tiles) % num_heads
    b = (pid // num_tiles // num_heads).to(tl.int64)
    slot, count = slots_of(b, cu_ptr, chunk, False)
    j = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    mass = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for s in range(0, count, BLOCK_S):
        # row [BLOCK_S, BLOCK_R]
        row = ((slot + s + j).to(tl.int64) * num_heads + head)[:, None] * num_concepts + c[None, :]
        there = (s + j < count)[:, None] & in_c[None, :]
        mass += tl.sum(tl.load(part_mass_ptr + row, mask=there, other=0.0), 0)
        mask = there[:, :, None] & (d < D)[None, None, :]
        acc += tl.sum(tl.load(part_ptr + row[:, :, None] * D + d[None, None, :], mask=mask, other=0.0), 0)
    length = tl.load(cu_ptr + b + 1) - tl.load(cu_ptr + b)
    share = normalizer(mass, length, num_concepts, eps, MEAN)
    rows = ((b * num_concepts + c) * num_heads + head) * D
    store_tile(out_ptr, rows, acc * share[:, None], in_c, D, BLOCK_D, True)
    tl.store(mass_ptr + (b * num_heads + head) * num_concepts + c, mass, mask=in_c)


# {(units, D > 64): {BLOCK_C: (BLOCK_N, num_warps, num_stages)}}; units as splits.matrix_units. Chosen from the compile
# table: the largest tiles that spill nothing and leave room for a second stage.
TILES = {
    ("wgmma", False): {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 4, 3), 128: (64, 8, 3), 256: (64, 8, 2)},
    ("wgmma", True): {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 4, 3), 128: (64, 8, 2)},
    ("mma", False): {16: (64, 4, 2), 32: (64, 4, 2), 64: (64, 4, 2), 128: (64, 8, 2)},
    ("mma", True): {16: (64, 4, 2), 32: (64, 4, 2), 64: (32, 4, 2), 128: (32, 8, 2)},
    ("fma", False): {16: (16, 4, 1), 32: (16, 8, 1), 64: (16, 8, 1)},
    ("fma", True): {16: (16, 8, 1), 32: (16, 8, 1)},
}


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, normalize: str, eps: float,
    chunk: int | None = None, max_tile: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, mass). Tests override the tokens of a chunk and the most concepts of a tile."""
    launch = Launch(TILES, q, k, v, cu_seqlens, max_seqlen, scale, normalize, eps, chunk, max_tile)
    num_sequences, num_concepts, num_heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    mass = torch.empty(num_sequences, num_heads, num_concepts, dtype=torch.float32, device=q.device)
    part, part_mass = (out, mass) if launch.split.single else (launch.part(head_dim), launch.part())
    token_lse, _ = launch.token_pass()
    forward_kernel[(launch.split.num_slots * num_heads * launch.num_tiles,)](
        *launch.inputs, token_lse, part, part_mass, *launch.sizes, *launch.strides, *launch.scalars,
        GAIN=8192.0 if q.dtype == torch.float16 else 1.0, SINGLE=launch.split.single, **launch.tile, **launch.constants,
    )  # fmt: skip
    if not launch.split.single:
        merge_kernel[(triton.cdiv(num_concepts, REDUCE["BLOCK_R"]) * num_heads * num_sequences,)](
            part, part_mass, cu_seqlens, out, mass, *launch.sizes[1:], launch.scalars[1],
            D=head_dim, BLOCK_D=launch.constants["BLOCK_D"], MEAN=normalize == "mean", enable_fp_fusion=True, **REDUCE,
        )  # fmt: skip
    return out, mass


def builds() -> list[Build]:
    """Every tile at D = 64 and 128, in bfloat16 or float32, some flags at others; the pass over tokens; the merge."""
    found = tile_builds("slot_attention/forward", forward_kernel, TILES, ("out_ptr", "mass_ptr"), ("mass_ptr",))
    for units, (block_c, *launch) in TOKEN_TILES.items():
        for gradients in (False, True):
            tile, dtype = (block_c, launch[0], 128), "fp32" if units == "fma" else "bf16"
            name = "slot_attention/tokens" + "/gradients" * gradients
            absent = () if gradients else ("out_ptr", "mass_ptr", "dout_ptr", "dmass_ptr", "delta_ptr")
            found.append(one_build(name, token_kernel, units, dtype, tile, launch[1:], ("mass_ptr",), absent=absent))
    constants = {"D": 64, "BLOCK_D": 64, "MEAN": True, "BLOCK_S": REDUCE["BLOCK_S"], "BLOCK_R": REDUCE["BLOCK_R"]}
    launch, single = (REDUCE["num_warps"], REDUCE["num_stages"]), ("part_ptr", "part_mass_ptr", "mass_ptr")
    merge = split_build("slot_attention/merge/bf16/D64", merge_kernel, "bf16", constants, launch, "fma", single, False)
    return [*found, with_eps(merge)]
