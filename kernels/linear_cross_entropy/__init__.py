"""Language-model head and cross entropy in one operator that never holds the [M, V] logits."""

from .op import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
