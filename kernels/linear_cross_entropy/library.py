"""Registration with torch.library, and the derivative.

Both backends stand behind one opaque operator, so torch.compile sees neither their loops nor the number of chunks, and
one that scatters rows, which a compiler would turn into atomic additions. Autograd stands outside them.
"""

import torch
from torch import Tensor

from ..build import Build
from ..checks import readable
from . import eager

LIBRARY = torch.library.Library("conceptron", "FRAGMENT")
LIBRARY.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor row_weight, Tensor? index, Tensor? bias,"
    " float label_smoothing, int ignore_index, bool grad_hidden, bool grad_weight, bool grad_bias, str backend)"
    " -> (Tensor nll, Tensor dx, Tensor dweight, Tensor dbias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "linear_cross_entropy_scatter(Tensor rows, Tensor index, SymInt num_rows) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
OPS = torch.ops.conceptron


def _run(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weight: Tensor, index: Tensor | None, bias: Tensor | None,
    label_smoothing: float, ignore_index: int, grad_hidden: bool, grad_weight: bool, grad_bias: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """nll [M], and the gradients of sum_i row_weight_i nll_i that are wanted: dx [M, d], dweight [V, d], dbias [V]."""
    _check_values(hidden, weight, targets, index, ignore_index)
    implementation = eager
    if backend == "triton":
        from . import modes as implementation
    # The products choose their own precision, and Triton launches on the current device.
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        return implementation.forward(
            hidden, weight, targets, row_weight, index, bias, label_smoothing, ignore_index,
            (grad_hidden, grad_weight, grad_bias),
        )  # fmt: skip


def _check_values(hidden: Tensor, weight: Tensor, targets: Tensor, index: Tensor | None, ignore_index: int) -> None:
    if readable(targets):
        wrong = ((targets < 0) | (targets >= weight.shape[0])) & (targets != ignore_index)
        _refuse("targets", f"a word in [0, V = {weight.shape[0]}) or ignore_index = {ignore_index}", targets, wrong)
    if index is not None and readable(index):
        wrong = (index < 0) | (index >= hidden.shape[0])
        _refuse("index", f"a row of hidden in [0, T = {hidden.shape[0]})", index, wrong)


def _refuse(name: str, expected: str, values: Tensor, wrong: Tensor) -> None:
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(f"{name}: expected {expected}, got {int(values[at])} at entry {at}")


def _fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weight: Tensor, index: Tensor | None, bias: Tensor | None,
    label_smoothing: float, ignore_index: int, grad_hidden: bool, grad_weight: bool, grad_bias: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    num_rows, (num_words, width) = targets.shape[0], weight.shape
    return (
        row_weight.new_empty(num_rows),
        row_weight.new_empty(num_rows if grad_hidden else 0, width),
        row_weight.new_empty(num_words if grad_weight else 0, width),
        row_weight.new_empty(num_words if grad_bias else 0),
    )


def _scatter(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """[num_rows, d] with row i of ``rows`` added to row index[i], always in the same order."""
    out = rows.new_zeros(num_rows, rows.shape[1])
    if rows.is_cuda and rows.numel():
        # Sorts, where index_add_ would use atomics. unsafe: without it some versions of torch read the range of index
        # back; an index out of range wraps around, and its row is NaN already.
        return torch.ops.aten._index_put_impl_(out, [index], rows, accumulate=True, unsafe=True)
    return out.index_add_(0, index, rows)  # in order; index_put_ would use atomics here


def _fake_scatter(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    return rows.new_empty(num_rows, rows.shape[1])


for _name, _implementation, _shape in (
    ("linear_cross_entropy", _run, _fake),
    ("linear_cross_entropy_scatter", _scatter, _fake_scatter),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"conceptron::{_name}", _shape, lib=LIBRARY)


class LinearCrossEntropy(torch.autograd.Function):
    """sum_i row_weight_i nll_i, or its terms [M] where ``per_row``.

    The inputs are rounded to ``dtype`` inside, so that under autocast their gradients are not.
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, index, row_weight,
        smoothing, ignore, per_row, grad_enabled, dtype, backend,
    ):  # fmt: skip
        ctx.wanted = tuple(grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        ctx.settings = (smoothing, ignore, per_row, dtype, backend, hidden.shape[0])
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        nll, *grads = OPS.linear_cross_entropy(
            hidden.to(dtype), weight.to(dtype), targets, row_weight, index, None if bias is None else bias.to(dtype),
            smoothing, ignore, *((False, False, False) if per_row else ctx.wanted), backend,
        )  # fmt: skip
        losses = nll * row_weight
        if per_row:
            ctx.save_for_backward(index, hidden, weight, bias, targets, row_weight)
            return losses
        ctx.save_for_backward(index, *grads)
        return losses.sum()

    @staticmethod
    def backward(ctx, upstream):
        with torch.no_grad():
            found = LinearCrossEntropy.gradients(ctx, upstream)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            found = [
                None if grad is None else _Final.apply(grad, grad.new_ones((), requires_grad=True)) for grad in found
            ]
        return *found, None, None, None, None, None, None, None, None, None

    @staticmethod
    def gradients(ctx, upstream):
        smoothing, ignore, per_row, dtype, backend, num_rows = ctx.settings
        if per_row:
            index, hidden, weight, bias, targets, row_weight = ctx.saved_tensors
            _, *grads = OPS.linear_cross_entropy(
                hidden.to(dtype), weight.to(dtype), targets, row_weight * upstream, index,
                None if bias is None else bias.to(dtype), smoothing, ignore, *ctx.wanted, backend,
            )  # fmt: skip
            upstream = None
        else:
            index, *grads = ctx.saved_tensors
        if index is not None and ctx.wanted[0]:
            grads[0] = OPS.linear_cross_entropy_scatter(grads[0], index, num_rows)
        return [
            _scaled(grad, upstream, kind) if wanted else None
            for grad, kind, wanted in zip(grads, ctx.dtypes, ctx.wanted, strict=True)
        ]


class _Final(torch.autograd.Function):
    """The identity, whose own derivative is an error: torch would else take ours for constants, and say nothing."""

    @staticmethod
    def forward(ctx, grad, attach):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, upstream):
        raise RuntimeError("linear_cross_entropy: a second derivative was asked for, and there is none")


def _scaled(grad: Tensor, upstream: Tensor | None, dtype: torch.dtype) -> Tensor:
    """grad * upstream, rounded once, without a float32 copy between."""
    if upstream is None:
        return grad.to(dtype)
    return torch.mul(grad, upstream, out=torch.empty_like(grad, dtype=dtype))


def builds() -> list[Build]:
    """Every configuration that the Triton backend ships."""
    from . import modes  # not at the top: the torch backend works without triton

    return modes.builds()
