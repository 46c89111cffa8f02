"""What every model of this package shares: the configuration, how weights start, what transformers may ask.

C concepts, d model width, L layers.
"""

import math

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .backbone import Backbone
from .config import ConceptConfig
from .layers import (
    ConstantHeads,
    HeadBias,
    HeadNorm,
    LanguageModelHead,
    ResidualLinear,
    ZeroLinear,
)
from .mixing import CopeMixing
from .queries import ConceptQueries, NullConcepts, orthogonal_rows
from .start.resize import LoadsOtherSizes
from .token_layers import TokenResidualLinear, WindowConv


class ConceptPreTrainedModel(LoadsOtherSizes, PreTrainedModel):
    """What every model here shares: the configuration, and one place that initialises all weights."""

    config_class = ConceptConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True  # of layers of the encoder, of tokens and of the decoder
    hands_attentions_on = False  # whether a call can give the weights with which concepts read tokens

    def __init__(self, config: ConceptConfig):
        config.check()  # again: from_pretrained(folder, field=other) sets fields one by one
        config.check_tokens()
        super().__init__(config)

    def post_init(self) -> None:
        super().post_init()  # it adds what the parts ignore when they are loaded by themselves
        self._keys_to_ignore_on_load_unexpected = set(type(self)._keys_to_ignore_on_load_unexpected or ())

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """As in transformers for a class of somebody else's module. The models of this package are registered when it
        is imported, and a folder holds no copy of their code: it is loaded with the package installed."""
        if cls.__module__.partition(".")[0] != __name__.partition(".")[0]:
            super().register_for_auto_class(auto_class)

    def wants(
        self, output_attentions: bool | None, output_hidden_states: bool | None, return_dict: bool | None
    ) -> tuple[bool, bool]:
        """Whether a call gives hidden states, and whether named: as it says, or else the configuration.

        Raises:
            ValueError: attention weights were asked for of a model that does not hand them on.
        """
        config = self.config
        if self.wants_attentions(output_attentions) and not self.hands_attentions_on:
            raise ValueError(
                "output_attentions: expected False, got True: only the encoder gives them, "
                "model.encoder(..., output_attentions=True)"
            )
        with_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return bool(with_states), bool(config.return_dict if return_dict is None else return_dict)

    def wants_attentions(self, output_attentions: bool | None) -> bool:
        return bool(self.config.output_attentions if output_attentions is None else output_attentions)

    def _set_gradient_checkpointing(self, *args, **kwargs):
        options = getattr(kwargs.get("gradient_checkpointing_func"), "keywords", {})
        if options.get("use_reentrant"):
            raise ValueError(
                "use_reentrant: expected False, got True: reentrant checkpoints run the backward pass in pieces, and "
                "the tokens that all layers read have one gradient"
            )
        super()._set_gradient_checkpointing(*args, **kwargs)

    def enable_input_require_grads(self) -> None:
        """Nothing: only reentrant checkpoints need inputs with gradients, and its hook would hide the embeddings."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Everything starts here, by kind of module:

        - what the layers of concepts that start as the identity write: zero;
        - a matrix: normal(1 / sqrt(fan in)), so that rows of norm sqrt(d) keep it; where it writes into a residual
          stream, divided by sqrt(2L), L of the deepest part, iterations counted, so that depth does not grow the
          stream; and into the stream of tokens, times the size at which that stream starts;
        - taps of a convolution: normal(1 / sqrt(their number));
        - embeddings and the head: normal(initializer_range);
        - modulations of AdaLN-Zero: zero, whatever the framework did before;
        - concepts, and the null concepts: orthogonal rows of norm sqrt(d), as large as a normalised token, so that no
          two start alike; their learned places: as embeddings; with init_queries = state less their mean and row_scale
          as large;
        - heads that no row decides: normal(1), as those of a normalised row;
        - the vector on queries and keys: anchor_bias on the half that RoPE reads as angle zero (nothing, where there
          are no places to be near in), and their norms: anchor_sharpness;
        - the table of contextual positions: zero.
        """
        config = self.config
        if isinstance(module, ZeroLinear) or getattr(module, "starts_at_zero", False):
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
            if config.init_queries == "state":
                rows = orthogonal_rows(*module.weight.shape)
                init.copy_(module.weight, config.row_scale * (rows - rows.mean(0)))
            elif config.init_queries == "embedding":
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

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, which gives every parameter a gradient: those of a frozen backbone lose it again."""
        loaded = super().from_pretrained(*args, **kwargs)
        for module in (loaded[0] if isinstance(loaded, tuple) else loaded).modules():
            if isinstance(module, Backbone):
                module.freeze()
        return loaded
