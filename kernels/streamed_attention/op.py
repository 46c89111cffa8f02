"""The door of streamed_attention: contract, checks, choice of backend."""

import math
import numbers
from typing import Literal

import torch
from torch import Tensor

from ..autocast import lower_precision
from ..backend import choose
from ..checks import check_cu_seqlens, check_float, check_scale, check_size, check_tensor, readable
from ..tracing import distinct
from . import library
from .arguments import Arguments
from .shared import SharedGradient


def streamed_attention(
    q: Tensor, x: Tensor, w_key: Tensor, w_value: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    *, key_bias: Tensor | None = None, key_norm: Tensor | None = None, eps: float = 1e-6,
    positions: Tensor | None = None, frequencies: Tensor | None = None, temperature: float = 1.0,
    ids: Tensor | None = None, token_norm: Tensor | None = None, token_eps: float = 1e-6,
    scale: float | None = None, chunk: int | None = None, shared: SharedGradient | None = None,
    backend: Literal["auto", "triton", "torch"] = "auto",
) -> Tensor:  # fmt: skip
    """C concepts of every sequence read its tokens, of which nothing is kept for the backward pass but their states.

        k_nh      = turn(RMSNorm(w_key x_n + key_bias)_h * key_norm, position_n)      v_nh = (w_value x_n)_h
        out_bch   = sum_n softmax_n(scale * q_bch . k_nh') v_nh'          n over sequence b, h' = h // (H / Hkv)
        with ids  x_n = RMSNorm(x[ids_n]) * token_norm, so that nothing is kept of a token but its id

    Keys and values are made for a chunk of tokens at a time, read, and made again in the backward pass; what chunks
    give is merged exactly. The same as projecting all tokens and calling concept_attention, within rounding.

    Args:
        q:           [B, C, H, D], or [C, H, D] shared by all sequences (its gradient is then summed over them).
        x:           [T, E] states of packed tokens; with ``ids`` the table [V, E] that they are made of.
        w_key, w_value: [Hkv * D, E]; H is a multiple of Hkv.
        cu_seqlens:  [B+1] int32, where each sequence starts among the tokens; from 0, never decreasing, to T.
        max_seqlen:  the longest sequence, or more, as a Python int: nothing is read back from the device.
        key_bias:    [D], added to every head of the keys; None: nothing.
        key_norm:    [D], the weight of the RMSNorm of every head of the keys, with ``eps``; None: no norm.
        positions:   [T] of any real type, where tokens stand: the pair (k[i], k[i + D/2]) is turned by the angle
                     position * frequencies[i], which is float32; D is even. None: nothing is turned.
        frequencies: [D/2] floating, radians per position.
        temperature: what turned keys are multiplied by.
        ids:         [T] int64, rows of the table; with ``token_norm`` [E] and ``token_eps``.
        scale:       of the scores, positive; 1/sqrt(D) if None.
        chunk:       tokens whose keys exist at one time; None: on a CPU 512, or a quarter of all tokens of narrow keys
                     but 2,048 at most, which stay in its caches, for each of torch's threads (``kernels/threads.py``);
                     on a GPU 16,384, or four for every row of queries, B * C * H / Hkv, if those are more.
        shared:      the one gradient of states that are read more than once. x, and with ids token_norm, are then its
                     ``tensors``; their gradient goes there and nowhere else. Not under torch.compile.
        backend:     "torch" is made of matrix products of torch; "triton" of its products and fused kernels (float32,
                     float16, bfloat16; D <= 128) or an error; "auto" is "triton" on CUDA and "torch" elsewhere.

    Returns:
        out [B, C, H, D] in q's dtype. A sequence without tokens gives 0, and gradients of 0.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Values of cu_seqlens and ids are checked
        on a CPU; on a GPU only with CONCEPTRON_CHECK=1, because that synchronises.

    Dtypes: q's decides (autocast's inside autocast). All others may be wider or narrower, are rounded to it where they
    are multiplied (on the torch backend to float32 at least, but for the projections of bfloat16 on a CPU that has
    units for it), and get gradients in their own dtype; those of weights and of the table are summed in float32
    (float64 for float64), over chunks in the order of the tokens: the same bits every time, on a CPU on any number of
    threads.
    Memory: backward keeps q, x (or the ids), out and lse. While it runs there are keys, values, their gradients and,
    where it is no float32, x of one chunk, on a CPU of one for each thread, which keeps these buffers for its next
    chunk; float32 gradients of the weights; and one gradient of the states.
    Source: the exact merge is that of FlashAttention (Dao et al. 2022, arXiv:2205.14135); making keys and values again
    is gradient checkpointing (Chen et al. 2016, arXiv:1604.06174) by chunks of tokens.
    """
    (q,) = lower_precision(q)
    num_tokens = _check(q, x, w_key, w_value, ids, token_norm)
    _check_keys(q, x, num_tokens, key_bias, key_norm, positions, frequencies)
    check_cu_seqlens(cu_seqlens, max_seqlen, num_tokens, q.device)
    if q.ndim == 4:
        check_size("q", "B", q.shape[0], cu_seqlens.shape[0] - 1, "cu_seqlens has B+1 entries")
    for name, value in (("eps", eps), ("token_eps", token_eps)):
        _check_number(name, value, 0 <= value < 1 if _is_real(value) else False, "0 <= eps < 1")
    is_warm = _is_real(temperature) and 0 < temperature < math.inf
    _check_number("temperature", temperature, is_warm, "a positive, finite number")
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, (int, torch.SymInt)) or chunk < 1):
        raise ValueError(f"chunk: expected a whole number of tokens, at least 1, or None, got {chunk!r}")
    _check_shared(shared, x, ids, token_norm)
    scale = check_scale(scale, q.shape[-1])
    chosen = choose(backend, q)
    if chosen == "triton":
        from ..splits import check_supported  # not at the top: the torch backend works without triton

        check_supported("q", q)
    if shared is not None:
        x, *norms = shared.tensors
        token_norm = norms[0] if norms else None
    tensors = distinct(q, x, w_key, w_value, cu_seqlens, key_bias, key_norm, positions, frequencies, ids, token_norm)
    scalars = max_seqlen, float(temperature), float(token_eps), float(eps), scale, chunk
    return library.streamed_attention(Arguments(*tensors, *scalars), shared, chosen)


def _check(
    q: Tensor, x: Tensor, w_key: Tensor, w_value: Tensor, ids: Tensor | None, token_norm: Tensor | None
) -> int:
    """Refuses what does not fit of the queries, the tokens and the weights; returns T."""
    check_tensor("q", q, "[B, C, H, D] or [C, H, D]", (3, 4))
    check_float("q", q)
    if min(q.shape[-3:]) < 1:
        raise ValueError(f"q: expected at least one concept, head and channel, got shape {list(q.shape)}")
    _check_floating("x", x, "[T, E]" if ids is None else "[V, E], the table of ids", 2, q)
    num_heads, head_dim = q.shape[-2:]
    for name, weight in (("w_key", w_key), ("w_value", w_value)):
        _check_floating(name, weight, "[Hkv * D, E]", 2, q)
        check_size(name, "E", weight.shape[1], x.shape[1], "x's width")
        num_kv_heads, rest = divmod(weight.shape[0], head_dim)
        if rest or num_kv_heads < 1 or num_heads % num_kv_heads:
            heads = f"Hkv * D rows, with D = {head_dim} and Hkv a divisor of q's H = {num_heads}"
            raise ValueError(f"{name}: expected {heads}, got {weight.shape[0]}")
    check_size("w_value", "Hkv * D", w_value.shape[0], w_key.shape[0], "w_key's")
    if (ids is None) != (token_norm is None):
        missing, given = ("ids", "token_norm") if ids is None else ("token_norm", "ids")
        raise ValueError(f"{missing}: expected a tensor with {given}, got None")
    if ids is None:
        return x.shape[0]
    check_tensor("ids", ids, "[T]", 1)
    if ids.dtype != torch.int64:
        raise TypeError(f"ids: expected int64, got {ids.dtype}")
    if ids.device != q.device:
        raise ValueError(f"ids: expected q's device {q.device}, got {ids.device}")
    if readable(ids) and ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < x.shape[0]):
        raise ValueError(f"ids: expected rows of x, 0 to {x.shape[0] - 1}, got {int(ids.min())} to {int(ids.max())}")
    _check_floating("token_norm", token_norm, "[E]", 1, q)
    check_size("token_norm", "E", token_norm.shape[0], x.shape[1], "x's width")
    return ids.shape[0]


def _check_keys(
    q: Tensor, x: Tensor, num_tokens: int, key_bias: Tensor | None, key_norm: Tensor | None,
    positions: Tensor | None, frequencies: Tensor | None,
) -> None:  # fmt: skip
    head_dim = q.shape[-1]
    for name, vector in (("key_bias", key_bias), ("key_norm", key_norm)):
        if vector is not None:
            _check_floating(name, vector, "[D]", 1, q)
            check_size(name, "D", vector.shape[0], head_dim, "q's head width")
    if (positions is None) != (frequencies is None):
        missing, given = ("positions", "frequencies") if positions is None else ("frequencies", "positions")
        raise ValueError(f"{missing}: expected a tensor with {given}, got None")
    if positions is None:
        return
    if head_dim % 2:
        raise ValueError(f"q: expected an even head width D with positions, got {head_dim}")
    check_tensor("positions", positions, "[T]", 1)
    if positions.is_complex() or positions.dtype == torch.bool:
        raise TypeError(f"positions: expected real numbers, got {positions.dtype}")
    if positions.device != q.device:
        raise ValueError(f"positions: expected q's device {q.device}, got {positions.device}")
    check_size("positions", "T", positions.shape[0], num_tokens, "as many as tokens")
    _check_floating("frequencies", frequencies, "[D/2]", 1, q)
    check_size("frequencies", "D/2", frequencies.shape[0], head_dim // 2, "half of q's head width")
    for name, value in (("positions", positions), ("frequencies", frequencies)):
        if value.requires_grad:
            raise ValueError(f"{name}: expected a constant, got a tensor that requires grad")


def _check_floating(name: str, value: object, shape: str, ndim: int, q: Tensor) -> None:
    tensor = check_tensor(name, value, shape, ndim)
    check_float(name, tensor)
    if tensor.device != q.device:
        raise ValueError(f"{name}: expected q's device {q.device}, got {tensor.device}")
    if name != "frequencies" and (tensor.dtype == torch.float64) != (q.dtype == torch.float64):
        raise TypeError(f"{name}: expected float64 where q is, and nowhere else, got {tensor.dtype} with {q.dtype}")


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_number(name: str, value: object, is_fine: bool, expected: str) -> None:
    if not _is_real(value):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not is_fine:
        raise ValueError(f"{name}: expected {expected}, got {value}")


def _check_shared(
    shared: SharedGradient | None, x: Tensor, ids: Tensor | None, token_norm: Tensor | None
) -> None:
    if shared is None:
        return
    if not isinstance(shared, SharedGradient):
        raise TypeError(f"shared: expected a SharedGradient or None, got {type(shared).__name__}")
    if torch.compiler.is_compiling():
        raise ValueError("shared: expected None under torch.compile, which adds the gradients of all reads up itself")
    if not shared.is_of(*((x,) if ids is None else (x, token_norm))):
        raise ValueError("shared: expected the gradient of x, and with ids of x and token_norm, got that of others")
