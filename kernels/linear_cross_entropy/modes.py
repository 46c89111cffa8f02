"""The Triton backend: which mode runs, and every configuration it ships."""

import torch
from torch import Tensor

from ..build import Build
from . import exponentials, streamed
from . import rows as gathering
from .budget import chunk_megabytes, chunk_rows

ARCHITECTURES = {9: "sm_90", 10: "sm_100"}  # the tables' other entry, sm_80, has the smallest tiles


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weight: Tensor, index: Tensor | None, bias: Tensor | None,
    label_smoothing: float, ignore_index: int, grads: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """nll [M] and the gradients of sum_i row_weight_i nll_i: dx [M, d], dweight [V, d], dbias [V], or empty."""
    num_rows, (num_words, width) = targets.shape[0], weight.shape
    want_x, want_w, want_b = grads
    nll = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    dx = nll.new_empty(num_rows if want_x else 0, width)
    if num_rows == 0:
        return nll, dx, nll.new_zeros(num_words if want_w else 0, width), nll.new_zeros(num_words if want_b else 0)
    bias = None if bias is None else bias.contiguous()
    index = None if index is None else index.contiguous()
    row_weight = row_weight.float().contiguous()
    mean_word = weight.mean(0, dtype=torch.float32) if label_smoothing else None
    rows, pull = gathering.gather_rows(
        hidden, weight, targets.contiguous(), row_weight, index, bias, ignore_index, mean_word,
        want_w and label_smoothing > 0,
    )  # fmt: skip
    uniform = label_smoothing / num_words
    pull = None if pull is None else -uniform * pull
    dweight = nll.new_empty(num_words if want_w else 0, width)
    dbias = nll.new_zeros(num_words if want_b else 0)
    if want_b and label_smoothing:
        dbias.copy_((-uniform * row_weight.sum()).expand_as(dbias))
    wanted = tuple(grad if want else None for grad, want in zip((dx, dweight, dbias), grads, strict=True))
    arch = architecture(hidden.device)
    megabytes = chunk_megabytes(True)
    if not any(grads):
        streamed.statistics(hidden, weight, bias, rows, nll, label_smoothing, arch)
    elif megabytes == 0:
        streamed.gradients(hidden, weight, bias, rows, nll, label_smoothing, mean_word, pull, *wanted, arch)
    else:
        row_bytes = exponentials.row_stride(num_words) * exponentials.stored_dtype(hidden.dtype).itemsize
        chunk = chunk_rows(num_rows, row_bytes, megabytes, exponentials.ROW_MULTIPLE)
        exponentials.gradients(hidden, weight, bias, rows, nll, label_smoothing, chunk, mean_word, pull, *wanted, arch)
    return nll, dx, dweight, dbias


def architecture(device: torch.device) -> str:
    """The key of the configuration tables for a device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "sm_80"
    return ARCHITECTURES.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def builds() -> list[Build]:
    return gathering.builds() + exponentials.builds() + streamed.builds()
