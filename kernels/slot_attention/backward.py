"""Backward of slot_attention in Triton. Contract: op.py. Oracle: reference.py. Chunks and tiles as in forward.py.

    r  = 1 / (mass + N eps)  or  C / N                  what U was multiplied by
    dA = r (dout v^T) - r rowsum(dout out) + dmass      "sum" lacks the middle term
    dv = ((A + eps) r)^T dout                           dS = A (dA - sum_c A dA)
    dk = scale * dS^T q                                 dq = scale * dS k

One pass, five products, nothing saved but the inputs, out and mass. Concepts lie on the long side of the tile: dk and
dv leave it transposed and are written once, dq stays in registers over the chunk. Query heads that share a key head,
and tiles of concepts where there are several, leave a float32 copy of dk and dv each, which are then added. With
several tiles token_kernel first leaves log-sum-exp and sum_c A dA of every token, [T, H] each: seven products in all.

Everything is computed times 2**floor(log2(N / C)), about 1 / r, so that float16 tiles neither vanish nor overflow.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import Build
from ..concept_attention.forward import LOG2E
from ..splits import locate, sum_partials
from ..tiles import load_tile, store_tile
from .launch import Launch, gradient_strides, tile_builds
from .tokens import concept_terms, gain_of


@triton.jit(do_not_specialize=["num_sequences", "num_concepts", "chunk"])
def backward_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, out_ptr, mass_ptr, dout_ptr, dmass_ptr, token_lse_ptr, delta_ptr,
    dq_ptr, dk_ptr, dv_ptr,
    num_sequences, num_heads, num_concepts, chunk,
    q_stride_b, q_stride_c, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    dout_stride_b, dout_stride_c, dout_stride_h, dmass_stride_b, dmass_stride_h, dmass_stride_c,
    scale, eps,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MEAN: tl.constexpr, ONE_TILE: tl.constexpr, EVEN_C: tl.constexpr, SINGLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(num_concepts, BLOCK_C)
    pid = tl.program_id(0)
    tile = pid % num_tiles
    head = ((pid // num_tiles) % num_heads).to(tl.int64)
    slot = pid // num_tiles // num_heads
    b, first = locate(slot, cu_ptr, num_sequences, chunk, SINGLE)
    start = tl.load(cu_ptr + b)
    sequence_length = tl.load(cu_ptr + b + 1) - start
    length = tl.minimum(sequence_length - first, chunk)

    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < num_concepts
    sequence = b.to(tl.int64)
    dq = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    if length > 0:
        gain = gain_of(sequence_length, num_concepts)
        q_ptr += sequence * q_stride_b + head * q_stride_h
        q = load_tile(q_ptr, c.to(tl.int64) * q_stride_c, in_c, D, BLOCK_D, not EVEN_C)  # [BLOCK_C, BLOCK_D]
        if dmass_ptr is not None:
            dmass_ptr += sequence * dmass_stride_b + head * dmass_stride_h
        dout, r, constant = concept_terms(
            out_ptr + (sequence * num_concepts * num_heads + head) * D,
            mass_ptr + (sequence * num_heads + head) * num_concepts,
            dout_ptr + sequence * dout_stride_b + head * dout_stride_h, dmass_ptr,
            c, in_c, num_heads, num_concepts, dout_stride_c, dmass_stride_c, sequence_length, gain, eps,
            D, BLOCK_D, MEAN, EVEN_C,
        )  # fmt: skip
        token = (start + first).to(tl.int64)
        k_ptr += head // GROUP * k_stride_h
        v_ptr += head // GROUP * v_stride_h
        # dk, dv [T, Hkv, GROUP * num_tiles, D]: with one head a group and one tile, the gradients themselves
        copies = GROUP * num_tiles
        d_stride_t = num_heads * num_tiles * D
        d_cell = ((head // GROUP) * copies + head % GROUP * num_tiles + tile) * D
        dk_scale = scale / gain
        dv_scale = 1.0 / gain
        scale_log2 = scale * LOG2E
        n = tl.arange(0, BLOCK_N)
        wide_n = n.to(tl.int64)  # times a stride it may pass 2^31
        for i in range(0, length, BLOCK_N):
            in_n = n < length - i
            # k, v [BLOCK_N, BLOCK_D]
            k = load_tile(k_ptr + (token + i) * k_stride_t, wide_n * k_stride_t, in_n, D, BLOCK_D, True)
            v = load_tile(v_ptr + (token + i) * v_stride_t, wide_n * v_stride_t, in_n, D, BLOCK_D, True)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_C, BLOCK_N]
            if not EVEN_C:
                s = tl.where(in_c[:, None], s, -float("inf"))
            token_cell = (token + i + n) * num_heads + head
            if ONE_TILE:
                a = tl.exp2(s * scale_log2 - (tl.max(s, 0) * scale_log2)[None, :])
                a *= tl.where(in_n, 1.0 / tl.sum(a, 0), 0.0)[None, :]
            else:
                a = tl.exp2(
                    s * scale_log2 - tl.load(token_lse_ptr + token_cell, mask=in_n, other=float("inf"))[None, :]
                )
            w = a
            if MEAN:
                w += eps
            d_token = (token + i) * d_stride_t + d_cell
            # dv, dk [BLOCK_D, BLOCK_N]; columns of tokens that are not there are not stored
            dv = tl.dot(tl.trans(dout), (w * r[:, None]).to(dout.dtype), input_precision=PRECISION) * dv_scale
            store_tile(dv_ptr + d_token, n * d_stride_t, tl.trans(dv), in_n, D, BLOCK_D, True)
            da = tl.dot(dout, tl.trans(v), input_precision=PRECISION) * r[:, None] + constant[:, None]
            delta = tl.sum(a * da, 0) if ONE_TILE else tl.load(delta_ptr + token_cell, mask=in_n, other=0.0)
            ds = (a * (da - delta[None, :])).to(q.dtype)
            dk = tl.dot(tl.trans(q), ds, input_precision=PRECISION) * dk_scale
            store_tile(dk_ptr + d_token, n * d_stride_t, tl.trans(dk), in_n, D, BLOCK_D, True)
            dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        dq *= dk_scale
    if SINGLE:  # [B, C, H, D]
        rows = ((sequence * num_concepts + c) * num_heads + head) * D
        store_tile(dq_ptr, rows, dq, in_c, D, BLOCK_D, not EVEN_C)
    elif length > 0:  # partials [slots, H, C, D]
        row = (slot.to(tl.int64) * num_heads + head) * num_concepts + c
        store_tile(dq_ptr, row * D, dq, in_c, D, BLOCK_D, not EVEN_C)


# As forward.TILES, whose comment applies.
TILES = {
    ("wgmma", False): {16: (32, 4, 2), 32: (32, 4, 2), 64: (32, 4, 2), 128: (64, 8, 2), 256: (16, 8, 2)},
    ("wgmma", True): {16: (32, 4, 2), 32: (32, 4, 2), 64: (32, 8, 2), 128: (32, 8, 2)},
    ("mma", False): {16: (32, 4, 2), 32: (32, 4, 2), 64: (32, 4, 2), 128: (32, 8, 2)},
    ("mma", True): {16: (32, 4, 2), 32: (32, 4, 2), 64: (16, 4, 2)},
    ("fma", False): {16: (16, 4, 1), 32: (16, 8, 1), 64: (16, 8, 1)},
    ("fma", True): {16: (16, 8, 1)},
}


def backward(
    dout: Tensor, dmass: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, mass: Tensor,
    cu_seqlens: Tensor, max_seqlen: int, scale: float, normalize: str, eps: float,
    chunk: int | None = None, max_tile: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv). Tests override the tokens of a chunk and the most concepts of a tile."""
    launch = Launch(TILES, q, k, v, cu_seqlens, max_seqlen, scale, normalize, eps, chunk, max_tile)
    (num_tokens, num_kv_heads, head_dim), num_heads = k.shape, q.shape[2]
    copies = num_heads // num_kv_heads * launch.num_tiles
    kind = {"dtype": k.dtype if copies == 1 else torch.float32, "device": k.device}
    dk, dv = (torch.empty(num_tokens, num_kv_heads, copies, head_dim, **kind) for _ in range(2))
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    part = dq if launch.split.single else launch.part(head_dim)
    gradients = out, mass, dout, dmass
    backward_kernel[(launch.split.num_slots * num_heads * launch.num_tiles,)](
        *launch.inputs, *gradients, *launch.token_pass(gradients), part, dk, dv,
        *launch.sizes, *launch.strides, *gradient_strides(gradients), *launch.scalars,
        SINGLE=launch.split.single, **launch.tile, **launch.constants,
    )  # fmt: skip
    if not launch.split.single:
        sum_partials(part, cu_seqlens, dq, launch.split, 1.0)
    dk, dv = (x.squeeze(2) if copies == 1 else x.sum(2).to(k.dtype) for x in (dk, dv))
    return dq, dk, dv


def builds() -> list[Build]:
    return tile_builds("slot_attention/backward", backward_kernel, TILES, ("mass_ptr", "dq_ptr"), ("mass_ptr",))
