"""BiXT attention: concepts read tokens and tokens read concepts through one similarity."""

from .op import bixt_attention

__all__ = ["bixt_attention"]
