"""Directions of vectors and their inner products, in float32 or wider whatever came."""

import torch
from torch import Tensor

SHORTEST = 1e-3


def wide(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


def unit(z: Tensor) -> Tensor:
    """z / sqrt(|z|^2 + SHORTEST^2) along the last axis: norm 1, but 0 for a vector that is 0.

    Concepts have norms around sqrt(d), for which this is the direction to all digits of float32. The gradient of a
    vector that has all but vanished stays below 1 / SHORTEST times the incoming one; dividing by the bare norm would
    let it grow without bound.
    """
    z = wide(z)
    return z * torch.rsqrt(z.square().sum(-1, keepdim=True) + SHORTEST**2)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the type they have, whatever the autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b
