"""The torch backend of adaptive layer norm.

Within one sequence ``LN(x) * (1 + scale) + shift`` is torch's own layer norm with weight ``1 + scale`` and bias
``shift``: one pass forward, one backward, and nothing of size [T,d] saved but x. So where the lengths are known without
waiting for a device, long sequences are normalised one by one. Short ones, GPUs and traced graphs expand the modulation
to one row a token instead (a compiler then fuses the expansion).

Half-precision inputs: the gated residual is rounded to x's dtype once, and layer norm computes in float32 inside.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import readable

MIN_MEAN_LENGTH = 24  # below it the calls of one-by-one cost more than expanding (measured on a CPU, d = 256)


def split_lengths(cu_seqlens: Tensor | None, x: Tensor) -> list[int] | None:
    """The sequence lengths of a packed ``x``; None where it is better to expand."""
    if cu_seqlens is None or x.is_cuda or not readable(cu_seqlens):
        return None
    if x.shape[0] < MIN_MEAN_LENGTH * (cu_seqlens.shape[0] - 1) or cu_seqlens.shape[0] == 1:
        return None
    return cu_seqlens.diff().tolist()


def expand(modulation: Tensor, num_tokens: int, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is None:
        return modulation.unsqueeze(1)
    return torch.repeat_interleave(modulation, cu_seqlens.diff(), dim=0, output_size=num_tokens)


def torch_modulate(x: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor | None, eps: float) -> Tensor:
    lengths = split_lengths(cu_seqlens, x)
    if lengths is None:
        shift, weight = (expand(m, x.shape[0], cu_seqlens) for m in (shift, 1 + scale))
        return torch.addcmul(shift, F.layer_norm(x, (x.shape[-1],), eps=eps), weight)
    return torch.cat(normalise(x.split(lengths), shift, scale, eps))


def torch_residual_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    lengths = split_lengths(cu_seqlens, x)
    if lengths is None:
        h = torch.addcmul(x, expand(gate, x.shape[0], cu_seqlens), branch)
        return h, torch_modulate(h, shift, scale, cu_seqlens, eps)
    parts = zip(x.split(lengths), gate.unbind(), branch.split(lengths), strict=True)
    parts = [torch.addcmul(rows, by, added) for rows, by, added in parts]
    return torch.cat(parts), torch.cat(normalise(parts, shift, scale, eps))


def normalise(parts: Sequence[Tensor], shift: Tensor, scale: Tensor, eps: float) -> list[Tensor]:
    """Each sequence's rows, normalised and modulated."""
    each = zip(parts, (1 + scale).unbind(), shift.unbind(), strict=True)
    return [F.layer_norm(rows, rows.shape[-1:], weight, bias, eps) for rows, weight, bias in each]
