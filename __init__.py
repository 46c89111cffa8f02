"""Conceptron: encoders that read long text through a bottleneck of learned concepts.

Importing it registers the models with ``transformers`` (``AutoModel.from_pretrained`` then loads a Conceptron
checkpoint) and binds each operator of ``conceptron.kernels`` under its own name.
"""

from . import kernels
from .kernels.adaln import adaln_modulate, adaln_residual_modulate
from .kernels.bixt_attention import bixt_attention
from .kernels.concept_attention import concept_attention, merge_partials
from .kernels.linear_cross_entropy import linear_cross_entropy
from .kernels.slot_attention import slot_attention
from .kernels.token_attention import token_attention
from .models.masked_lm import ConceptForMaskedLM as ConceptForMaskedLM  # registers the Auto classes, as do the next
from .models.tasks.heads import ConceptForMultipleChoice as ConceptForMultipleChoice
from .models.tasks.heads import ConceptForQuestionAnswering as ConceptForQuestionAnswering
from .models.tasks.heads import ConceptForSequenceClassification as ConceptForSequenceClassification

__version__ = "0.1.0"

# kernels/ has no __init__.py (with one it would shadow the Hugging Face package of that name inside a checkout), and
# an operator's folder is named like the operator; so the names that users import are bound here, over the folders'.
for _operator in (
    adaln_modulate, adaln_residual_modulate, bixt_attention, concept_attention, linear_cross_entropy,
    merge_partials, slot_attention, token_attention,
):  # fmt: skip
    setattr(kernels, _operator.__name__, _operator)
