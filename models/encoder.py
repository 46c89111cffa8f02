"""ConceptEncoder: N tokens of a sequence -> C concepts, at cost O(C * N).

B sequences, T packed tokens, C concepts, d model width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from ..kernels.autocast import lower_precision
from .config import ConceptConfig
from .encoder_layers import ConceptAngles, Tokens, build_layers
from .layers import ConstantHeads, HeadBias, HeadNorm, LanguageModelHead, ResidualLinear, RowNorm, ZeroLinear, widening
from .mixing import CopeMixing
from .packing import Packed, pack_padded
from .positions import TokenPositions, anchors
from .queries import ConceptQueries, NullConcepts, orthogonal_rows
from .recursion import apply_layers
from .resize import LoadsOtherSizes
from .token_layers import TokenLayers, TokenResidualLinear, WindowConv


@dataclass
class ConceptEncoderOutput(ModelOutput):
    last_hidden_state: Tensor | None = None  # [B, C, d] the concepts
    anchors: Tensor | None = None  # [B, C] float32, where each concept stands among the tokens
    hidden_states: tuple[Tensor, ...] | None = None  # the concepts before each layer, and the last of all; also where
    # loss_every_iteration needs them in training
    convergence: Tensor | None = None  # [K, B] float32, |c_k+1 - c_k| / |c_k| of each layer or iteration


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
          stream, divided by sqrt(2L), L of the deepest part, iterations counted, so that depth does not grow the
          stream; and into the stream of tokens, times the size at which that stream starts;
        - taps of a convolution: normal(1 / sqrt(their number));
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
            depth = max(config.iterations, config.num_decoder_layers, config.num_token_layers)
            is_small = isinstance(module, TokenResidualLinear) and not config.normalize_tokens
            scale = config.initializer_range if is_small else 1.0
            init.normal_(module.weight, std=scale / math.sqrt(2 * depth * module.in_features))
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
        elif isinstance(module, nn.Embedding | LanguageModelHead):
            init.normal_(module.weight, std=config.initializer_range)
        elif isinstance(module, WindowConv):
            init.normal_(module.weight, std=1 / math.sqrt(module.weight.shape[0]))
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


def plain_norm(config: ConceptConfig, width: int) -> nn.RMSNorm:
    return nn.RMSNorm(width, eps=config.norm_eps, elementwise_affine=False)


class ConceptEncoder(ConceptPreTrainedModel):
    """Reads packed or padded token ids and returns C concepts for each sequence.

        t   = RMSNorm(widen(token_layers(e_ids)))
        c_0 = e_i (+ the normalised mean of the tokens around anchor i) (+ a vector for place i)
        c_l = layer_l(c_{l-1}, t),   l = 1 .. L, or K times the one tied layer         concepts = RMSNorm(c_L)

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
        # embeddings are small: as they are, what layers learn to add to all of them alike would soon outweigh them
        normalizes = config.normalize_tokens and config.num_token_layers > 0
        self.token_start = plain_norm(config, config.token_dim) if normalizes else nn.Identity()
        self.token_layers = TokenLayers(config)
        self.widen_tokens = widening(config)
        self.token_norm = RowNorm(config.hidden_size, eps=config.norm_eps)
        self.concepts = ConceptQueries(config)
        self.layers = build_layers(config)
        self.out_norm = plain_norm(config, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, *,
        packed: Packed | None = None, num_iterations: int | None = None, tolerance: float | None = None,
        output_hidden_states: bool = False, output_convergence: bool = False, return_dict: bool = True,
    ) -> ConceptEncoderOutput | tuple:  # fmt: skip
        """Encodes ``packed``, or ``input_ids`` [B, N] with ``attention_mask`` [B, N], packed at the door.

        Args:
            num_iterations: K of a tied layer, any; the configuration's by default.
            tolerance: in evaluation, ends the iterations of a tied layer after one that changed the concepts of every
                sequence by less, |c_k+1 - c_k| < tolerance * |c_k|. Synchronises with the host once an iteration.

        Raises:
            ValueError: neither or both of ``packed`` and ``input_ids`` came, a shape does not fit, or iterations were
                asked of layers that are not tied.
        """
        if (packed is None) == (input_ids is None):
            raise ValueError("input_ids: expected either input_ids [B, N] or packed, got both or neither")
        self.check_iterations(num_iterations, tolerance)
        if packed is None:
            packed = self.visible(pack_padded(input_ids, attention_mask))
        states, changes = self.encode(packed, num_iterations, tolerance, output_convergence)
        output_hidden_states |= self.training and self.config.loss_every_iteration
        result = ConceptEncoderOutput(
            last_hidden_state=states[-1],
            anchors=self.anchors(packed),
            hidden_states=tuple(states) if output_hidden_states else None,
            convergence=torch.stack(changes) if output_convergence else None,
        )
        return result if return_dict else result.to_tuple()

    def encode(
        self, packed: Packed, num_iterations: int | None = None, tolerance: float | None = None,
        with_changes: bool = False,
    ) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
        """The concepts [B, C, d] before each layer, then the normalised ones; on request each layer's change [B]."""
        config, B = self.config, packed.num_sequences
        tokens = self.read_tokens(packed)
        anchors_BC = self.anchors(tokens.packed)
        angles = ConceptAngles(self.positions.angles(anchors_BC), self.positions.concept_angles(anchors_BC))
        K = config.iterations if num_iterations is None else num_iterations
        num_frozen = 0
        if config.backprop_iterations is not None and torch.is_grad_enabled():
            num_frozen = max(0, K - config.backprop_iterations)
        states, changes = apply_layers(
            [self.layers[0]] * K if config.tie_layers else list(self.layers),
            self.concepts(tokens.states, tokens.packed), angles, tokens,
            num_texts=B, num_frozen=num_frozen, tolerance=tolerance, with_changes=with_changes,
        )  # fmt: skip
        states[-1] = self.out_norm(states[-1])
        return [c_BCd[:B] for c_BCd in states], changes

    def read_tokens(self, packed: Packed) -> Tokens:
        """Tokens as concepts read them: through their own layers, as wide as the model, normalised."""
        rows_Te = self.positions(self.embed_tokens(packed.input_ids), packed.position_ids, packed.max_seqlen)
        rows_Re, places = self.token_layers(self.token_start(rows_Te), packed, self.positions)
        # the temperature of YaRN is for a softmax over tokens
        find = self.positions.angles if self.config.layer_kind == "slot" else self.positions.read_angles
        states = self.token_norm(self.widen_tokens(rows_Re))
        if self.config.layer_kind != "bixt":  # there they go on as a residual stream
            states = lower_precision(states)[0]  # once for the keys and values of all layers
        return Tokens(states, find(places.positions), places.packed)

    def check_iterations(self, num_iterations: int | None, tolerance: float | None) -> None:
        for name, value in (("num_iterations", num_iterations), ("tolerance", tolerance)):
            if value is not None and not self.config.tie_layers:
                raise ValueError(f"{name}: expected nothing without tie_layers = true, got {value!r}")
        if num_iterations is not None and num_iterations < 1:
            raise ValueError(f"num_iterations: expected at least 1, got {num_iterations!r}")
        if tolerance is not None and self.training:
            raise ValueError(f"tolerance: expected nothing in training, got {tolerance!r}; call model.eval() first")

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
