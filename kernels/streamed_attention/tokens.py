"""The states of tokens, as they are or made of ids, and where their gradient goes.

T tokens, n of them, V rows of a table, E width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import Arguments, exact_dtype


class Embedded(NamedTuple):
    """States that are made again wherever they are needed: RMSNorm(table[ids]) * norm."""

    ids: Tensor  # [T] int64
    table: Tensor  # [V, E]
    norm: Tensor  # [E]
    eps: float

    def rows(self, part: slice) -> tuple[Tensor, Tensor]:
        """(normalised rows [n, E] before the norm's weight, 1 / rms [n, 1]), in float32 at least."""
        rows = self.table.index_select(0, self.ids[part]).to(exact_dtype(self.table.dtype))
        inverse = (rows.square().mean(1, keepdim=True) + self.eps).rsqrt_()
        return rows.mul_(inverse), inverse

    def gradient(self, part: slice, dx: Tensor) -> "Rows":
        """What that of the states, ``dx`` [n, E], is for the rows of the table and for the norm."""
        z, inverse = self.rows(part)
        dx = dx.to(z.dtype)
        dnorm = (dx * z).sum(0)
        dz = dx * self.norm.to(z.dtype)
        dz.addcmul_(z, (dz * z).mean(1, keepdim=True), value=-1).mul_(inverse)
        return dz, dnorm

    def add(self, part: slice, of_rows: "Rows", dtable: Tensor | None, dnorm: Tensor) -> None:
        """Adds it, in the order of the tokens."""
        dz, dnorm_of = of_rows
        dnorm += dnorm_of
        if dtable is None:
            return
        ids = self.ids[part]
        if dtable.is_cuda:  # sorts, where index_add_ would use atomics
            torch.ops.aten._index_put_impl_(dtable, [ids], dz.to(dtable.dtype), accumulate=True, unsafe=True)
        else:
            dtable.index_add_(0, ids, dz.to(dtable.dtype))  # in order

    def add_gradient(self, part: slice, dx: Tensor, dtable: Tensor | None, dnorm: Tensor) -> None:
        self.add(part, self.gradient(part, dx), dtable, dnorm)


Rows = tuple[Tensor, Tensor]  # gradients of rows of the table [n, E] and of the norm [E]


def embedded(a: Arguments) -> Embedded:
    return Embedded(a.ids, a.x, a.token_norm, a.token_eps)


def states(a: Arguments, start: int, stop: int) -> Tensor:
    """[n, E] in q's dtype."""
    if a.ids is None:
        return a.x[start:stop].to(a.q.dtype)
    rows, _ = embedded(a).rows(slice(start, stop))
    return rows.mul_(a.token_norm.to(rows.dtype)).to(a.q.dtype)


def add_gradient(
    a: Arguments, dx: Tensor | None, part: Tensor, dtoken_norm: Tensor | None, start: int, stop: int
) -> None:
    """Adds that of the states of tokens, ``part`` [n, E], to ``dx`` [T, E]; where there are ids, what it is for their
    rows and for the norm to ``dx`` [V, E] and to ``dtoken_norm``."""
    if a.ids is None:
        dx[start:stop] += part
    else:
        embedded(a).add_gradient(slice(start, stop), part, dx, dtoken_norm)
