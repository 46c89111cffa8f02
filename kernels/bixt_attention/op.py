"""The door of BiXT attention: the contract, the checks, the choice of backend."""

from typing import Literal

from torch import Tensor

from ..autocast import lower_precision
from ..backend import choose
from ..checks import check_cu_seqlens, check_float, check_like, check_scale, check_size, check_tensor
from . import eager


def bixt_attention(
    concept_qk: Tensor,
    concept_v: Tensor,
    token_qk: Tensor,
    token_v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    backend: Literal["auto", "triton", "torch"] = "auto",
) -> tuple[Tensor, Tensor]:
    """Concepts read tokens and tokens read concepts, through one similarity with two softmaxes.

        S_bhcn              = scale * <concept_qk_bch, token_qk_nh>        n: the tokens of sequence b
        concept_out_bch     = sum_n softmax_n(S)_bhcn token_v_nh
        token_out_nh        = sum_c softmax_c(S)_bhcn concept_v_bch

    Args:
        concept_qk, concept_v: [B, C, H, D], float32, float16 or bfloat16 (float64 with the torch backend); any strides.
        token_qk, token_v: [T, H, D], the tokens of all sequences end to end; dtype and device of ``concept_qk``.
        cu_seqlens: [B+1] int32, sequence b is rows cu_seqlens[b] to cu_seqlens[b+1]. On a GPU its values are checked
            only with CONCEPTRON_CHECK=1, because looking at them stalls the device.
        max_seqlen: Python int, at least the longest sequence.
        scale: positive; None means 1 / sqrt(D).
        backend: "auto" (Triton on CUDA, torch elsewhere), "triton" or "torch".

    Returns:
        (concept_out [B, C, H, D], token_out [T, H, D]) in the dtype of the inputs. A sequence without tokens has
        concept_out 0 and passes no gradient to its concepts. With Triton the same inputs give the same bits every time.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and what came. Backend
            "triton" takes D <= 128 and no float64.

    Fused up to C = 128 (float32: 64, and 16 where D > 64; 64 where D > 64 on GPUs with little shared memory). More
    concepts run in Triton as concept_attention and token_attention, which compute the similarity twice.
    Memory: Triton saves the inputs, concept_out and float32 statistics of the softmaxes, one a concept and two a token
    and head; nothing of size C x N exists. The torch backend holds three [H, N, C] tensors a sequence. Inside autocast
    inputs are cast as for scaled_dot_product_attention.

    Source: Hiller, Ehinger and Drummond 2024, "Perceiving Longer Sequences With Bi-Directional Cross-Attention
    Transformers", arXiv:2402.12138.
    """
    concept_qk, concept_v, token_qk, token_v = lower_precision(concept_qk, concept_v, token_qk, token_v)
    scale = _check(concept_qk, concept_v, token_qk, token_v, cu_seqlens, max_seqlen, scale)
    if choose(backend, token_qk) == "triton":
        from . import library  # not at the top: the torch backend works without triton

        return library.bixt_attention(concept_qk, concept_v, token_qk, token_v, cu_seqlens, max_seqlen, scale)
    return eager.bixt_attention(concept_qk, concept_v, token_qk, token_v, cu_seqlens, max_seqlen, scale)


def _check(
    concept_qk: Tensor,
    concept_v: Tensor,
    token_qk: Tensor,
    token_v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None,
) -> float:
    """Refuses what does not fit; returns the scale."""
    check_tensor("concept_qk", concept_qk, "[B, C, H, D]", 4)
    check_float("concept_qk", concept_qk)
    for name, value, shape, ndim in (
        ("concept_v", concept_v, "[B, C, H, D]", 4),
        ("token_qk", token_qk, "[T, H, D]", 3),
        ("token_v", token_v, "[T, H, D]", 3),
    ):
        check_tensor(name, value, shape, ndim)
        check_like(name, value, "concept_qk", concept_qk)
    B, C, H, D = concept_qk.shape
    for axis, size in (("C", C), ("H", H), ("D", D)):
        if size < 1:
            raise ValueError(f"concept_qk: expected {axis} >= 1, got shape {list(concept_qk.shape)}")
    if concept_v.shape != concept_qk.shape:
        raise ValueError(f"concept_v: expected concept_qk's shape {[B, C, H, D]}, got {list(concept_v.shape)}")
    for axis, got, expected in (("H", token_qk.shape[1], H), ("D", token_qk.shape[2], D)):
        check_size("token_qk", axis, got, expected, "as concept_qk")
    if token_v.shape != token_qk.shape:
        raise ValueError(f"token_v: expected token_qk's shape {list(token_qk.shape)}, got {list(token_v.shape)}")
    check_cu_seqlens(cu_seqlens, max_seqlen, token_qk.shape[0], token_qk.device)
    check_size("cu_seqlens", "its length", cu_seqlens.shape[0], B + 1, "B + 1, with B from concept_qk")
    return check_scale(scale, D)
