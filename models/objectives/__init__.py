"""Objectives: functions from clean packed text and keyed randomness to a view. A plain dict, no registry."""

from .contrastive import Contrastive
from .diffusion import Diffusion
from .distill import Distill, Distillation, Lesson
from .mixed import Mixed, NoTask
from .mlm import MaskedLM
from .prefix import PrefixDiffusion
from .read_back import ReadBack, StateReader
from .tsdae import TSDAE
from .view import Pair, SampleKey, SpecialTokens, View

OBJECTIVES = {
    "mlm": MaskedLM, "diffusion": Diffusion, "tsdae": TSDAE, "prefix_diffusion": PrefixDiffusion, "read_back": ReadBack,
}  # fmt: skip

__all__ = [
    "OBJECTIVES", "TSDAE", "Contrastive", "Diffusion", "Distill", "Distillation", "Lesson", "MaskedLM", "Mixed",
    "NoTask", "Pair", "PrefixDiffusion", "ReadBack", "SampleKey", "SpecialTokens", "StateReader", "View",
]  # fmt: skip
