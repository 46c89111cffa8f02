"""Kernels with one fault each, for the compile table to find; and a clean matrix product."""

import triton
import triton.language as tl

from conceptron.kernels.build import Build


@triton.jit
def _product(a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    m, n, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in tl.range(0, K, BLOCK, num_stages=STAGES):
        a = tl.load(a_ptr + m[:, None] * K + (start + k)[None, :])
        b = tl.load(b_ptr + (start + k)[:, None] * BLOCK + n[None, :])
        total = tl.dot(a, b, total)
    tl.store(c_ptr + m[:, None] * BLOCK + n[None, :], total)


@triton.jit
def _held(a_ptr, c_ptr, BLOCK: tl.constexpr):
    """Holds far more than a warp's registers until the end."""
    i, j = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 2)
    tile = tl.load(a_ptr + i[:, None] * BLOCK + j[None, :])
    tl.store(c_ptr + i[:, None] * BLOCK + j[None, :], tile / tl.sum(tile, 0)[None, :] + tl.max(tile, 1)[:, None])


@triton.jit
def _refused(c_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 1, "this one must not compile")
    tl.store(c_ptr, BLOCK)


def product(name: str, stages: int) -> Build:
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "K": "i32"}
    signature |= {"BLOCK": "constexpr", "STAGES": "constexpr"}
    constants = {"BLOCK": 64, "STAGES": stages}
    return Build(f"fabricated/{name}", _product, signature, constants, 4, 1, has_dot=True, divisible=("K",))


def builds() -> list[Build]:
    held = {"a_ptr": "*fp32", "c_ptr": "*fp32", "BLOCK": "constexpr"}
    return [
        product("clean", 2),
        product("shared-memory", 16),
        Build("fabricated/stack", _held, held, {"BLOCK": 128}, 1, 1, has_dot=False),
        Build("fabricated/no-matrix", _held, held, {"BLOCK": 16}, 4, 1, has_dot=True),
        Build("fabricated/refused", _refused, {"c_ptr": "*i32", "BLOCK": "constexpr"}, {"BLOCK": 2}, 4, 1, False),
        Build("fabricated/elsewhere", _refused, {"c_ptr": "*i32", "BLOCK": "constexpr"}, {"BLOCK": 2}, 4, 1, False,
              archs=("sm_80",)),
    ]  # fmt: skip
