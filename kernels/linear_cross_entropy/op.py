"""The door of linear_cross_entropy: contract, checks, choice of backend."""

import math
import numbers
from typing import Literal

import torch
from torch import Tensor

from ..backend import choose
from ..checks import check_float, check_like, check_size, check_tensor, readable
from ..tracing import distinct
from .library import LinearCrossEntropy

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    index: Tensor | None = None,
    token_weight: Tensor | None = None,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    divisor: float | Tensor | None = None,
    backend: Literal["auto", "triton", "torch"] = "auto",
) -> Tensor:
    """Cross entropy of a linear head, without ever holding the [M, V] logits.

        x_i    = hidden[index[i]]                      (hidden[i] without index)
        z_iv   = x_i . weight[v] + bias[v]
        nll_i  = log sum_v exp(z_iv) - (1 - label_smoothing) z_i,targets[i] - label_smoothing mean_v z_iv
        "none" : token_weight_i nll_i                                     [M]
        "sum"  : sum_i token_weight_i nll_i / divisor
        "mean" : sum_i token_weight_i nll_i / sum_i token_weight_i        both over the rows that are not ignored

    Args:
        hidden:          [T, d].
        weight:          [V, d], hidden's dtype; may be tied to an embedding.
        targets:         [M] int64 or int32 in [0, V), or ignore_index: loss 0 and gradient 0, whatever the row holds.
        index:           [M] int64 or int32 in [0, T), the row of hidden that each target belongs to, repeats allowed;
                         None: M = T, row i.
        token_weight:    [M] floating, constant (no gradient); None: 1.
        bias:            [V], hidden's dtype.
        label_smoothing: eps in [0, 1).
        reduction:       see above; "mean" over no weight at all (M = 0, every row ignored) is 0 with gradients of 0.
        divisor:         of "sum" only: a positive number, or a floating 0-d tensor, never read back from a GPU.
        backend:         "torch" works in chunks of rows; "triton" is the fused kernels (float32, float16, bfloat16) or
                         an error; "auto" is "triton" on CUDA and "torch" elsewhere.

    Returns:
        A float32 loss (float64 for float64 inputs), of no dimensions or [M] for "none".

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. The values of targets and index are
        checked on a CPU; on a GPU only with CONCEPTRON_CHECK=1 because that synchronises: without it one out of range
        makes the loss NaN on the Triton backend, which reads nothing out of bounds, and is a device-side assertion of
        torch's on the torch backend.
        RuntimeError: a second derivative is asked for.

    Gradients: "mean" and "sum" compute them in the forward pass, from the logits that are there anyway, and only scale
    them in the backward pass: three matrix products in all. "none" cannot know the upstream gradient of each row; its
    backward pass computes the logits again: four. Where no gradient can be wanted (no_grad) there is one product.
    Sums over V, over M and the gradient of weight are kept in float32 and rounded once, to the inputs' dtype.

    Memory: beside the gradients themselves one chunk of CONCEPTRON_LCE_CHUNK_MB megabytes (256 on a GPU, 64 on a CPU),
    the float32 gradient of weight [V, d] and of the rows [M, d], each only where wanted; for half precision on a CPU
    also a float32 copy of weight. 0 selects the mode of the Triton backend that holds no logits at all, for two
    products more (and more again where d is above 512).

    Autocast: hidden, weight and bias are rounded to the autocast dtype as for torch's linear, the gradients are not.
    Source: the chunks follow Liger (arXiv:2410.10989), the online sums Cut Your Losses (arXiv:2411.09009); label
    smoothing is that of Szegedy et al. 2015 (arXiv:1512.00567).
    """
    dtype = _check_floats(hidden, weight, bias)
    targets = _check_integers("targets", targets, hidden)
    if index is None:
        check_size("targets", "M", targets.shape[0], hidden.shape[0], "hidden has T rows and there is no index")
    else:
        index = _check_integers("index", index, hidden)
        check_size("index", "M", index.shape[0], targets.shape[0], "targets has M entries")
    _check_token_weight(token_weight, targets)
    _check_numbers(label_smoothing, ignore_index)
    _check_reduction(reduction, divisor, hidden)
    chosen = choose(backend, hidden)
    if chosen == "triton" and dtype == torch.float64:
        raise TypeError("hidden: backend 'triton' takes float32, float16 or bfloat16, got float64; use backend='torch'")

    exact = torch.float64 if dtype == torch.float64 else torch.float32
    valid = targets != ignore_index
    row_weight = valid.to(exact) if token_weight is None else token_weight.to(exact).where(valid, 0)
    if reduction == "mean":
        total = row_weight.sum()
        row_weight = row_weight / total.where(total != 0, 1)
    elif divisor is not None:
        row_weight = (row_weight / divisor).to(exact).where(row_weight != 0, 0)  # 0/0: an empty batch has divisor 0
    return LinearCrossEntropy.apply(
        *distinct(hidden, weight, bias, targets, index, row_weight),
        float(label_smoothing), int(ignore_index), reduction == "none", torch.is_grad_enabled(), dtype, chosen,
    )  # fmt: skip


def _check_floats(hidden: object, weight: object, bias: object) -> torch.dtype:
    """The dtype to compute in: the inputs' own, or autocast's."""
    hidden = check_tensor("hidden", hidden, "[T, d]", 2)
    weight = check_tensor("weight", weight, "[V, d]", 2)
    check_float("hidden", hidden)
    device = hidden.device.type
    lowered = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    others = [("weight", weight)]
    if bias is not None:
        bias = check_tensor("bias", bias, "[V]", 1)
        others.append(("bias", bias))
        check_size("bias", "V", bias.shape[0], weight.shape[0], "weight has V rows")
    for name, value in others:
        check_float(name, value)
        if lowered and value.dtype != torch.float64 and value.device == hidden.device:
            continue
        check_like(name, value, "hidden", hidden)
    check_size("weight", "d", weight.shape[1], hidden.shape[1], "hidden's width")
    if min(weight.shape) < 1:
        raise ValueError(f"weight: expected [V, d] with V and d at least 1, got {list(weight.shape)}")
    return torch.get_autocast_dtype(device) if lowered else hidden.dtype


def _check_integers(name: str, value: object, hidden: Tensor) -> Tensor:
    value = check_tensor(name, value, "[M]", 1)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 or int32, got {value.dtype}")
    if value.device != hidden.device:
        raise ValueError(f"{name}: expected hidden's device {hidden.device}, got {value.device}")
    return value.long()


def _check_token_weight(token_weight: object, targets: Tensor) -> None:
    if token_weight is None:
        return
    token_weight = check_tensor("token_weight", token_weight, "[M]", 1)
    check_float("token_weight", token_weight)
    if token_weight.device != targets.device:
        raise ValueError(f"token_weight: expected hidden's device {targets.device}, got {token_weight.device}")
    check_size("token_weight", "M", token_weight.shape[0], targets.shape[0], "targets has M entries")
    if token_weight.requires_grad:
        raise ValueError(
            "token_weight: expected a constant, got a tensor that requires grad; "
            "multiply the result of reduction='none' by it instead"
        )


def _check_numbers(label_smoothing: object, ignore_index: object) -> None:
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, numbers.Real):
        raise TypeError(f"label_smoothing: expected a number, got {type(label_smoothing).__name__}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")


def _check_reduction(reduction: object, divisor: object, hidden: Tensor) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if divisor is None:
        return
    if reduction != "sum":
        raise ValueError(f"divisor: expected reduction='sum' with it, got reduction={reduction!r}")
    if not isinstance(divisor, Tensor):
        if isinstance(divisor, bool) or not isinstance(divisor, numbers.Real):
            raise TypeError(f"divisor: expected a number or a tensor of no dimensions, got {type(divisor).__name__}")
        if not 0 < divisor < math.inf:
            raise ValueError(f"divisor: expected a positive finite number, got {divisor}")
        return
    check_tensor("divisor", divisor, "[] (no dimensions)", 0)
    check_float("divisor", divisor)
    if divisor.requires_grad:
        raise ValueError("divisor: expected a constant, got a tensor that requires grad")
    if divisor.device != hidden.device and divisor.device.type != "cpu":
        raise ValueError(f"divisor: expected hidden's device {hidden.device} or the CPU, got {divisor.device}")
    if readable(divisor) and not 0 <= float(divisor) < math.inf:
        raise ValueError(f"divisor: expected a positive finite number, or 0 for an empty batch, got {float(divisor)}")
