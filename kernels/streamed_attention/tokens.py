"""The states of a chunk's tokens, as they are or made of ids, and where their gradient goes."""

import torch
from torch import Tensor

from .arguments import Arguments, exact_dtype


def states(a: Arguments, start: int, stop: int) -> Tensor:
    """[n, E] in q's dtype."""
    if a.ids is None:
        return a.x[start:stop].to(a.q.dtype)
    rows, _ = _normalised(a, start, stop)
    return rows.mul_(a.token_norm.to(rows.dtype)).to(a.q.dtype)


def add_gradient(
    a: Arguments, dx: Tensor | None, part: Tensor, dtoken_norm: Tensor | None, start: int, stop: int
) -> None:
    """Adds that of the states of tokens, ``part`` [n, E], to ``dx`` [T, E]; where there are ids, what it is for their
    rows and for the norm to ``dx`` [V, E], in the order of the tokens, and to ``dtoken_norm``."""
    if a.ids is None:
        dx[start:stop] += part
        return
    z, inverse = _normalised(a, start, stop)
    part = part.to(z.dtype)
    dtoken_norm += (part * z).sum(0)
    if dx is None:
        return
    dz = part * a.token_norm.to(z.dtype)
    dz.addcmul_(z, (dz * z).mean(1, keepdim=True), value=-1).mul_(inverse)
    ids = a.ids[start:stop]
    if dx.is_cuda:  # sorts, where index_add_ would use atomics
        torch.ops.aten._index_put_impl_(dx, [ids], dz.to(dx.dtype), accumulate=True, unsafe=True)
    else:
        dx.index_add_(0, ids, dz.to(dx.dtype))  # in order


def _normalised(a: Arguments, start: int, stop: int) -> tuple[Tensor, Tensor]:
    rows = a.x.index_select(0, a.ids[start:stop]).to(exact_dtype(a.q.dtype))
    inverse = (rows.square().mean(1, keepdim=True) + a.token_eps).rsqrt_()
    return rows.mul_(inverse), inverse
