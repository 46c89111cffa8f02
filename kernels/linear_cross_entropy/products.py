"""Matrix products whose sums are float32 (float64 for float64), whatever the inputs."""

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b."""
    if _wide(a):
        return torch.mm(a, b, out=out)
    if _native(a):
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b."""
    if _wide(a):
        total.addmm_(a, b)
    elif _native(a):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def _wide(a: Tensor) -> bool:
    return a.dtype in (torch.float32, torch.float64)


def _native(a: Tensor) -> bool:
    """True where torch multiplies half precision with a float32 result: CUDA, not ROCm, not the CPU."""
    return a.is_cuda and torch.version.hip is None
