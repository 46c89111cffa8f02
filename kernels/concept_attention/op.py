"""The door of concept_attention: contract, checks, choice of backend."""

from typing import Literal, overload

from torch import Tensor

from ..autocast import lower_precision
from ..backend import choose
from ..checks import check_cu_seqlens, check_float, check_like, check_scale, check_size, check_tensor
from ..philox import as_seed, check_dropout
from . import eager

Backend = Literal["auto", "triton", "torch"]


@overload
def concept_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    *, scale: float | None = ..., dropout_p: float = ..., seed: int | Tensor | None = ...,
    return_lse: Literal[False] = ..., backend: Backend = ...,
) -> Tensor: ...  # fmt: skip


@overload
def concept_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    *, scale: float | None = ..., dropout_p: float = ..., seed: int | Tensor | None = ...,
    return_lse: Literal[True], backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def concept_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    *, scale: float | None = ..., dropout_p: float = ..., seed: int | Tensor | None = ...,
    return_lse: bool, backend: Backend = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def concept_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    *, scale: float | None = None, dropout_p: float = 0.0, seed: int | Tensor | None = None,
    return_lse: bool = False, backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """C concepts of every sequence read the N tokens of that sequence.

        out[b, c, h] = sum_n softmax_n(scale * q[b, c, h] . k[n, h']) v[n, h']
        lse[b, h, c] = log sum_n exp(scale * q[b, c, h] . k[n, h'])         n over sequence b, h' = h // (H / Hkv)

    Args:
        q:          [B, C, H, D], or [C, H, D] shared by all sequences (its gradient is then summed over them).
        k, v:       [T, Hkv, D] packed tokens, dtype and device of q; H is a multiple of Hkv.
        cu_seqlens: [B+1] int32, where each sequence starts in k and v; from 0, never decreasing, to T.
        max_seqlen: the longest sequence, or more, as a Python int: nothing is read back from the device.
        scale:      of the scores, positive; 1/sqrt(D) if None.
        dropout_p:  probability with which a weight is dropped (the others grow by 1/(1-p)). The mask is Philox of
                    (seed, b, h, c, n), the same on every backend; the torch backend then holds [B, H, C, N].
        seed:       int, int64 tensor of one element on q's device (for CUDA graphs), or None: drawn by torch.
        return_lse: also return the log-sum-exp (natural log, before dropout); it is differentiable.
        backend:    "torch" is SDPA; "triton" the fused kernels (float32, float16, bfloat16; D <= 128) or an error;
                    "auto" is "triton" on CUDA and "torch" elsewhere.

    Returns:
        out [B, C, H, D] in q's dtype, and with return_lse lse [B, H, C] in float32 (float64 for float64 inputs). A
        sequence without tokens gives 0 and -inf, and gradients of 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. The values of cu_seqlens are checked on
        a CPU; on a GPU only with CONCEPTRON_CHECK=1, because that synchronises.

    Autocast: inputs are cast as for torch's scaled_dot_product_attention.
    Memory: backward keeps q, k, v, out and lse. While it runs, Triton adds float32 partial results of C * H * (D + 1)
    elements a chunk, for at most T / chunk + B chunks (kernels/README.md); the torch backend adds scores [B, H, C, N]
    where lse or dropout is wanted.
    Source: cross-attention of Perceiver (Jaegle et al. 2021, arXiv:2103.03206), computed as in FlashAttention
    (Dao et al. 2022, arXiv:2205.14135) with the keys split over programs (Flash-Decoding, Dao et al. 2023).
    """
    q, k, v = lower_precision(q, k, v)
    check_tensor("q", q, "[B, C, H, D] or [C, H, D]", (3, 4))
    check_tensor("k", k, "[T, Hkv, D]", 3)
    check_tensor("v", v, "[T, Hkv, D]", 3)
    check_float("q", q)
    check_like("k", k, "q", q)
    check_like("v", v, "q", q)
    num_heads, head_dim = q.shape[-2:]
    if min(q.shape[-3:]) < 1:
        raise ValueError(f"q: expected at least one concept, head and channel, got shape {list(q.shape)}")
    check_size("k", "D", k.shape[2], head_dim, "q's head width")
    if k.shape[1] < 1 or num_heads % k.shape[1]:
        raise ValueError(f"k: expected Hkv to divide q's H = {num_heads}, got {k.shape[1]}")
    for axis, name in enumerate(("T", "Hkv", "D")):
        check_size("v", name, v.shape[axis], k.shape[axis], "k's")
    check_cu_seqlens(cu_seqlens, max_seqlen, k.shape[0], q.device)
    if q.ndim == 4:
        check_size("q", "B", q.shape[0], cu_seqlens.shape[0] - 1, "cu_seqlens has B+1 entries")
    dropout_p = check_dropout(dropout_p)
    scale = check_scale(scale, head_dim)
    chosen = choose(backend, q)
    seed_tensor = as_seed(seed, q.device) if dropout_p > 0 else None
    if chosen == "triton":
        from . import library

        out, lse = library.concept_attention(q, k, v, cu_seqlens, max_seqlen, scale, dropout_p, seed_tensor)
    else:
        out, lse = eager.concept_attention(q, k, v, cu_seqlens, max_seqlen, scale, dropout_p, seed_tensor, return_lse)
    return (out, lse) if return_lse else out
