from .adaln import adaln_modulate as adaln_modulate
from .adaln import adaln_residual_modulate as adaln_residual_modulate
from .bixt_attention import bixt_attention as bixt_attention
from .concept_attention import concept_attention as concept_attention
from .concept_attention import merge_partials as merge_partials
from .linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from .slot_attention import slot_attention as slot_attention
from .token_attention import token_attention as token_attention
