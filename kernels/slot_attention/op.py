"""The door of slot attention: the contract, the checks, the choice of backend."""

from typing import Literal

from torch import Tensor

from ..autocast import lower_precision
from ..backend import choose
from ..checks import check_cu_seqlens, check_float, check_like, check_scale, check_size, check_tensor
from . import eager

NORMALIZE = ("mean", "sum")


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    normalize: Literal["mean", "sum"] = "mean",
    eps: float = 1e-8,
    backend: Literal["auto", "triton", "torch"] = "auto",
) -> tuple[Tensor, Tensor]:
    """Concepts compete for tokens: the softmax runs over the C concepts, and each reads a weighted mean or sum.

        A_bhcn    = softmax over c of scale * <q_bch, k_ng>       n: the N tokens of sequence b, g = h // (H / Hkv)
        mass_bhc  = sum_n A_bhcn
        "mean":     out_bch = sum_n (A_bhcn + eps) v_ng / sum_n (A_bhcn + eps)
        "sum":      out_bch = sum_n A_bhcn v_ng / (N / C)

    "mean" forgets how much of the text a concept owns, "sum" keeps it.

    Args:
        q: [B, C, H, D], float32, float16 or bfloat16 (float64 with the torch backend); any strides.
        k, v: [T, Hkv, D], the tokens of all sequences end to end; H a multiple of Hkv; dtype and device of ``q``.
        cu_seqlens: [B+1] int32, sequence b is rows cu_seqlens[b] to cu_seqlens[b+1]. On a GPU its values are checked
            only with CONCEPTRON_CHECK=1, because looking at them stalls the device.
        max_seqlen: Python int, at least the longest sequence.
        scale: positive; None means 1 / sqrt(D).
        normalize: "mean" or "sum".
        eps: added to every weight of "mean", 0 <= eps < 1; keeps the mean of a concept that owns nothing defined.
        backend: "auto" (Triton on CUDA, torch elsewhere), "triton" or "torch".

    Returns:
        (out [B, C, H, D] in q's dtype, mass [B, H, C] float32, or float64 for float64 inputs). Both are differentiable.
        The masses of one head and sequence add up to N. A sequence without tokens has out 0 and mass 0 and passes no
        gradient. With Triton the same inputs give the same bits every time.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and what came. Backend
            "triton" takes D <= 128 and no float64.

    Memory: Triton saves the inputs, out and mass; nothing of size C x N exists. Where a tile does not hold all concepts
    (more than 256, fewer for D > 64 or float32) or query heads share a key head, backward also holds a float32 copy of
    the gradients of k and v for each tile and head of the group. The torch backend holds the weights [H, N, C] of
    every sequence. Inside autocast inputs are cast as for scaled_dot_product_attention.

    Source: Locatello et al. 2020, "Object-Centric Learning with Slot Attention", arXiv:2006.15055; the sum follows
    Krimmel, Achterhold and Stueckler 2024, "Attention Normalization Impacts Cardinality Generalization in Slot
    Attention", arXiv:2407.04170.
    """
    q, k, v = lower_precision(q, k, v)
    scale = _check(q, k, v, cu_seqlens, max_seqlen, scale, normalize, eps)
    if choose(backend, k) == "triton":
        from . import library  # not at the top: the torch backend works without triton

        return library.slot_attention(q, k, v, cu_seqlens, max_seqlen, scale, normalize, float(eps))
    return eager.slot_attention(q, k, v, cu_seqlens, max_seqlen, scale, normalize, float(eps))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None,
    normalize: str,
    eps: float,
) -> float:
    """Refuses what does not fit; returns the scale."""
    check_tensor("q", q, "[B, C, H, D]", 4)
    check_float("q", q)
    for name, value in (("k", k), ("v", v)):
        check_tensor(name, value, "[T, Hkv, D]", 3)
        check_like(name, value, "q", q)
    B, C, H, D = q.shape
    for axis, size in (("C", C), ("H", H), ("D", D)):
        if size < 1:
            raise ValueError(f"q: expected {axis} >= 1, got shape {list(q.shape)}")
    num_kv_heads = k.shape[1]
    if num_kv_heads < 1 or H % num_kv_heads:
        raise ValueError(f"k: expected a number of heads that divides q's {H}, got {num_kv_heads}")
    check_size("k", "D", k.shape[2], D, "as q")
    if v.shape != k.shape:
        raise ValueError(f"v: expected k's shape {list(k.shape)}, got {list(v.shape)}")
    check_cu_seqlens(cu_seqlens, max_seqlen, k.shape[0], k.device)
    check_size("cu_seqlens", "its length", cu_seqlens.shape[0], B + 1, "B + 1, with B from q")
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize: expected one of {', '.join(NORMALIZE)}, got {normalize!r}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a float, got {type(eps).__name__}")
    if not 0.0 <= eps < 1.0:
        raise ValueError(f"eps: expected 0 <= eps < 1, got {eps}")
    return check_scale(scale, D)
