"""Adaptive layer norm: normalise, modulate, and the gated residual in front of it."""

from .op import adaln_modulate, adaln_residual_modulate

__all__ = ["adaln_modulate", "adaln_residual_modulate"]
