"""What one shipped kernel configuration is, so that kernels/compile.py can build it without a GPU."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Build(NamedTuple):
    """One kernel at one static configuration. Each op's fused module lists its own in ``builds()``.

    ``signature`` maps every argument of the kernel to a Triton type ("*bf16", "*fp32", "*i32", "i32", "i64", "fp32" or
    "constexpr"); ``constants`` holds the values of those that are "constexpr". Pointers, and the arguments named in
    ``divisible``, are promised to be multiples of 16, as a real launch finds them.
    """

    name: str  # op/kernel/configuration, as printed in the table
    kernel: Any  # the triton.jit function
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    has_dot: bool  # True: at least one MMA instruction must be in the machine code
    divisible: tuple[str, ...] = ()
    archs: tuple[str, ...] | None = None  # None: every architecture
