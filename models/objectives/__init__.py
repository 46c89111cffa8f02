"""Objectives: functions from clean packed text and keyed randomness to a view. A plain dict, no registry."""

from .diffusion import Diffusion
from .mlm import MaskedLM
from .view import SampleKey, SpecialTokens, View

OBJECTIVES = {"mlm": MaskedLM, "diffusion": Diffusion}

__all__ = ["OBJECTIVES", "Diffusion", "MaskedLM", "SampleKey", "SpecialTokens", "View"]
