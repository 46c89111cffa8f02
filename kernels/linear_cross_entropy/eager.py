"""The torch backend: a chunk of rows at a time, so that logits exist only for the rows of one chunk.

Per chunk, with P = exp(z - max z) kept unnormalised in the one buffer of the operator:

    total_i = sum_v P_iv,   nll_i = max_i + log total_i - (1 - eps) z_iy - eps mean_v z_iv
    P_iy  -= (1 - eps) total_i
    dX     = diag(g / total) P W  - eps g wbar^T          (wbar = mean_v W_v)
    dW    += P^T diag(g / total) X                         minus, once, eps/V sum_i g_i x_i from every row

so the softmax is never divided by its sum, and the uniform part of the smoothed target never touches [M, V].
"""

import torch
from torch import Tensor

from .budget import chunk_megabytes, chunk_rows
from .products import add_product, product


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    index: Tensor | None,
    bias: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    grads: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll [M] and the gradients of sum_i row_weight_i nll_i: dx [M, d], dweight [V, d], dbias [V], or empty."""
    num_rows, (num_words, width) = targets.shape[0], weight.shape
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    # A GPU multiplies bfloat16 with float32 sums; a CPU is faster and more exact in float32, at [V, d] extra.
    operand = torch.bfloat16 if hidden.is_cuda and hidden.dtype == torch.bfloat16 else exact
    words = weight.to(operand)
    want_x, want_w, want_b = grads
    new = {"dtype": exact, "device": hidden.device}
    nll = torch.empty(num_rows, **new)
    dx = torch.empty((num_rows, width) if want_x else (0, width), **new)
    dweight = torch.zeros((num_words, width) if want_w else (0, width), **new)
    dbias = torch.zeros(num_words if want_b else 0, **new)
    rows = chunk_rows(num_rows, num_words * exact.itemsize, chunk_megabytes(hidden.is_cuda), 8)
    mean_word = weight.mean(0, dtype=exact)
    mean_bias = bias.to(exact).mean() if bias is not None and label_smoothing else 0.0  # the bias may hold -inf
    pull = torch.zeros(width, **new)  # sum_i g_i x_i
    buffer = torch.empty(min(rows, num_rows), num_words, **new)  # the one large tensor, the same memory for every chunk
    for start in range(0, num_rows, rows):
        part = slice(start, min(start + rows, num_rows))
        ignored = targets[part] == ignore_index
        target = targets[part].masked_fill(ignored, 0)[:, None]
        x = (hidden[part] if index is None else hidden[index[part]]).masked_fill(ignored[:, None], 0)
        logits = product(x.to(operand), words.t(), buffer[: x.shape[0]])
        if bias is not None:
            logits += bias
        x = x.to(exact)
        picked = logits.gather(1, target)
        peak = logits.amax(1, keepdim=True)
        total = logits.sub_(peak).exp_().sum(1, keepdim=True)  # logits holds P from here on
        smooth = (1 - label_smoothing) * picked[:, 0] + label_smoothing * (x @ mean_word + mean_bias)
        nll[part] = ((peak + total.log())[:, 0] - smooth).masked_fill_(ignored, 0)
        if not any(grads):
            continue
        gain = row_weight[part].masked_fill(ignored, 0)[:, None]
        scale = gain / total
        logits.scatter_add_(1, target, (label_smoothing - 1) * total)
        mixed = logits.to(operand)
        if want_x:
            dx[part] = torch.addmm(product(mixed, words) * scale, gain, mean_word[None], alpha=-label_smoothing)
        if want_w:
            add_product(dweight, mixed.t(), (scale * x).to(operand))
            pull += x.t() @ gain[:, 0]
        if want_b:
            dbias += logits.t() @ scale[:, 0]
    if want_w:
        dweight -= pull * (label_smoothing / num_words)
    if want_b:
        dbias -= row_weight.masked_fill(targets == ignore_index, 0).sum() * (label_smoothing / num_words)
    return nll, dx, dweight, dbias
