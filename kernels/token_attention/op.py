"""The door of token_attention: contract, checks, choice of backend."""

from typing import Literal

from torch import Tensor

from ..autocast import lower_precision
from ..backend import choose
from ..checks import check_cu_seqlens, check_float, check_like, check_scale, check_size, check_tensor
from ..philox import as_seed, check_dropout
from . import eager


def token_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    *, scale: float | None = None, dropout_p: float = 0.0, seed: int | Tensor | None = None,
    backend: Literal["auto", "triton", "torch"] = "auto",
) -> Tensor:  # fmt: skip
    """Every token reads the C concepts of its own sequence.

        out[t, h] = sum_c softmax_c(scale * q[t, h] . k[b, c, h']) v[b, c, h']

    for every token t of sequence b, with h' = h // (H / Hkv).

    Args:
        q:          [T, H, D] packed queries.
        k, v:       [B, C, Hkv, D], dtype and device of q; H is a multiple of Hkv.
        cu_seqlens: [B+1] int32, where each sequence starts in q; from 0, never decreasing, to T.
        max_seqlen: the longest sequence, or more, as a Python int: nothing is read back from the device.
        scale:      of the scores, positive; 1/sqrt(D) if None.
        dropout_p:  probability with which a weight is dropped (the others grow by 1/(1-p)). The mask is Philox of
                    (seed, b, h, n, c), the same on every backend; the torch backend then holds [B, H, N, C].
        seed:       int, int64 tensor of one element on q's device (for CUDA graphs), or None: drawn by torch.
        backend:    "torch" is SDPA; "triton" the fused kernels (float32, float16, bfloat16; D <= 128) or an error;
                    "auto" is "triton" on CUDA and "torch" elsewhere.

    Returns:
        out [T, H, D] in q's dtype. The concepts of a sequence without tokens get gradients of 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. The values of cu_seqlens are checked on
        a CPU; on a GPU only with CONCEPTRON_CHECK=1, because that synchronises.

    Autocast: inputs are cast as for torch's scaled_dot_product_attention.
    Memory: backward keeps only q, k and v; while it runs, Triton adds two float32 [T, H] and float32 partial results
    of 2 * C * Hkv * D elements a chunk, for at most T / chunk + B chunks (kernels/README.md).
    Source: the decoder cross-attention of Perceiver IO (Jaegle et al. 2021, arXiv:2107.14795).
    """
    q, k, v = lower_precision(q, k, v)
    check_tensor("q", q, "[T, H, D]", 3)
    check_tensor("k", k, "[B, C, Hkv, D]", 4)
    check_tensor("v", v, "[B, C, Hkv, D]", 4)
    check_float("q", q)
    check_like("k", k, "q", q)
    check_like("v", v, "q", q)
    num_heads, head_dim = q.shape[1:]
    if min(num_heads, head_dim) < 1:
        raise ValueError(f"q: expected at least one head and channel, got shape {list(q.shape)}")
    if k.shape[1] < 1:
        raise ValueError(f"k: expected at least one concept, got shape {list(k.shape)}")
    check_size("k", "D", k.shape[3], head_dim, "q's head width")
    if k.shape[2] < 1 or num_heads % k.shape[2]:
        raise ValueError(f"k: expected Hkv to divide q's H = {num_heads}, got {k.shape[2]}")
    for axis, name in enumerate(("B", "C", "Hkv", "D")):
        check_size("v", name, v.shape[axis], k.shape[axis], "k's")
    check_cu_seqlens(cu_seqlens, max_seqlen, q.shape[0], q.device)
    check_size("k", "B", k.shape[0], cu_seqlens.shape[0] - 1, "cu_seqlens has B+1 entries")
    dropout_p = check_dropout(dropout_p)
    scale = check_scale(scale, head_dim)
    chosen = choose(backend, q)
    seed_tensor = as_seed(seed, q.device) if dropout_p > 0 else None
    if chosen == "triton":
        from . import library

        return library.token_attention(q, k, v, cu_seqlens, max_seqlen, scale, dropout_p, seed_tensor)
    return eager.token_attention(q, k, v, cu_seqlens, max_seqlen, scale, dropout_p, seed_tensor)
