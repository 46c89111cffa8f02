"""Conceptron: encoders that read long text through a bottleneck of learned concepts."""

__version__ = "0.1.0"
