"""Splitting packed sequences over programs: which chunk a program owns, the fixed-order sum of what chunks leave.

A chunk is a run of tokens of one sequence. Its size follows from tensor sizes alone, so that nothing is read back from
the device, the same input gives the same bits on every GPU, and a graph can be replayed with other lengths.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .build import Build
from .tiles import store_tile

FULL_WARPS = 132 * 16  # warps that fill a large part: 132 multiprocessors, 16 warps each
MAX_CHUNK = 4096  # tokens; longer chunks save little traffic for partials and lengthen the last wave
REDUCE = {"BLOCK_S": 8, "BLOCK_R": 8, "num_warps": 4, "num_stages": 2}  # 8 partials in flight hide the latency


class Split:
    """Chunks of ``chunk`` tokens over sequences of at most ``max_seqlen``; how many slots hold them (see locate)."""

    def __init__(self, num_tokens: int, num_sequences: int, max_seqlen: int, chunk: int):
        self.chunk = chunk
        self.single = max_seqlen <= chunk
        self.num_slots = num_sequences if self.single else num_tokens // chunk + num_sequences


def choose_chunk(
    num_tokens: int, max_seqlen: int, programs_per_chunk: int, num_warps: int, block_n: int, min_tiles: int = 4
) -> int:
    """Tokens of a chunk, a multiple of block_n: as many as still fill the GPU, between min_tiles and MAX_CHUNK."""
    chunk = -(-num_tokens * programs_per_chunk * num_warps // FULL_WARPS)
    chunk = max(min_tiles * block_n, min(chunk, MAX_CHUNK))
    return min(-(-chunk // block_n), max(-(-max_seqlen // block_n), 1)) * block_n


ARCHS = {
    "wgmma": ("sm_90", "sm_100", "sm_103"),
    "mma": ("sm_80", "sm_86", "sm_87", "sm_89", "sm_120", "hip"),
    "fma": None,
}


def matrix_units(tensor: Tensor) -> str:
    """Which tile table serves ``tensor``: "fma" for float32, on the ordinary units; "wgmma" on parts with that or
    tcgen05, and 227 KB of shared memory (also in the interpreter); else "mma", within 99 KB.
    """
    if tensor.dtype == torch.float32:
        return "fma"
    if not tensor.is_cuda:
        return "wgmma"
    is_large = torch.version.hip is None and torch.cuda.get_device_capability(tensor.device)[0] in (9, 10, 11)
    return "wgmma" if is_large else "mma"


def check_supported(name: str, tensor: Tensor) -> None:
    """Refuses the dtypes and head widths that the kernels do not take; ``name`` is the argument's at the door."""
    if tensor.dtype == torch.float64:
        raise TypeError(f"{name}: 'triton' takes float32, float16 and bfloat16, got float64; use backend='torch'")
    if tensor.dtype == torch.bfloat16 and not tensor.is_cuda:
        raise TypeError(f"{name}: the interpreter of Triton has wrong bfloat16 products; use float32 or float16 there")
    if tensor.shape[-1] > 128:
        width = tensor.shape[-1]
        raise ValueError(f"{name}: 'triton' takes a head width D up to 128, got {width}; use backend='torch'")


def split_build(
    name: str, kernel: Any, dtype: str, constants: Mapping[str, Any], launch: tuple[int, int], units: str,
    single: Collection[str] = (), has_dot: bool = True,
) -> Build:  # fmt: skip
    """The Build of a kernel over packed sequences: types follow from the names of its arguments.

    Pointers hold ``dtype`` but for those of indices and those named in ``single``, which hold float32.
    """

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument.endswith("_ptr"):
            return "*" + {"cu_ptr": "i32", "seed_ptr": "i64"}.get(argument, "fp32" if argument in single else dtype)
        return "fp32" if argument in ("scale", "keep_scale") else "i32"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    divisible = tuple(argument for argument in signature if "_stride_" in argument)
    return Build(name, kernel, signature, constants, *launch, has_dot and units != "fma", divisible, ARCHS[units])


def sum_build(op: str, dtype: str, head_dim: int, group: int, shared: bool) -> Build:
    constants = {"GROUP": group, "D": head_dim, "BLOCK_D": head_dim, "SINGLE": False, "SHARED": shared}
    constants |= {"BLOCK_S": REDUCE["BLOCK_S"], "BLOCK_R": REDUCE["BLOCK_R"]}
    name = f"{op}/sum/{dtype}/D{head_dim}" + "/shared" * shared
    launch = REDUCE["num_warps"], REDUCE["num_stages"]
    return split_build(name, sum_kernel, dtype, constants, launch, "fma", single=("part_ptr",), has_dot=False)


@triton.jit
def locate(slot, cu_ptr, num_sequences, chunk, SINGLE: tl.constexpr):
    """(b, n): sequence and first token in it of the chunk that owns ``slot``.

    The chunks of sequence b own slots from cu[b] // chunk + b on. Those starts never overlap, so T // chunk + B slots
    serve any lengths, and none has to be known on the host; a slot that no chunk owns comes back with n past its
    sequence's end. With SINGLE every sequence is one chunk and owns slot b.
    """
    if SINGLE:
        b = slot
        n = 0
    else:
        j = tl.arange(0, 256)
        b = -1
        owner = 0
        for i in range(0, num_sequences, 256):
            starts = tl.load(cu_ptr + i + j, mask=i + j < num_sequences, other=0) // chunk + i + j
            before = (i + j < num_sequences) & (starts <= slot)
            b += tl.sum(before.to(tl.int32), 0)
            owner = tl.maximum(owner, tl.max(tl.where(before, starts, 0), 0))
        n = (slot - owner) * chunk
    return b, n


@triton.jit
def slots_of(b, cu_ptr, chunk, SINGLE: tl.constexpr):
    """(first slot, number of slots) of sequence b; with SINGLE an empty sequence counts its one slot too."""
    if SINGLE:
        first = b
        count = 1
    else:
        start = tl.load(cu_ptr + b)
        first = start // chunk + b
        count = tl.cdiv(tl.load(cu_ptr + b + 1) - start, chunk)
    return first, count


@triton.jit(do_not_specialize=["num_slots", "num_rows", "num_columns", "chunk"])
def sum_kernel(
    part_ptr, cu_ptr, out_ptr,
    num_slots, num_heads, num_rows, num_columns, chunk,
    scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    SINGLE: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """A program sums BLOCK_R rows of one head over a sequence's slots (SHARED: over all), BLOCK_S slots a step."""
    num_tiles = tl.cdiv(num_rows, BLOCK_R)
    pid = tl.program_id(0)
    r = pid % num_tiles * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    head = (pid // num_tiles) % num_heads
    b = (pid // num_tiles // num_heads).to(tl.int64)
    if SHARED:
        slot = 0
        count = num_slots
    else:
        slot, count = slots_of(b, cu_ptr, chunk, SINGLE)
    j = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for s in range(0, count, BLOCK_S):
        # row [BLOCK_S, BLOCK_R]
        row = ((slot + s + j).to(tl.int64) * num_heads + head)[:, None] * num_rows + r[None, :]
        there = (s + j < count)[:, None] & (r < num_rows)[None, :]
        mask = there[:, :, None] & (d < D)[None, None, :]
        acc += tl.sum(tl.load(part_ptr + row[:, :, None] * D + d[None, None, :], mask=mask, other=0.0), 0)
    g = r // num_columns if GROUP > 1 else tl.zeros([BLOCK_R], tl.int32)
    row = (r - g * num_columns).to(tl.int64) * num_heads * GROUP + head * GROUP + g
    store_tile(out_ptr + b * num_rows * num_heads * D, row * D, acc * scale, r < num_rows, D, BLOCK_D, True)


def sum_partials(
    part: Tensor, cu_seqlens: Tensor, out: Tensor, split: Split, scale: float, shared: bool = False
) -> None:
    """out [B, C, Hkv * G, D] = scale * the sum over a sequence's slots of part [slots, Hkv, G * C, D], in their order.

    ``shared``: out is [C, Hkv * G, D], summed over all slots; every slot must then hold a value.
    """
    slots, num_heads, num_rows, head_dim = part.shape
    num_sequences = 1 if shared else out.shape[0]
    grid = (triton.cdiv(num_rows, REDUCE["BLOCK_R"]) * num_heads * num_sequences,)
    sum_kernel[grid](
        part, cu_seqlens, out, slots, num_heads, num_rows, out.shape[-3], split.chunk, scale,
        GROUP=out.shape[-2] // num_heads, D=head_dim, BLOCK_D=max(triton.next_power_of_2(head_dim), 16),
        SINGLE=split.single, SHARED=shared, enable_fp_fusion=True, **REDUCE,
    )  # fmt: skip
