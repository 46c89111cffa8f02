"""Slot attention: concepts compete for every token."""

from .op import slot_attention

__all__ = ["slot_attention"]
