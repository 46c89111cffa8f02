"""The oracle: what linear_cross_entropy means, in eager torch, logits and all."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    reduction: str = "mean",
    divisor: float | Tensor | None = None,
) -> Tensor:
    rows = hidden if index is None else hidden[index]
    logits = F.linear(rows, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_p = torch.log_softmax(logits, dim=1)  # [M, V]
    valid = targets != ignore_index
    picked = log_p.gather(1, targets.where(valid, 0)[:, None])[:, 0]
    nll = -picked  # [M]
    if label_smoothing:
        nll = -(1 - label_smoothing) * picked - label_smoothing * log_p.mean(1)
    share = torch.ones_like(nll) if token_weight is None else token_weight.to(nll.dtype)
    share = share.where(valid, 0)
    losses = nll.where(valid, 0) * share
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum() / (1.0 if divisor is None else divisor)
    total = share.sum()
    return losses.sum() / total.where(total != 0, 1)
