"""From when on the Auto classes of transformers know this package, so that who uses only operators need not load it.

The configuration is registered as soon as both packages are there, whichever comes first. The models are when a
configuration is made: every Auto class that looks for a model has made its configuration before.
"""

import functools
import importlib
import importlib.abc
import sys
from importlib.machinery import ModuleSpec
from typing import Any

AUTO_CONFIG = "transformers.models.auto.configuration_auto"  # the module that defines AutoConfig


def announce() -> None:
    """Registers ``ConceptConfig`` (``config.py`` does, when it is loaded) now, or when AutoConfig is loaded."""
    if AUTO_CONFIG in sys.modules:
        importlib.import_module(".config", __package__)
    else:
        sys.meta_path.insert(0, _Arrival())


class _Arrival(importlib.abc.MetaPathFinder):
    """Waits for the module AUTO_CONFIG; everything else is left to the other finders."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != AUTO_CONFIG:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                importlib.import_module(".config", __package__)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


@functools.cache
def register_models() -> None:
    """Every model under its task, once."""
    from transformers import (
        AutoModel,
        AutoModelForMaskedLM,
        AutoModelForMultipleChoice,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    from .config import ConceptConfig
    from .encoder import ConceptEncoder
    from .masked_lm import ConceptForMaskedLM
    from .tasks.heads import ConceptForMultipleChoice, ConceptForQuestionAnswering, ConceptForSequenceClassification
    from .tasks.tokens import ConceptForTokenClassification

    for auto, model in (
        (AutoModel, ConceptEncoder),
        (AutoModelForMaskedLM, ConceptForMaskedLM),
        (AutoModelForMultipleChoice, ConceptForMultipleChoice),
        (AutoModelForQuestionAnswering, ConceptForQuestionAnswering),
        (AutoModelForSequenceClassification, ConceptForSequenceClassification),
        (AutoModelForTokenClassification, ConceptForTokenClassification),
    ):
        auto.register(ConceptConfig, model)
