"""Concepts read token states whose keys and values are made chunk by chunk, and again in the backward pass."""

from .op import streamed_attention
from .shared import SharedGradient

__all__ = ["SharedGradient", "streamed_attention"]
