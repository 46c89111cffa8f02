"""The layers of the encoder: how concepts read tokens, one class a kind.

B sequences, T packed tokens, C concepts, d model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import ConceptConfig
from .layers import Angles, ConceptAttention, FeedForward
from .packing import Packed


class Tokens(NamedTuple):
    """What concepts read: the state of every token, where it stands, and whose it is."""

    states: Tensor  # [T, d], normalised
    angles: Angles
    packed: Packed


class CrossLayer(nn.Module):
    """c += read(tokens);  c += self_attention(c);  c += feed_forward(c). Each pre-norm; tokens stay as they are."""

    def __init__(self, config: ConceptConfig):
        super().__init__()
        self.read_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.read = ConceptAttention(config)
        self.mix_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mix = ConceptAttention(config)
        self.feed_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.feed = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, c_BCd: Tensor, anchor_angles: Angles, tokens: Tokens) -> tuple[Tensor, Tokens]:
        B, C, _ = c_BCd.shape
        read = self.read(
            self.read_norm(c_BCd), anchor_angles, tokens.states, tokens.angles, tokens.packed.cu_seqlens,
            tokens.packed.max_seqlen,
        )  # fmt: skip
        c_BCd = c_BCd + self.dropout(read)
        flat_Rd = self.mix_norm(c_BCd).flatten(0, 1)  # the concepts of all sequences as one packed row of B * C
        flat_angles = tuple(part.flatten(0, 1) for part in anchor_angles)
        cu_concepts = torch.arange(B + 1, device=c_BCd.device, dtype=torch.int32) * C
        mixed = self.mix(flat_Rd.view_as(c_BCd), anchor_angles, flat_Rd, flat_angles, cu_concepts, C)
        c_BCd = c_BCd + self.dropout(mixed)
        return c_BCd + self.dropout(self.feed(self.feed_norm(c_BCd))), tokens


LAYERS = {"cross": CrossLayer}
