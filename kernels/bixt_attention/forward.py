"""Forward of bixt_attention in Triton. Contract: op.py. Oracle: reference.py.

    S = concept_qk token_qk^T, a = scale * log2(e)         one [BLOCK_C, BLOCK_N] tile serves both softmaxes
    concepts: running maximum m, l = sum_n p, acc = sum_n p token_v                     p = exp2(a S - a m)
    tokens:   w = p exp2(a m - offset) share, share = 1 / sum_c, token_out = w^T concept_v    offset = max_c a m

A program owns one head and one chunk of one sequence, holds all its concepts and walks the chunk in tiles of BLOCK_N
tokens: three products and one exponential, tokens read once. With several chunks a sequence, each leaves (out, lse) of
its chunk in float32, and concept_attention's merge_kernel merges them in their order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import Build
from ..concept_attention.forward import LN2, LOG2E, merge_kernel
from ..splits import REDUCE, Split, choose_chunk, locate, matrix_units, split_build
from ..tiles import load_tile, store_tile

SMALL = tl.constexpr(2.0**-100)  # terms that underflow, below 2**-126, are nothing to a sum above it


@triton.jit
def weights_over_concepts(p, top, in_c, in_n):
    """(w [BLOCK_C, BLOCK_N], offset, share [BLOCK_N], smallest sum): softmax of each column of p = exp2(a s - top).

    w = exp2(a s - offset) share is p times a factor of its row: no second exponential, and no maximum of columns, which
    takes three shuffles an element of a thread. A column that lies so far below the others that its sum is below SMALL
    comes out finite and wrong.
    """
    top = tl.where(in_c, top, -float("inf"))
    offset = tl.max(top, 0)
    w = p * tl.exp2(top - offset)[:, None]
    total = tl.where(in_n, tl.sum(w, 0), 1.0)
    share = 1.0 / tl.maximum(total, SMALL)
    return w * share[None, :], offset, share, tl.min(total, 0)


@triton.jit
def read_again(
    concept_qk_ptr, concept_v_ptr, token_qk_ptr, token_out_ptr, offset_ptr, share_ptr,
    c, in_c, token, length, head, num_heads,
    concept_qk_stride_c, concept_v_stride_c, token_qk_stride_t, scale_log2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """token_out of ``length`` tokens from ``token`` on, each with its own maximum as offset: right for any scores.

    The pointers to inputs stand at the sequence and head.
    """
    concept_qk = load_tile(concept_qk_ptr, c.to(tl.int64) * concept_qk_stride_c, in_c, D, BLOCK_D, not EVEN_C)
    concept_v = load_tile(concept_v_ptr, c.to(tl.int64) * concept_v_stride_c, in_c, D, BLOCK_D, not EVEN_C)
    n = tl.arange(0, BLOCK_N)
    wide_n = n.to(tl.int64)  # times a stride it may pass 2^31
    for i in tl.range(0, length, BLOCK_N, num_stages=1):  # too rare to spend registers on
        in_n = n < length - i
        token_qk = load_tile(
            token_qk_ptr + (token + i) * token_qk_stride_t, wide_n * token_qk_stride_t, in_n, D, BLOCK_D, True
        )
        s = tl.dot(concept_qk, tl.trans(token_qk), input_precision=PRECISION) * scale_log2  # [BLOCK_C, BLOCK_N]
        if not EVEN_C:
            s = tl.where(in_c[:, None], s, -float("inf"))
        offset = tl.max(s, 0)
        w = tl.exp2(s - offset[None, :])
        share = 1.0 / tl.sum(w, 0)
        cell = (token + i) * num_heads + head
        tl.store(offset_ptr + cell + n * num_heads, offset, mask=in_n)
        tl.store(share_ptr + cell + n * num_heads, share, mask=in_n)
        w = (w * share[None, :]).to(concept_v.dtype)
        read = tl.dot(tl.trans(concept_v), w, input_precision=PRECISION)  # [BLOCK_D, BLOCK_N]
        store_tile(token_out_ptr + cell * D, n * num_heads * D, tl.trans(read), in_n, D, BLOCK_D, True)


@triton.jit(do_not_specialize=["num_sequences", "num_concepts", "chunk"])
def forward_kernel(
    concept_qk_ptr, concept_v_ptr, token_qk_ptr, token_v_ptr, cu_ptr,
    concept_out_ptr, token_out_ptr, lse_ptr, offset_ptr, share_ptr,
    num_sequences, num_heads, num_concepts, chunk,
    concept_qk_stride_b, concept_qk_stride_c, concept_qk_stride_h, concept_v_stride_b, concept_v_stride_c,
    concept_v_stride_h, token_qk_stride_t, token_qk_stride_h, token_v_stride_t, token_v_stride_h,
    scale,
    D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_C: tl.constexpr, SINGLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head = (pid % num_heads).to(tl.int64)
    slot = pid // num_heads
    b, first = locate(slot, cu_ptr, num_sequences, chunk, SINGLE)
    start = tl.load(cu_ptr + b)
    length = tl.minimum(tl.load(cu_ptr + b + 1) - start - first, chunk)

    c = tl.arange(0, BLOCK_C)
    in_c = c < num_concepts
    sequence = b.to(tl.int64)
    m = tl.full([BLOCK_C], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_C], tl.float32)
    acc = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    lowest = 1.0
    token = (start + first).to(tl.int64)
    if length > 0:
        concept_qk_ptr += sequence * concept_qk_stride_b + head * concept_qk_stride_h
        concept_v_ptr += sequence * concept_v_stride_b + head * concept_v_stride_h
        # concept_qk, concept_v [BLOCK_C, BLOCK_D]
        concept_qk = load_tile(concept_qk_ptr, c.to(tl.int64) * concept_qk_stride_c, in_c, D, BLOCK_D, not EVEN_C)
        concept_v = load_tile(concept_v_ptr, c.to(tl.int64) * concept_v_stride_c, in_c, D, BLOCK_D, not EVEN_C)
        token_qk_ptr += head * token_qk_stride_h
        token_v_ptr += head * token_v_stride_h
        scale_log2 = scale * LOG2E
        n = tl.arange(0, BLOCK_N)
        wide_n = n.to(tl.int64)  # times a stride it may pass 2^31
        for i in range(0, length, BLOCK_N):
            in_n = n < length - i
            # token_qk, token_v [BLOCK_N, BLOCK_D]
            token_qk = load_tile(
                token_qk_ptr + (token + i) * token_qk_stride_t, wide_n * token_qk_stride_t, in_n, D, BLOCK_D, True
            )
            s = tl.dot(concept_qk, tl.trans(token_qk), input_precision=PRECISION)  # [BLOCK_C, BLOCK_N]
            s = tl.where(in_n[None, :], s, -float("inf"))
            new_m = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s * scale_log2 - (new_m * scale_log2)[:, None])
            alpha = tl.exp2((m - new_m) * scale_log2)
            l = l * alpha + tl.sum(p, 1)
            m = new_m
            spread = p.to(concept_v.dtype)
            w, offset, share, smallest = weights_over_concepts(p, m * scale_log2, in_c, in_n)
            lowest = tl.minimum(lowest, smallest)
            cell = (token + i) * num_heads + head
            tl.store(offset_ptr + cell + n * num_heads, tl.zeros([BLOCK_N], tl.float32) + offset, mask=in_n)
            tl.store(share_ptr + cell + n * num_heads, share, mask=in_n)
            read = tl.dot(tl.trans(concept_v), w.to(concept_v.dtype), input_precision=PRECISION)  # [BLOCK_D, BLOCK_N]
            store_tile(token_out_ptr + cell * D, n * num_heads * D, tl.trans(read), in_n, D, BLOCK_D, True)
            token_v = load_tile(
                token_v_ptr + (token + i) * token_v_stride_t, wide_n * token_v_stride_t, in_n, D, BLOCK_D, True
            )
            acc = tl.dot(spread, token_v, acc * alpha[:, None], input_precision=PRECISION)
    # a sequence without tokens: acc = 0, l = 0, and lse = -inf
    safe_l = tl.where(l > 0, l, 1.0)
    out = acc * (1.0 / safe_l)[:, None]
    lse = tl.where(l > 0, m * scale + tl.log2(safe_l) * LN2, -float("inf"))
    if SINGLE:  # [B, C, H, D] and [B, H, C]
        rows = ((sequence * num_concepts + c) * num_heads + head) * D
        store_tile(concept_out_ptr, rows, out, in_c, D, BLOCK_D, not EVEN_C)
        tl.store(lse_ptr + (sequence * num_heads + head) * num_concepts + c, lse, mask=in_c)
    elif length > 0:  # partials [slots, H, C, D] and [slots, H, C]
        row = (slot.to(tl.int64) * num_heads + head) * num_concepts + c
        store_tile(concept_out_ptr, row * D, out, in_c, D, BLOCK_D, not EVEN_C)
        tl.store(lse_ptr + row, lse, mask=in_c)
    if lowest < SMALL:  # some scores lie 69 apart or more: what tokens read is written again
        tl.debug_barrier()
        read_again(
            concept_qk_ptr, concept_v_ptr, token_qk_ptr, token_out_ptr, offset_ptr, share_ptr,
            c, in_c, token, length, head, num_heads,
            concept_qk_stride_c, concept_v_stride_c, token_qk_stride_t, scale * LOG2E,
            D, BLOCK_N, BLOCK_D, EVEN_C, PRECISION,
        )  # fmt: skip


# {(units, D > 64): {BLOCK_C: (BLOCK_N, num_warps, num_stages)}}; units as splits.matrix_units. Chosen from the compile
# table: the largest tiles that spill nothing and leave room for a second stage. More concepts: see library.py.
TILES = {
    ("wgmma", False): {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 4, 3), 128: (64, 8, 2)},
    ("wgmma", True): {16: (64, 4, 3), 32: (64, 4, 3), 64: (32, 4, 3), 128: (32, 8, 3)},
    ("mma", False): {16: (64, 4, 2), 32: (64, 4, 2), 64: (32, 4, 2), 128: (32, 8, 2)},
    ("mma", True): {16: (32, 4, 2), 32: (32, 4, 2), 64: (32, 4, 2)},
    ("fma", False): {16: (16, 4, 1), 32: (16, 4, 1), 64: (16, 8, 1)},
    ("fma", True): {16: (16, 4, 1)},
}


def tile_of(tiles: dict, x: Tensor) -> dict[str, int] | None:
    """The launch for concepts [B, C, H, D] by a table like TILES; None where C exceeds its tiles."""
    num_concepts, head_dim = x.shape[1], x.shape[3]
    block_d = max(triton.next_power_of_2(head_dim), 16)
    block_c = max(triton.next_power_of_2(num_concepts), 16)
    found = tiles[matrix_units(x), block_d > 64].get(block_c)
    if found is None:
        return None
    names = "BLOCK_N", "num_warps", "num_stages"
    return {"BLOCK_C": block_c, "BLOCK_D": block_d, **dict(zip(names, found, strict=True))}


def forward(
    concept_qk: Tensor, concept_v: Tensor, token_qk: Tensor, token_v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    scale: float, chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(concept_out, token_out, lse [B, H, C], offset, share [T, H]): what backward.py makes the weights from.

    ``chunk`` overrides the length of a chunk, in tokens (tests).
    """
    (num_sequences, num_concepts, num_heads, head_dim), num_tokens = concept_qk.shape, token_qk.shape[0]
    config = tile_of(TILES, concept_qk)
    if chunk is None:
        chunk = choose_chunk(num_tokens, max_seqlen, num_heads, config["num_warps"], config["BLOCK_N"])
    split = Split(num_tokens, num_sequences, max_seqlen, chunk)
    single = {"dtype": torch.float32, "device": concept_qk.device}
    concept_out = torch.empty(concept_qk.shape, dtype=concept_qk.dtype, device=concept_qk.device)
    token_out = torch.empty(token_qk.shape, dtype=token_qk.dtype, device=token_qk.device)
    lse = torch.empty(num_sequences, num_heads, num_concepts, **single)
    offset, share = (torch.empty(num_tokens, num_heads, **single) for _ in range(2))
    part, part_lse = concept_out, lse
    if not split.single:
        part_lse = torch.empty(split.num_slots, num_heads, num_concepts, **single)
        part = torch.empty(*part_lse.shape, head_dim, **single)
    forward_kernel[(split.num_slots * num_heads,)](
        concept_qk, concept_v, token_qk, token_v, cu_seqlens, part, token_out, part_lse, offset, share,
        num_sequences, num_heads, num_concepts, chunk,
        *concept_qk.stride()[:3], *concept_v.stride()[:3], *token_qk.stride()[:2], *token_v.stride()[:2],
        scale,
        D=head_dim, EVEN_C=num_concepts == config["BLOCK_C"], SINGLE=split.single, PRECISION="ieee",
        enable_fp_fusion=True, **config,
    )  # fmt: skip
    if not split.single:
        merge_kernel[(triton.cdiv(num_concepts, REDUCE["BLOCK_R"]) * num_heads * num_sequences,)](
            part, part_lse, cu_seqlens, concept_out, lse, num_heads, num_concepts, num_concepts, chunk,
            GROUP=1, D=head_dim, BLOCK_D=config["BLOCK_D"], enable_fp_fusion=True, **REDUCE,
        )  # fmt: skip
    return concept_out, token_out, lse, offset, share


def builds() -> list[Build]:
    """Every tile at D = 64 and 128, in bfloat16 or float32; narrow heads, a tile that C does not fill, one chunk."""
    single = "lse_ptr", "offset_ptr", "share_ptr"
    return tile_builds("bixt_attention/forward", forward_kernel, TILES, (*single, "concept_out_ptr"), single)


def tile_builds(name: str, kernel, tiles: dict, part: tuple[str, ...], single: tuple[str, ...]) -> list[Build]:
    """``part``, ``single``: the pointers that hold float32 with several chunks a sequence and with one."""
    found = []

    def add(units, dtype, head_dim, block_c, launch, even_c=True, one=False):
        constants = {"D": head_dim, "BLOCK_C": block_c, "BLOCK_N": launch[0], "BLOCK_D": head_dim, "PRECISION": "ieee"}
        constants |= {"EVEN_C": even_c, "SINGLE": one}
        label = (
            f"{name}/{units}/{dtype}/C{block_c}xN{launch[0]}xD{head_dim}" + "/ragged" * (not even_c) + "/single" * one
        )
        found.append(split_build(label, kernel, dtype, constants, launch[1:], units, single if one else part))

    for (units, wide), table in tiles.items():
        for block_c, launch in table.items():
            add(units, "fp32" if units == "fma" else "bf16", 128 if wide else 64, block_c, launch)
    add("wgmma", "bf16", 64, 128, tiles["wgmma", False][128], even_c=False, one=True)
    add("mma", "fp16", 64, 128, tiles["mma", False][128], even_c=False, one=True)
    add("wgmma", "fp16", 32, 128, tiles["wgmma", False][128])
    add("mma", "bf16", 16, 64, tiles["mma", False][64], one=True)
    return found
