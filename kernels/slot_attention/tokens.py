"""What forward and backward of slot_attention share; the pass over tokens where one tile does not hold all concepts.

token_kernel reads every concept for every token: the online softmax over tiles of concepts gives the log-sum-exp, and
in backward, with the same rescaling, sum_c A dA.
"""

import triton
import triton.language as tl

from ..concept_attention.forward import LOG2E
from ..splits import locate
from ..tiles import load_tile


@triton.jit
def normalizer(mass, length, num_concepts, eps, MEAN: tl.constexpr):
    """1 / (what the sum of v is divided by), 0 where nothing was summed."""
    if MEAN:
        total = mass + eps * length
        share = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    else:
        share = tl.zeros_like(mass) + num_concepts / tl.maximum(length, 1).to(tl.float32)
    return share


@triton.jit
def gain_of(length, num_concepts):
    """A power of two near N / C, at most 2**15."""
    ratio = tl.maximum(length, 1).to(tl.float32) / num_concepts
    return tl.exp2(tl.minimum(tl.floor(tl.log2(ratio)), 15.0))


@triton.jit
def concept_terms(
    out_ptr, mass_ptr, dout_ptr, dmass_ptr,
    c, in_c, num_heads, num_concepts, dout_stride_c, dmass_stride_c, length, gain, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MEAN: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """(dout [BLOCK_C, BLOCK_D], r [BLOCK_C], the terms of dA that do not depend on the token [BLOCK_C]), times gain.

    Pointers stand at the sequence and head; dout of rows past C is 0.
    """
    dout = load_tile(dout_ptr, c.to(tl.int64) * dout_stride_c, in_c, D, BLOCK_D, not EVEN_C)
    mass = tl.load(mass_ptr + c, mask=in_c, other=0.0)
    r = normalizer(mass, length, num_concepts, eps, MEAN) * gain
    constant = tl.zeros_like(r)
    if dmass_ptr is not None:
        constant += tl.load(dmass_ptr + c.to(tl.int64) * dmass_stride_c, mask=in_c, other=0.0) * gain
    if MEAN:
        out = load_tile(out_ptr, c.to(tl.int64) * num_heads * D, in_c, D, BLOCK_D, not EVEN_C)
        constant -= tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1) * r
    return dout, r, constant


@triton.jit(do_not_specialize=["num_sequences", "num_concepts", "chunk"])
def token_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, out_ptr, mass_ptr, dout_ptr, dmass_ptr, token_lse_ptr, delta_ptr,
    num_sequences, num_heads, num_concepts, chunk,
    q_stride_b, q_stride_c, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    dout_stride_b, dout_stride_c, dout_stride_h, dmass_stride_b, dmass_stride_h, dmass_stride_c,
    scale, eps,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MEAN: tl.constexpr, EVEN_C: tl.constexpr, SINGLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per token and head, over all tiles of concepts: log2 sum_c exp2, and, given ``delta_ptr``, sum_c A dA."""
    pid = tl.program_id(0)
    head = (pid % num_heads).to(tl.int64)
    b, first = locate(pid // num_heads, cu_ptr, num_sequences, chunk, SINGLE)
    start = tl.load(cu_ptr + b)
    sequence_length = tl.load(cu_ptr + b + 1) - start
    length = tl.minimum(sequence_length - first, chunk)
    if length > 0:
        sequence = b.to(tl.int64)
        token = (start + first).to(tl.int64)
        q_ptr += sequence * q_stride_b + head * q_stride_h
        k_ptr += head // GROUP * k_stride_h
        v_ptr += head // GROUP * v_stride_h
        if delta_ptr is not None:
            gain = gain_of(sequence_length, num_concepts)
            out_ptr += (sequence * num_concepts * num_heads + head) * D
            mass_ptr += (sequence * num_heads + head) * num_concepts
            dout_ptr += sequence * dout_stride_b + head * dout_stride_h
            if dmass_ptr is not None:
                dmass_ptr += sequence * dmass_stride_b + head * dmass_stride_h
        scale_log2 = scale * LOG2E
        n = tl.arange(0, BLOCK_N)
        wide_n = n.to(tl.int64)  # times a stride it may pass 2^31
        for i in range(0, length, BLOCK_N):
            in_n = n < length - i
            # k, v [BLOCK_N, BLOCK_D]
            k = load_tile(k_ptr + (token + i) * k_stride_t, wide_n * k_stride_t, in_n, D, BLOCK_D, True)
            if delta_ptr is not None:
                v = load_tile(v_ptr + (token + i) * v_stride_t, wide_n * v_stride_t, in_n, D, BLOCK_D, True)
            m = tl.full([BLOCK_N], -float("inf"), tl.float32)
            l = tl.zeros([BLOCK_N], tl.float32)
            delta = tl.zeros([BLOCK_N], tl.float32)
            for j in range(0, num_concepts, BLOCK_C):
                c = j + tl.arange(0, BLOCK_C)
                in_c = c < num_concepts
                q = load_tile(q_ptr, c.to(tl.int64) * q_stride_c, in_c, D, BLOCK_D, not EVEN_C)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_C, BLOCK_N]
                if not EVEN_C:
                    s = tl.where(in_c[:, None], s, -float("inf"))
                new_m = tl.maximum(m, tl.max(s, 0))
                w = tl.exp2(s * scale_log2 - (new_m * scale_log2)[None, :])
                alpha = tl.exp2((m - new_m) * scale_log2)
                l = l * alpha + tl.sum(w, 0)
                m = new_m
                if delta_ptr is not None:
                    dout, r, constant = concept_terms(
                        out_ptr, mass_ptr, dout_ptr, dmass_ptr, c, in_c, num_heads, num_concepts, dout_stride_c,
                        dmass_stride_c, sequence_length, gain, eps, D, BLOCK_D, MEAN, EVEN_C,
                    )  # fmt: skip
                    da = tl.dot(dout, tl.trans(v), input_precision=PRECISION) * r[:, None] + constant[:, None]
                    delta = delta * alpha + tl.sum(w * da, 0)
            cell = (token + i + n) * num_heads + head
            tl.store(token_lse_ptr + cell, m * scale_log2 + tl.log2(l), mask=in_n)
            if delta_ptr is not None:
                tl.store(delta_ptr + cell, delta / l, mask=in_n)
