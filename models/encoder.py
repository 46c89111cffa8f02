"""ConceptEncoder: N tokens of a sequence -> C concepts, at cost O(C * N).

B sequences, T packed tokens, C concepts, d model width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .config import ConceptConfig
from .encoder_layers import LAYERS, ConceptAngles, Tokens
from .layers import ConstantHeads, HeadBias, HeadNorm, LanguageModelHead, ResidualLinear, ZeroLinear, widening
from .mixing import CopeMixing
from .packing import Packed, pack_padded
from .positions import TokenPositions, anchors
from .queries import ConceptQueries, NullConcepts, orthogonal_rows
from .resize import LoadsOtherSizes


@dataclass
class ConceptEncoderOutput(ModelOutput):
    last_hidden_state: Tensor | None = None  # [B, C, d] the concepts
    anchors: Tensor | None = None  # [B, C] float32, where each concept stands among the tokens
    hidden_states: tuple[Tensor, ...] | None = None  # the concepts before each layer, and the last of all


class ConceptPreTrainedModel(LoadsOtherSizes, PreTrainedModel):
    """What every model here shares: the configuration, and one place that initialises all weights."""

    config_class = ConceptConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = False

    def __init__(self, config: ConceptConfig):
        config.check()  # again: from_pretrained(folder, field=other) sets fields one by one
        config.check_tokens()
        super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Everything starts here, by kind of module:

        - a matrix: normal(1 / sqrt(fan in)), so that rows of norm sqrt(d) keep it; where it writes into a residual
          stream, divided by sqrt(2L), so that depth does not grow the stream;
        - embeddings and the head: normal(initializer_range);
        - modulations of AdaLN-Zero: zero, whatever the framework did before;
        - concepts, and the null concepts: orthogonal rows of norm sqrt(d), as large as a normalised token, so that no
          two start alike; their learned places: as embeddings;
        - heads that no row decides: normal(1), as those of a normalised row;
        - the vector on queries and keys: anchor_bias on the half that RoPE reads as angle zero (nothing, where there
          are no places to be near in), and their norms: anchor_sharpness;
        - the table of contextual positions: zero.
        """
        config = self.config
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
        elif isinstance(module, ResidualLinear):
            depth = max(config.num_hidden_layers, config.num_decoder_layers)
            init.normal_(module.weight, std=1 / math.sqrt(2 * depth * module.in_features))
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
        elif isinstance(module, nn.Embedding | LanguageModelHead):
            init.normal_(module.weight, std=config.initializer_range)
        elif isinstance(module, CopeMixing):
            init.zeros_(module.places)
        elif isinstance(module, ConceptQueries):
            if config.init_queries == "embedding":
                init.normal_(module.weight, std=config.initializer_range)
            elif module.weight is not None:
                init.copy_(module.weight, orthogonal_rows(*module.weight.shape))
            if module.places is not None:
                init.normal_(module.places, std=config.initializer_range)
        elif isinstance(module, NullConcepts):
            init.copy_(module.weight, orthogonal_rows(*module.weight.shape))
        elif isinstance(module, ConstantHeads):
            init.normal_(module.weight, std=1.0)
        elif isinstance(module, HeadBias):
            half = module.bias.shape[0] // 2
            strength = float(config.anchor_bias) if module.is_placed else 0.0
            init.copy_(module.bias, torch.cat((torch.full((half,), strength), torch.zeros(half))))
        elif isinstance(module, HeadNorm):
            init.constant_(module.weight, config.anchor_sharpness)
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm) and module.weight is not None:
            init.ones_(module.weight)
        if isinstance(module, nn.Linear | LanguageModelHead) and module.bias is not None:
            init.zeros_(module.bias)


class ConceptEncoder(ConceptPreTrainedModel):
    """Reads packed or padded token ids and returns C concepts for each sequence.

        c_0 = e_i (+ the normalised mean of the tokens around anchor i) (+ a vector for place i)
        c_l = layer_l(c_{l-1}, tokens),   l = 1 .. L         concepts = RMSNorm(c_L)

    Keys and values are read from normalised tokens; queries and keys are normalised per head. By default RoPE puts
    tokens at their positions and concepts at their anchors (``positions.anchors``), so that addressing is relative and
    any N fits any C. A sequence without tokens gives finite concepts that depend on the parameters only.

    Memory and time are linear in T.
    Source: Perceiver IO (Jaegle et al. 2021, arXiv:2107.14795) with anchored concepts.
    """

    def __init__(self, config: ConceptConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.token_dim)
        self.positions = TokenPositions(config, config.token_dim)
        self.widen_tokens = widening(config)
        self.token_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.concepts = ConceptQueries(config)
        self.layers = nn.ModuleList(LAYERS[config.layer_kind](config) for _ in range(config.num_hidden_layers))
        self.out_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps, elementwise_affine=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, *,
        packed: Packed | None = None, output_hidden_states: bool = False, return_dict: bool = True,
    ) -> ConceptEncoderOutput | tuple:  # fmt: skip
        """Encodes ``packed``, or ``input_ids`` [B, N] with ``attention_mask`` [B, N], packed at the door.

        Raises:
            ValueError: neither or both of ``packed`` and ``input_ids`` came, or a shape does not fit.
        """
        if (packed is None) == (input_ids is None):
            raise ValueError("input_ids: expected either input_ids [B, N] or packed, got both or neither")
        if packed is None:
            packed = self.visible(pack_padded(input_ids, attention_mask))
        states = self.encode(packed)
        result = ConceptEncoderOutput(
            last_hidden_state=states[-1],
            anchors=self.anchors(packed),
            hidden_states=tuple(states) if output_hidden_states else None,
        )
        return result if return_dict else result.to_tuple()

    def encode(self, packed: Packed) -> list[Tensor]:
        """The concepts before each layer, then the normalised ones [B, C, d]."""
        rows_Te = self.positions(self.embed_tokens(packed.input_ids), packed.position_ids, packed.max_seqlen)
        states_Td = self.token_norm(self.widen_tokens(rows_Te))
        tokens = Tokens(states_Td, self.positions.read_angles(packed.position_ids), packed)
        anchors_BC = self.anchors(packed)
        anchor_angles = ConceptAngles(self.positions.angles(anchors_BC), self.positions.concept_angles(anchors_BC))
        c_BCd = self.concepts(states_Td, packed)
        states = []
        for layer in self.layers:
            states.append(c_BCd)
            c_BCd, tokens = layer(c_BCd, anchor_angles, tokens)
        return [*states, self.out_norm(c_BCd)]

    def visible(self, packed: Packed) -> Packed:
        """What the encoder reads of a text with [MASK] tokens in it: without them if it was configured to drop them."""
        if self.config.hidden_tokens != "drop" or self.config.mask_token_id is None:
            return packed
        return packed.select(packed.input_ids != self.config.mask_token_id)

    def anchors(self, packed: Packed) -> Tensor:
        num_positions_B, C = packed.num_positions(), self.config.num_concepts
        if self.config.concept_positions != "rope":
            return num_positions_B.new_zeros((packed.num_sequences, C), dtype=torch.float32)
        return anchors(num_positions_B, C)


AutoConfig.register(ConceptConfig.model_type, ConceptConfig)
AutoModel.register(ConceptConfig, ConceptEncoder)
