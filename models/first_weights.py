"""Where all weights start that come from nowhere else: one place for the encoder, the decoder and the heads."""

import math

import torch
from torch import nn
from transformers import initialization as init

from .config import ConceptConfig
from .layers import ConstantHeads, HeadBias, HeadNorm, LanguageModelHead, ResidualLinear, ZeroLinear
from .mixing import CopeMixing
from .queries import ConceptQueries, NullConcepts, orthogonal_rows
from .token_layers import TokenResidualLinear, WindowConv


@torch.no_grad()
def first_weights(module: nn.Module, config: ConceptConfig) -> None:
    """Gives a module its own parameters' first values, by its kind:

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
