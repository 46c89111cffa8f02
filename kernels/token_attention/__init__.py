"""Tokens read concepts."""

from .op import token_attention

__all__ = ["token_attention"]
