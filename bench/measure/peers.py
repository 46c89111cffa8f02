"""The encoders that Conceptron's stands beside: what a user would reach for otherwise, at the same width and depth.

Each is built from random weights, takes padded ids [B, N] with an attention mask [B, N], and returns hidden states. All
share the vocabulary, width d, layers, heads and feed-forward width of the concept encoder they are compared with.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...engine.errors import InputError


@dataclass(frozen=True)
class Shape:
    """What all encoders of one comparison share."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    max_tokens: int  # longest N of the comparison; absolute position tables get this many rows

    @classmethod
    def asked(cls, options: argparse.Namespace, max_tokens: int) -> "Shape":
        """What --width, --layers and --heads ask for.

        Raises:
            InputError: heads of the asked width are not of a width that all encoders take.
        """
        if options.width % (2 * options.heads):
            raise InputError(f"--width: expected a multiple of 2 * --heads = {2 * options.heads}, got {options.width}")
        return cls(options.width, options.layers, options.heads, 2 * options.width, 8192, max_tokens)


def bert(shape: Shape) -> nn.Module:
    """Full attention in every layer over learned absolute positions (Devlin et al. 2018), through SDPA."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads, intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_tokens, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def modernbert(shape: Shape) -> nn.Module:
    """Rotary positions, gated feed-forward, full attention in every third layer, 128-token windows in the others
    (Warner et al. 2024), through SDPA."""
    from transformers import ModernBertConfig, ModernBertModel

    special = dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 0)
    config = ModernBertConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads, intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_tokens, attn_implementation="sdpa", **special,
    )  # fmt: skip
    return ModernBertModel(config)


def ultrabert(shape: Shape) -> nn.Module:
    """Llama's layers without the causal mask, rotary positions, full attention in every third layer and windows in the
    others, as UltraBERT's (transformers 5), through SDPA.

    Raises:
        ImportError: this transformers does not have it.
    """
    from transformers import UltrabertConfig, UltrabertModel

    config = UltrabertConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads, intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_tokens,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return UltrabertModel(config)


class Perceiver(nn.Module):
    """The bottleneck as one would first write it (Jaegle et al. 2021): in every layer latents read the tokens through
    ``torch.nn.MultiheadAttention`` with a key padding mask, then attend to each other."""

    def __init__(self, shape: Shape, num_concepts: int):
        super().__init__()
        d = shape.hidden_size
        self.tokens = nn.Embedding(shape.vocab_size, d)
        self.positions = nn.Embedding(shape.max_tokens, d)
        self.concepts = nn.Parameter(torch.randn(num_concepts, d) * 0.02)
        self.layers = nn.ModuleList(PerceiverLayer(shape) for _ in range(shape.num_layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        B, N = input_ids.shape
        tokens_BNd = self.tokens(input_ids) + self.positions(torch.arange(N, device=input_ids.device))
        concepts_BCd = self.concepts.expand(B, -1, -1)
        for layer in self.layers:
            concepts_BCd = layer(concepts_BCd, tokens_BNd, attention_mask == 0)
        return concepts_BCd


class PerceiverLayer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        d = shape.hidden_size
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(4))
        self.read = nn.MultiheadAttention(d, shape.num_heads, batch_first=True)
        self.mix = nn.MultiheadAttention(d, shape.num_heads, batch_first=True)
        wide = shape.intermediate_size
        self.feed = nn.Sequential(nn.Linear(d, wide), nn.GELU(), nn.Linear(wide, d))

    def forward(self, concepts_BCd: Tensor, tokens_BNd: Tensor, padding_BN: Tensor) -> Tensor:
        query, keys = self.norms[0](concepts_BCd), self.norms[1](tokens_BNd)
        read, _ = self.read(query, keys, keys, key_padding_mask=padding_BN, need_weights=False)
        concepts_BCd = concepts_BCd + read
        mixed = self.norms[2](concepts_BCd)
        concepts_BCd = concepts_BCd + self.mix(mixed, mixed, mixed, need_weights=False)[0]
        return concepts_BCd + self.feed(self.norms[3](concepts_BCd))
