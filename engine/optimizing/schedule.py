"""The learning rate as a pure function of the step, so that it has no state to save."""

import math

from ..recipe.schema import Optim


def learning_rate(step: int, optim: Optim, total_steps: int) -> float:
    """Linear warm-up, then a cosine; or, ``schedule`` "wsd", the highest rate up to the last ``decay`` of the steps.

        step < warmup:   lr * (step + 1) / warmup
        cosine:          lr * (r + (1 - r) * (1 + cos(pi * p)) / 2),  p = (step - warmup) / (total - 1 - warmup)
        wsd:             lr * (r + (1 - r) * (1 - sqrt(p))),  p = (step - first) / (total - 1 - first), 0 before first

    Args:
        step: 0 for the first update; the last one is `total_steps - 1` and gets `min_lr_ratio * lr`.
        optim: lr, the highest rate, reached by the last warm-up step; min_lr_ratio, r, what is left of it at the end.

    Source of "wsd": Hu et al. 2024 (MiniCPM), arXiv:2404.06395; of its root: Haegele et al. 2024, arXiv:2405.18392.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    first = optim.warmup_steps
    if optim.schedule == "wsd":
        first = max(first, math.floor((1 - optim.decay) * total_steps))
    progress = min(1.0, max(0.0, (step - first) / max(1, total_steps - 1 - first)))
    left = 1 - math.sqrt(progress) if optim.schedule == "wsd" else (1 + math.cos(math.pi * progress)) / 2
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * left)
