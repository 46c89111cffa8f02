"""The learning rate as a pure function of the step, so that it has no state to save."""

import math


def learning_rate(step: int, *, lr: float, warmup_steps: int, total_steps: int, min_lr_ratio: float) -> float:
    """Linear warm-up, then a cosine.

        step < warmup:   lr * (step + 1) / warmup
        afterwards:      lr * (r + (1 - r) * (1 + cos(pi * p)) / 2),  p = (step - warmup) / (total - 1 - warmup)

    Args:
        step: 0 for the first update; the last one is `total_steps - 1` and gets `min_lr_ratio * lr`.
        lr: the highest rate, reached by the last warm-up step.
        min_lr_ratio: r, what is left of `lr` at the end.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return lr * (min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * min(1.0, progress))) / 2)
