"""Backward of bixt_attention in Triton. Contract: op.py. Oracle: reference.py. Chunks as in forward.py.

    p  = exp(scale S - lse)                      over tokens, from the saved log-sum-exp of each concept
    w  = exp(scale S - offset) share             over concepts, from the saved offset and share of each token
    dS = p (dconcept_out token_v^T - delta) + w (concept_v dtoken_out^T - sum_c w concept_v dtoken_out^T)
    dtoken_v  = p^T dconcept_out                 dtoken_qk  = scale dS^T concept_qk        written once
    dconcept_v = w dtoken_out                    dconcept_qk = scale dS token_qk           in registers over the chunk
    delta = rowsum(dconcept_out concept_out)

One pass, seven products, every token read once. Concepts lie on the long side of the tile, so that the gradients of
tokens leave it transposed. Those of concepts, where a sequence has several chunks, are summed from float32 partials in
a fixed order by splits.sum_kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import Build
from ..concept_attention.forward import LOG2E
from ..splits import Split, choose_chunk, locate, sum_partials
from ..tiles import load_tile, store_tile
from .forward import tile_builds, tile_of


@triton.jit(do_not_specialize=["num_sequences", "num_concepts", "chunk"])
def backward_kernel(
    concept_qk_ptr, concept_v_ptr, token_qk_ptr, token_v_ptr, cu_ptr,
    concept_out_ptr, lse_ptr, offset_ptr, share_ptr, dconcept_out_ptr, dtoken_out_ptr,
    dconcept_qk_ptr, dconcept_v_ptr, dtoken_qk_ptr, dtoken_v_ptr,
    num_sequences, num_heads, num_concepts, chunk,
    concept_qk_stride_b, concept_qk_stride_c, concept_qk_stride_h, concept_v_stride_b, concept_v_stride_c,
    concept_v_stride_h, token_qk_stride_t, token_qk_stride_h, token_v_stride_t, token_v_stride_h,
    dconcept_stride_b, dconcept_stride_c, dconcept_stride_h, dtoken_stride_t, dtoken_stride_h,
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
    row = (sequence * num_concepts + c) * num_heads + head  # of [B, C, H, D]
    dqk = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    if length > 0:
        wide_c = c.to(tl.int64)
        concept_qk_ptr += sequence * concept_qk_stride_b + head * concept_qk_stride_h
        concept_v_ptr += sequence * concept_v_stride_b + head * concept_v_stride_h
        dconcept_out_ptr += sequence * dconcept_stride_b + head * dconcept_stride_h
        # concept_qk, concept_v, dconcept [BLOCK_C, BLOCK_D]
        concept_qk = load_tile(concept_qk_ptr, wide_c * concept_qk_stride_c, in_c, D, BLOCK_D, not EVEN_C)
        concept_v = load_tile(concept_v_ptr, wide_c * concept_v_stride_c, in_c, D, BLOCK_D, not EVEN_C)
        dconcept = load_tile(dconcept_out_ptr, wide_c * dconcept_stride_c, in_c, D, BLOCK_D, not EVEN_C)
        out = load_tile(concept_out_ptr, row * D, in_c, D, BLOCK_D, not EVEN_C)
        delta = tl.sum(out.to(tl.float32) * dconcept.to(tl.float32), 1)
        lse = tl.load(lse_ptr + (sequence * num_heads + head) * num_concepts + c, mask=in_c, other=0.0)
        lse_log2 = lse * LOG2E
        token = (start + first).to(tl.int64)
        token_qk_ptr += head * token_qk_stride_h
        token_v_ptr += head * token_v_stride_h
        dtoken_out_ptr += head * dtoken_stride_h
        scale_log2 = scale * LOG2E
        n = tl.arange(0, BLOCK_N)
        wide_n = n.to(tl.int64)  # times a stride it may pass 2^31
        for i in range(0, length, BLOCK_N):
            in_n = n < length - i
            cell = ((token + i) * num_heads + head) * D
            # token_qk, token_v, dtoken [BLOCK_N, BLOCK_D]
            token_qk = load_tile(
                token_qk_ptr + (token + i) * token_qk_stride_t, wide_n * token_qk_stride_t, in_n, D, BLOCK_D, True
            )
            dtoken = load_tile(
                dtoken_out_ptr + (token + i) * dtoken_stride_t, wide_n * dtoken_stride_t, in_n, D, BLOCK_D, True
            )
            s = tl.dot(concept_qk, tl.trans(token_qk), input_precision=PRECISION)  # [BLOCK_C, BLOCK_N]
            row_n = (token + i + n) * num_heads + head  # of [T, H]
            offset = tl.load(offset_ptr + row_n, mask=in_n, other=float("inf"))  # of a token that is not there: w = 0
            share = tl.load(share_ptr + row_n, mask=in_n, other=0.0)
            exponent = s * scale_log2 - offset[None, :]
            if not EVEN_C:
                exponent = tl.where(in_c[:, None], exponent, -float("inf"))
            w = tl.exp2(exponent) * share[None, :]
            dv = tl.dot(w.to(dtoken.dtype), dtoken, dv, input_precision=PRECISION)
            dw = tl.dot(concept_v, tl.trans(dtoken), input_precision=PRECISION)
            ds = w * (dw - tl.sum(w * dw, 0)[None, :])

            token_v = load_tile(
                token_v_ptr + (token + i) * token_v_stride_t, wide_n * token_v_stride_t, in_n, D, BLOCK_D, True
            )
            # but s = 0 and p = exp(-lse), which may be infinite
            p = tl.exp2(tl.where(in_n[None, :], s * scale_log2 - lse_log2[:, None], -float("inf")))
            dtoken_v = tl.dot(tl.trans(dconcept), p.to(dconcept.dtype), input_precision=PRECISION)
            store_tile(dtoken_v_ptr + cell, n * num_heads * D, tl.trans(dtoken_v), in_n, D, BLOCK_D, True)
            dp = tl.dot(dconcept, tl.trans(token_v), input_precision=PRECISION)
            ds = (ds + p * (dp - delta[:, None])).to(token_qk.dtype)
            dtoken_qk = tl.dot(tl.trans(concept_qk), ds, input_precision=PRECISION) * scale
            store_tile(dtoken_qk_ptr + cell, n * num_heads * D, tl.trans(dtoken_qk), in_n, D, BLOCK_D, True)
            dqk = tl.dot(ds, token_qk, dqk, input_precision=PRECISION)
    if SINGLE:  # [B, C, H, D]
        store_tile(dconcept_qk_ptr, row * D, dqk * scale, in_c, D, BLOCK_D, not EVEN_C)
        store_tile(dconcept_v_ptr, row * D, dv, in_c, D, BLOCK_D, not EVEN_C)
    elif length > 0:  # partials [slots, H, C, D]
        row = (slot.to(tl.int64) * num_heads + head) * num_concepts + c
        store_tile(dconcept_qk_ptr, row * D, dqk, in_c, D, BLOCK_D, not EVEN_C)
        store_tile(dconcept_v_ptr, row * D, dv, in_c, D, BLOCK_D, not EVEN_C)


# As forward.TILES, whose comment applies; its keys are the sizes that the fused operator takes.
TILES = {
    ("wgmma", False): {16: (32, 4, 2), 32: (32, 4, 2), 64: (32, 4, 2), 128: (32, 8, 2)},
    ("wgmma", True): {16: (16, 4, 2), 32: (32, 8, 2), 64: (16, 8, 2), 128: (16, 8, 2)},
    ("mma", False): {16: (32, 4, 2), 32: (32, 4, 2), 64: (16, 4, 2), 128: (16, 8, 2)},
    ("mma", True): {16: (32, 4, 2), 32: (16, 4, 2), 64: (16, 8, 2)},
    ("fma", False): {16: (16, 4, 1), 32: (16, 4, 1), 64: (16, 8, 1)},
    ("fma", True): {16: (16, 8, 1)},
}


def backward(
    dconcept_out: Tensor, dtoken_out: Tensor,
    concept_qk: Tensor, concept_v: Tensor, token_qk: Tensor, token_v: Tensor, concept_out: Tensor, lse: Tensor,
    offset: Tensor, share: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the four inputs. ``chunk`` overrides the length of a chunk, in tokens (tests)."""
    (num_sequences, num_concepts, num_heads, head_dim), num_tokens = concept_qk.shape, token_qk.shape[0]
    config = tile_of(TILES, concept_qk)
    if chunk is None:
        chunk = choose_chunk(num_tokens, max_seqlen, num_heads, config["num_warps"], config["BLOCK_N"])
    split = Split(num_tokens, num_sequences, max_seqlen, chunk)
    new = {"dtype": concept_qk.dtype, "device": concept_qk.device}
    dconcept_qk, dconcept_v = (torch.empty(concept_qk.shape, **new) for _ in range(2))
    dtoken_qk, dtoken_v = (torch.empty(token_qk.shape, **new) for _ in range(2))
    part_qk, part_v = dconcept_qk, dconcept_v
    if not split.single:
        parts = 2, split.num_slots, num_heads, num_concepts, head_dim
        part_qk, part_v = torch.empty(parts, dtype=torch.float32, device=concept_qk.device)
    backward_kernel[(split.num_slots * num_heads,)](
        concept_qk, concept_v, token_qk, token_v, cu_seqlens, concept_out, lse, offset, share,
        dconcept_out, dtoken_out, part_qk, part_v, dtoken_qk, dtoken_v,
        num_sequences, num_heads, num_concepts, chunk,
        *concept_qk.stride()[:3], *concept_v.stride()[:3], *token_qk.stride()[:2], *token_v.stride()[:2],
        *dconcept_out.stride()[:3], *dtoken_out.stride()[:2],
        scale,
        D=head_dim, EVEN_C=num_concepts == config["BLOCK_C"], SINGLE=split.single, PRECISION="ieee",
        enable_fp_fusion=True, **config,
    )  # fmt: skip
    if not split.single:
        sum_partials(part_qk, cu_seqlens, dconcept_qk, split, scale)
        sum_partials(part_v, cu_seqlens, dconcept_v, split, 1.0)
    return dconcept_qk, dconcept_v, dtoken_qk, dtoken_v


def builds() -> list[Build]:
    single = "lse_ptr", "offset_ptr", "share_ptr"
    part = *single, "dconcept_qk_ptr", "dconcept_v_ptr"
    return tile_builds("bixt_attention/backward", backward_kernel, TILES, part, single)
