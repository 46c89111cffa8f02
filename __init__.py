"""Conceptron: encoders that read long text through a bottleneck of learned concepts.

Importing it loads nothing yet: each name below is loaded when it is first used, an operator of ``kernels`` without the
models. ``transformers`` knows the models whichever of the two is imported first (``models/auto.py``):
``AutoModel.from_pretrained`` loads a Conceptron checkpoint.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import kernels
from .models.auto import announce

if TYPE_CHECKING:  # what the tables say, for those who read without running
    from .engine.embedding.model import ConceptModel as ConceptModel
    from .kernels.adaln import adaln_modulate as adaln_modulate
    from .kernels.adaln import adaln_residual_modulate as adaln_residual_modulate
    from .kernels.bixt_attention import bixt_attention as bixt_attention
    from .kernels.concept_attention import concept_attention as concept_attention
    from .kernels.concept_attention import merge_partials as merge_partials
    from .kernels.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
    from .kernels.slot_attention import slot_attention as slot_attention
    from .kernels.streamed_attention import streamed_attention as streamed_attention
    from .kernels.token_attention import token_attention as token_attention
    from .models.config import ConceptConfig as ConceptConfig
    from .models.encoder import ConceptEncoder as ConceptEncoder
    from .models.masked_lm import ConceptForMaskedLM as ConceptForMaskedLM
    from .models.packing import pack as pack
    from .models.tasks.heads import ConceptForMultipleChoice as ConceptForMultipleChoice
    from .models.tasks.heads import ConceptForQuestionAnswering as ConceptForQuestionAnswering
    from .models.tasks.heads import ConceptForSequenceClassification as ConceptForSequenceClassification
    from .models.tasks.tokens import ConceptForTokenClassification as ConceptForTokenClassification

__version__ = "0.1.0"

OPERATORS = {  # name -> its folder in kernels/
    "adaln_modulate": "adaln", "adaln_residual_modulate": "adaln", "bixt_attention": "bixt_attention",
    "concept_attention": "concept_attention", "linear_cross_entropy": "linear_cross_entropy",
    "merge_partials": "concept_attention", "slot_attention": "slot_attention",
    "streamed_attention": "streamed_attention", "token_attention": "token_attention",
}  # fmt: skip
MODELS = {  # name -> its file in models/
    "ConceptConfig": "config", "ConceptEncoder": "encoder", "ConceptForMaskedLM": "masked_lm",
    "ConceptForMultipleChoice": "tasks.heads", "ConceptForQuestionAnswering": "tasks.heads",
    "ConceptForSequenceClassification": "tasks.heads", "ConceptForTokenClassification": "tasks.tokens",
    "pack": "packing",
}  # fmt: skip
READERS = {"ConceptModel": "embedding.model"}  # name -> its file in engine/
__all__ = ["kernels", *OPERATORS, *MODELS, *READERS]


def __getattr__(name: str) -> Any:
    if name in OPERATORS:
        value = getattr(kernels, name)
    elif name in MODELS:
        value = getattr(import_module(f".models.{MODELS[name]}", __name__), name)
    elif name in READERS:
        value = getattr(import_module(f".engine.{READERS[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Kernels(ModuleType):
    """The folder kernels/, in which an operator's name means the operator, although its folder has the same name.

    kernels/ has no __init__.py, where this would stand: with one it would shadow the Hugging Face package of that name
    inside a checkout.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in OPERATORS:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{OPERATORS[name]}", self.__name__), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in OPERATORS and isinstance(value, ModuleType)):  # Python binds each folder when it imports it
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *OPERATORS})


kernels.__class__ = _Kernels
announce()
