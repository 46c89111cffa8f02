"""The layers of the encoder: how concepts read tokens, one class a kind.

B sequences, T packed tokens, C concepts, d model width.
"""

from typing import NamedTuple

from torch import Tensor, nn

from .config import ConceptConfig
from .layers import ConceptAttention, FeedForward
from .mixing import concept_mixing
from .packing import Packed
from .positions import Angles


class Tokens(NamedTuple):
    """What concepts read: the state of every token, where it stands, and whose it is."""

    states: Tensor  # [T, d], normalised
    angles: Angles | None
    packed: Packed


class ConceptAngles(NamedTuple):
    """Where the concepts stand; None where nothing is turned."""

    reading: Angles | None  # among the tokens
    mixing: Angles | None  # among themselves


class CrossLayer(nn.Module):
    """c += read(tokens);  c += self_attention(c);  c += feed_forward(c). Each pre-norm; tokens stay as they are."""

    def __init__(self, config: ConceptConfig):
        super().__init__()
        self.read_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.read = ConceptAttention(config)
        self.mix_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mix = concept_mixing(config)
        self.feed_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.feed = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, c_BCd: Tensor, anchor_angles: ConceptAngles, tokens: Tokens) -> tuple[Tensor, Tokens]:
        read = self.read(
            self.read_norm(c_BCd), anchor_angles.reading, tokens.states, tokens.angles, tokens.packed.cu_seqlens,
            tokens.packed.max_seqlen,
        )  # fmt: skip
        c_BCd = c_BCd + self.dropout(read)
        c_BCd = c_BCd + self.dropout(self.mix(self.mix_norm(c_BCd), anchor_angles.mixing))
        return c_BCd + self.dropout(self.feed(self.feed_norm(c_BCd))), tokens


LAYERS = {"cross": CrossLayer}
