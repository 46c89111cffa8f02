"""The Triton backend: a chunk of tokens at a time, of which torch makes the products and Triton the rest.

    forward     u, v = w_key x, w_value x  (cuBLAS);  k = heads(u)  (heads.py);  out, lse = concept_attention(q, k, v)
                merged into the running (out, lse) in float32, in the order of the chunks
    backward    the same u, v, k again;  dq, dk, dv = concept_attention's backward under the whole out and lse;
                du = heads'(dk);  dw_key += du^T x,  dw_value += dv^T x  in float32;  dx = du w_key + dv w_value

Where chunks end follows from sizes alone, and the lengths stay on the device.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..build import Build
from ..concept_attention import backward as concept_backward
from ..concept_attention import forward as concept_forward
from ..linear_cross_entropy.products import add_product, product
from ..tiles import load_tile, store_tile
from . import heads, tokens
from .arguments import Arguments, Gradients, chunk_on_gpu

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MERGE_ROWS = 16


@triton.jit(do_not_specialize=["num_rows", "num_concepts"])
def merge_kernel(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr,
    num_rows, num_concepts, num_heads,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds what a chunk gave, part [B, C, H, D] with part_lse [B, H, C], to what those before it gave, in place."""
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)  # [BLOCK_R], rows (b, c, h)
    in_r = r < num_rows
    h, c, b = r % num_heads, r // num_heads % num_concepts, r // num_heads // num_concepts
    cell = (b * num_heads + h) * num_concepts + c
    new = tl.load(part_lse_ptr + cell, mask=in_r, other=-float("inf"))
    is_new = new > -float("inf")  # no token of this sequence was in the chunk: nothing to read, nothing to write
    old = tl.load(lse_ptr + cell, mask=is_new, other=-float("inf"))
    top = tl.where(is_new, tl.maximum(old, new), 0.0)
    old_weight, new_weight = tl.exp2((old - top) * LOG2E), tl.exp2((new - top) * LOG2E)
    total = tl.where(is_new, old_weight + new_weight, 1.0)
    out = load_tile(out_ptr, r * D, is_new, D, BLOCK_D, True)  # [BLOCK_R, BLOCK_D]
    part = load_tile(part_ptr, r * D, is_new, D, BLOCK_D, True)
    out = out * (old_weight / total)[:, None] + part * (new_weight / total)[:, None]
    store_tile(out_ptr, r * D, out, is_new, D, BLOCK_D, True)
    tl.store(lse_ptr + cell, top + tl.log2(total) * LN2, mask=is_new)


class Chunk(NamedTuple):
    """Tokens ``start`` to ``stop``, and where the sequences lie among them."""

    start: int
    stop: int
    cu_seqlens: Tensor  # [B + 1] int32
    longest: int


def chunks(a: Arguments) -> Iterator[Chunk]:
    size = chunk_on_gpu(a)
    if a.num_tokens <= size:
        yield Chunk(0, a.num_tokens, a.cu_seqlens, a.max_seqlen)
        return
    for start in range(0, a.num_tokens, size):
        stop = min(start + size, a.num_tokens)
        yield Chunk(start, stop, (a.cu_seqlens - start).clamp_(0, stop - start), min(a.max_seqlen, stop - start))


class Made(NamedTuple):
    """Of one chunk, in q's dtype."""

    x: Tensor  # [n, E]
    projected: Tensor  # [n, Hkv * D], before bias
    keys: Tensor  # [n, Hkv, D]
    values: Tensor  # [n, Hkv, D]
    tables: tuple[Tensor, Tensor] | None  # cos, sin [n, D/2] float32


def make(a: Arguments, weight: Tensor, chunk: Chunk) -> Made:
    """``weight`` [2 * Hkv * D, E]: those of keys, then those of values, so that x is read once."""
    x = tokens.states(a, chunk.start, chunk.stop)
    both = torch.mm(x, weight.t())
    projected, values = both.chunk(2, dim=1)
    tables, head_dim = None, a.q.shape[-1]
    if a.positions is not None:
        angles = a.positions[chunk.start : chunk.stop, None].float() * a.frequencies.float()
        tables = angles.cos().mul_(a.temperature), angles.sin_().mul_(a.temperature)
    keys = heads.make(projected, a.key_bias, a.key_norm, tables, head_dim, a.eps)
    return Made(x, projected, keys, values.unflatten(1, (-1, head_dim)), tables)


def _prepared(a: Arguments) -> tuple[Tensor, Tensor]:
    """q with a last stride of 1, both weights as one matrix in q's dtype."""
    q = a.q if a.q.stride(-1) == 1 or a.q.shape[-1] == 1 else a.q.contiguous()
    weight = torch.cat((a.w_key.to(q.dtype), a.w_value.to(q.dtype)))
    return q, weight


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """(out [B, C, H, D] in q's dtype, lse [B, H, C] float32)."""
    a = _plain(a)
    q, weight = _prepared(a)
    num_concepts, num_heads, head_dim = q.shape[-3:]
    out = lse = None
    is_one = a.num_tokens <= chunk_on_gpu(a)
    for chunk in chunks(a):
        made = make(a, weight, chunk)
        part, part_lse = concept_forward.forward(
            q, made.keys, made.values, chunk.cu_seqlens, chunk.longest, a.scale, 0.0, None,
            out_dtype=q.dtype if is_one else torch.float32,
        )  # fmt: skip
        if out is None:
            out, lse = part, part_lse
            continue
        num_rows = a.num_sequences * num_concepts * num_heads
        merge_kernel[(triton.cdiv(num_rows, MERGE_ROWS),)](
            out, lse, part, part_lse, num_rows, num_concepts, num_heads, D=head_dim, BLOCK_R=MERGE_ROWS,
            BLOCK_D=max(triton.next_power_of_2(head_dim), 16), num_warps=4, num_stages=1,
        )  # fmt: skip
    return out.to(q.dtype), lse


def backward(dout: Tensor, out: Tensor, lse: Tensor, a: Arguments, dx: Tensor | None) -> Gradients:
    """Gradients; that of the token states, or of the table, is added to ``dx``."""
    a = _plain(a)
    q, weight = _prepared(a)
    w_key, w_value = weight.chunk(2)
    dout = dout if dout.stride(-1) == 1 or dout.shape[-1] == 1 else dout.contiguous()
    dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    dw_key, dw_value = (torch.zeros(w.shape, dtype=torch.float32, device=q.device) for w in (w_key, w_value))
    dbias, dnorm, dtoken_norm = (
        None if x is None else torch.zeros_like(x, dtype=torch.float32) for x in (a.key_bias, a.key_norm, a.token_norm)
    )
    for chunk in chunks(a):
        made = make(a, weight, chunk)
        dq_part, dkeys, dvalues = concept_backward.backward(
            dout, None, q, made.keys, made.values, out, lse, chunk.cu_seqlens, chunk.longest, a.scale, 0.0, None,
            dq_dtype=torch.float32,
        )  # fmt: skip
        dq += dq_part
        du, of_bias, of_norm = heads.backward(
            dkeys, made.projected, a.key_bias, a.key_norm, made.tables, q.shape[-1], a.eps
        )
        dvalues = dvalues.flatten(1)
        if dbias is not None:
            dbias += of_bias
        if dnorm is not None:
            dnorm += of_norm
        add_product(dw_key, du.t(), made.x)
        add_product(dw_value, dvalues.t(), made.x)
        if dx is not None or dtoken_norm is not None:
            part = product(du, w_key)
            add_product(part, dvalues, w_value)
            tokens.add_gradient(a, dx, part, dtoken_norm, chunk.start, chunk.stop)
    return Gradients(dq.to(q.dtype), dw_key, dw_value, dbias, dnorm, dtoken_norm)


def _plain(a: Arguments) -> Arguments:
    """Vectors as the kernels read them, one element after the other."""
    vectors = {name: getattr(a, name) for name in ("key_bias", "key_norm", "cu_seqlens")}
    return a._replace(**{name: x if x is None else x.contiguous() for name, x in vectors.items()})


DIRECT = (  # kernels of concept_attention that write float32 at once where a chunk of tokens is one of theirs too
    "forward/wgmma/bf16/R128xN64xD64", "forward/mma/bf16/R128xN64xD64",
    "backward/one_pass/wgmma/bf16/R128xN64xD64", "backward/one_pass/mma/bf16/R128xN32xD64",
)  # fmt: skip


def builds() -> list[Build]:
    """The heads, the merge, and what of concept_attention's kernels its own table lacks."""
    found = heads.builds()
    for head_dim in (64, 128):
        constants = {"D": head_dim, "BLOCK_R": MERGE_ROWS, "BLOCK_D": head_dim}
        signature = {
            name: "constexpr" if name in constants else "*fp32" if name.endswith("_ptr") else "i32"
            for name in merge_kernel.arg_names
        }
        found.append(Build(f"streamed_attention/merge/D{head_dim}", merge_kernel, signature, constants, 4, 1, False))
    known = {build.name: build for build in concept_forward.builds() + concept_backward.builds()}
    for name in DIRECT:
        build = known[f"concept_attention/{name}"]
        constants = {**build.constants, "SINGLE": True} | ({"SHARED": False} if "SHARED" in build.constants else {})
        found.append(build._replace(name=f"streamed_attention/{name}/float32 at once", constants=constants))
    return found
