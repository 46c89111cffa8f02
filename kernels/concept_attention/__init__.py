"""Concepts read tokens; partial results over token shards merge exactly."""

from .merge import merge_partials
from .op import concept_attention

__all__ = ["concept_attention", "merge_partials"]
