"""The layers of the encoder: how concepts read tokens, one class a kind.

B sequences, T packed tokens, C concepts, H heads, Hkv key/value heads, D head width, d model width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers.modeling_layers import GradientCheckpointingLayer

from ..kernels.bixt_attention.op import bixt_attention
from ..kernels.concept_attention.op import concept_attention
from ..kernels.slot_attention.op import slot_attention
from .config import ConceptConfig
from .layers import BranchNorm, ConceptAttention, FeedForward, Heads, ResidualLinear, RowNorm, ZeroLinear, is_plain
from .mixing import concept_mixing
from .packing import Packed
from .positions import Angles
from .sharding import read_shard
from .token_source import TokenSource


class Tokens(NamedTuple):
    """What concepts read: the state of every token, where it stands, and whose it is."""

    states: Tensor | None  # [T, d], normalised before the first layer
    angles: Angles | None
    packed: Packed
    raw: Tensor | None = None  # [T, e] a backbone's states, centred and of mean square 1
    keys_values: tuple[Tensor, Tensor] | None = None  # [T, Hkv, D] each, where a layer has made them for those after it
    source: TokenSource | None = None  # instead of states and angles: they are read in chunks
    maker: "TokenRead | None" = None  # then the one whose projections make keys and values
    group: ProcessGroup | None = None  # of devices that hold the other tokens of these texts


class ConceptAngles(NamedTuple):
    """Where the concepts stand; None where nothing is turned."""

    reading: Angles | None  # among the tokens
    mixing: Angles | None  # among themselves


def norm(config: ConceptConfig) -> nn.Module:
    return BranchNorm(config.hidden_size, eps=config.norm_eps)


def closing_norm(config: ConceptConfig) -> nn.Module:
    is_closed = config.block_norm == "sandwich"
    return RowNorm(config.hidden_size, eps=config.norm_eps) if is_closed else nn.Identity()


class ConceptLayer(GradientCheckpointingLayer):
    """What every kind shares: concepts read tokens in the way of their kind, then read each other and are fed forward.

        c += branch(RMSNorm(c))                    block_norm "pre"
        c  = RMSNorm(c + branch(RMSNorm(c)))       block_norm "sandwich": bounded for any number of iterations

    ``forward(c [B, C, d], angles, tokens, is_last) -> (c, tokens)``; after the last layer nobody reads tokens.
    Where layers share keys and values, or one tied layer is applied again, they are made once and go on with tokens.
    Source of the sandwich: Geiping et al. 2025, arXiv:2502.05171, section 3.2.
    """

    def __init__(self, config: ConceptConfig, read: nn.Module):
        super().__init__()
        self.read_norm = norm(config)
        self.read = read
        self.read_close = closing_norm(config)
        self.mix_norm = norm(config)
        self.mix = concept_mixing(config)
        self.mix_close = closing_norm(config)
        self.feed_norm = norm(config)
        self.feed = FeedForward(config)
        self.feed_close = closing_norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def think(self, c_BCd: Tensor, angles: ConceptAngles) -> Tensor:
        """What follows the read: self-attention of the concepts and the feed-forward."""
        mixed = self.mix(self.mix_norm(c_BCd), angles.mixing)
        c_BCd = self.mix_close(c_BCd + self.dropout(mixed))
        return self.feed_close(c_BCd + self.dropout(self.feed(self.feed_norm(c_BCd))))


def with_keys_values(read: nn.Module, tokens: Tokens, is_tied: bool) -> Tokens:
    """Tokens with the keys and values that this layer reads: its own, or what an earlier one has made."""
    if not hasattr(read, "key") or (is_tied and tokens.keys_values is not None):
        return tokens
    return tokens._replace(keys_values=(read.key(tokens.states, tokens.angles), read.values(tokens.states)))


class TokenRead(ConceptAttention):
    """Concepts read the tokens of their sequence. Cost O(C * T)."""

    def __init__(self, config: ConceptConfig, makes_keys: bool = True):
        super().__init__(config, makes_keys=makes_keys)
        self.is_tied, self.hands_on = config.tie_layers, config.tie_layers or config.share_kv > 1

    def forward(self, concepts_BCd: Tensor, anchor_angles: Angles | None, tokens: Tokens) -> tuple[Tensor, Tokens]:
        """What they read, [B, C, d]; tokens with the keys and values that they were read with."""
        q_BCHD, packed = self.query(concepts_BCd, anchor_angles), tokens.packed
        if tokens.source is None:
            tokens = with_keys_values(self, tokens, self.is_tied)
            if tokens.group is not None:
                read_BCHD = read_shard(q_BCHD, *tokens.keys_values, packed, tokens.group)
            else:
                read_BCHD = concept_attention(q_BCHD, *tokens.keys_values, packed.cu_seqlens, packed.max_seqlen)
            tokens = tokens if self.hands_on else tokens._replace(keys_values=None)
        else:
            tokens = tokens._replace(maker=self) if hasattr(self, "key") else tokens
            key, value = tokens.maker.key, tokens.maker.value
            read_BCHD = tokens.source.read(
                q_BCHD, key.project.weight, value.weight, key.bias.bias, key.norm.weight, key.norm.eps
            )
        return self.out(read_BCHD.flatten(-2)), tokens

    @property
    def is_plain(self) -> bool:
        """Whether the parameters of keys and values say all that their modules do."""
        return not hasattr(self, "key") or (self.key.is_plain and is_plain(self.value, nn.Linear))


class CrossLayer(ConceptLayer):
    """c += read(tokens), softmax over tokens; tokens stay as they are."""

    def __init__(self, config: ConceptConfig, makes_keys: bool = True):
        super().__init__(config, TokenRead(config, makes_keys))

    def forward(
        self, c_BCd: Tensor, angles: ConceptAngles, tokens: Tokens, is_last: bool = False
    ) -> tuple[Tensor, Tokens]:
        read, tokens = self.read(self.read_norm(c_BCd), angles.reading, tokens)
        return self.think(self.read_close(c_BCd + self.dropout(read)), angles), tokens


class BixtAttention(nn.Module):
    """The two reads of a BiXT layer. One projection a side makes query and key, so that one similarity serves both.

    RoPE turns both sides. Without ``both_ways`` there is nothing of the tokens' read, parameters included.
    """

    def __init__(self, config: ConceptConfig, both_ways: bool):
        super().__init__()
        d, self.num_heads, self.head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
        self.concept_key = Heads(config, self.num_heads)
        self.token_key = Heads(config, self.num_heads)
        self.token_value = nn.Linear(d, d, bias=False)
        self.concept_out = ResidualLinear(d, d, bias=False)
        self.concept_value = nn.Linear(d, d, bias=False) if both_ways else None
        self.token_out = ResidualLinear(d, d, bias=False) if both_ways else None

    def forward(
        self, concepts_BCd: Tensor, anchor_angles: Angles | None, tokens_Td: Tensor, token_angles: Angles | None,
        cu_seqlens: Tensor, max_seqlen: int, both_ways: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """What concepts [B, C, d] and, ``both_ways``, tokens [T, d] are to add to themselves."""
        shape = self.num_heads, self.head_dim
        concept_BCHD = self.concept_key(concepts_BCd, anchor_angles)
        token_THD = self.token_key(tokens_Td, token_angles)
        token_v_THD = self.token_value(tokens_Td).unflatten(-1, shape)
        if not both_ways:
            read_BCHD = concept_attention(concept_BCHD, token_THD, token_v_THD, cu_seqlens, max_seqlen)
            return self.concept_out(read_BCHD.flatten(-2)), None
        concept_v_BCHD = self.concept_value(concepts_BCd).unflatten(-1, shape)
        read_BCHD, told_THD = bixt_attention(
            concept_BCHD, concept_v_BCHD, token_THD, token_v_THD, cu_seqlens, max_seqlen
        )
        return self.concept_out(read_BCHD.flatten(-2)), self.token_out(told_THD.flatten(-2))


class BixtLayer(ConceptLayer):
    """Concepts read tokens and tokens read concepts, through one similarity S with two softmaxes.

        c += out_c(softmax over tokens of S   v_t)
        t += out_t(softmax over concepts of S v_c);    t += feed_forward(t)          all on RMSNorm(c), RMSNorm(t)

    Where nobody reads t afterwards it is not updated: the last of several layers (``updates_tokens=False``) owns no
    parameters for it, and a tied layer, which must own them, leaves it out in the last iteration.

    Source: Hiller et al. 2024, arXiv:2402.12138, whose concepts have a second feed-forward between their two reads.
    """

    def __init__(self, config: ConceptConfig, updates_tokens: bool = True):
        super().__init__(config, BixtAttention(config, updates_tokens))
        self.token_norm = norm(config)
        self.updates_tokens = updates_tokens
        if updates_tokens:
            self.token_close = closing_norm(config)
            self.token_feed_norm = norm(config)
            self.token_feed = FeedForward(config)
            self.token_feed_close = closing_norm(config)

    def forward(
        self, c_BCd: Tensor, angles: ConceptAngles, tokens: Tokens, is_last: bool = False
    ) -> tuple[Tensor, Tokens]:
        packed, t_Td = tokens.packed, tokens.states
        read, told = self.read(
            self.read_norm(c_BCd), angles.reading, self.token_norm(t_Td), tokens.angles, packed.cu_seqlens,
            packed.max_seqlen, self.updates_tokens and not is_last,
        )  # fmt: skip
        c_BCd = self.think(self.read_close(c_BCd + self.dropout(read)), angles)
        if told is None:
            return c_BCd, tokens
        t_Td = self.token_close(t_Td + self.dropout(told))
        t_Td = self.token_feed_close(t_Td + self.dropout(self.token_feed(self.token_feed_norm(t_Td))))
        return c_BCd, tokens._replace(states=t_Td)


class SlotHeads(nn.Module):
    """Heads by which concepts compete for tokens: the softmax of each runs over the concepts.

    The first ``num_cross`` of H heads (and their share of the Hkv) read as in ``CrossLayer``, without competition.
    """

    def __init__(self, config: ConceptConfig, is_hybrid: bool, makes_keys: bool = True):
        super().__init__()
        H, Hkv = config.num_attention_heads, config.num_key_value_heads
        self.normalize, self.head_dim = config.slot_normalize, config.head_dim
        self.num_cross, self.num_cross_kv = (H // 2, Hkv // 2) if is_hybrid else (0, 0)
        self.query = Heads(config, H)
        if makes_keys:
            self.key = Heads(config, Hkv)
            self.value = nn.Linear(config.hidden_size, Hkv * config.head_dim, bias=False)

    def values(self, x: Tensor) -> Tensor:
        return self.value(x).unflatten(-1, (-1, self.head_dim))

    def forward(
        self, concepts_BCd: Tensor, anchor_angles: Angles | None, k_TKD: Tensor, v_TKD: Tensor, packed: Packed
    ) -> Tensor:
        """What each concept read, [B, C, H * D]."""
        q_BCHD, where = self.query(concepts_BCd, anchor_angles), (packed.cu_seqlens, packed.max_seqlen)
        h, g = self.num_cross, self.num_cross_kv
        read_BCHD, _ = slot_attention(q_BCHD[:, :, h:], k_TKD[:, g:], v_TKD[:, g:], *where, normalize=self.normalize)
        if h > 0:
            crossed_BCHD = concept_attention(q_BCHD[:, :, :h], k_TKD[:, :g], v_TKD[:, :g], *where)
            read_BCHD = torch.cat((crossed_BCHD, read_BCHD), dim=2)
        return read_BCHD.flatten(-2)


class ResidualUpdate(nn.Module):
    """c + out(read)"""

    def __init__(self, config: ConceptConfig):
        super().__init__()
        self.out = ResidualLinear(config.hidden_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, c_BCd: Tensor, read_BCd: Tensor) -> Tensor:
        return c_BCd + self.dropout(self.out(read_BCd))


class GatedUpdate(nn.Module):
    """A GRU cell whose state is the concept:

        r, z = sigmoid(W [read, c] + (0, keep));   n = tanh(U read + r * V c);   c <- z * c + (1 - z) * n

    W and V start at zero and the constant ``keep`` such that z = 1 - 1/2L over all L updates of a forward pass: a
    concept starts by keeping what sets it apart, about e^(-1/2) of it to the end, and by taking in what it read.

    Source: Cho et al. 2014, arXiv:1406.1078, as used by slot attention (Locatello et al. 2020, arXiv:2006.15055).
    """

    def __init__(self, config: ConceptConfig):
        super().__init__()
        d = config.hidden_size
        self.gates = ZeroLinear(2 * d, 2 * d)
        self.from_read = nn.Linear(d, d, bias=False)
        self.from_concept = ZeroLinear(d, d)
        self.dropout = nn.Dropout(config.dropout)
        self.keep = math.log(2 * config.iterations - 1)  # sigmoid^-1(1 - 1/2L)

    def forward(self, c_BCd: Tensor, read_BCd: Tensor) -> Tensor:
        read_BCd = self.dropout(read_BCd)
        reset, keep = self.gates(torch.cat((read_BCd, c_BCd.to(read_BCd.dtype)), dim=-1)).chunk(2, dim=-1)
        new = torch.tanh(self.from_read(read_BCd) + torch.sigmoid(reset) * self.from_concept(c_BCd))
        return torch.lerp(new.to(c_BCd.dtype), c_BCd, torch.sigmoid(keep + self.keep).to(c_BCd.dtype))


class SlotLayer(ConceptLayer):
    """Concepts compete for tokens before they think.

        c <- update(c, read)        gated or residual

    Source: Locatello et al. 2020, arXiv:2006.15055, here with several heads and with concepts that start distinct.
    """

    def __init__(self, config: ConceptConfig, makes_keys: bool = True, is_hybrid: bool = False):
        super().__init__(config, SlotHeads(config, is_hybrid, makes_keys))
        self.is_tied, self.hands_on = config.tie_layers, config.tie_layers or config.share_kv > 1
        self.update = GatedUpdate(config) if config.slot_update == "gated" else ResidualUpdate(config)

    def forward(
        self, c_BCd: Tensor, angles: ConceptAngles, tokens: Tokens, is_last: bool = False
    ) -> tuple[Tensor, Tokens]:
        tokens = with_keys_values(self.read, tokens, self.is_tied)
        read = self.read(self.read_norm(c_BCd), angles.reading, *tokens.keys_values, tokens.packed)
        c_BCd = self.read_close(self.update(c_BCd, read))
        return self.think(c_BCd, angles), tokens if self.hands_on else tokens._replace(keys_values=None)


class HybridLayer(SlotLayer):
    """A slot layer in which half of the heads read without competition."""

    def __init__(self, config: ConceptConfig, makes_keys: bool = True):
        super().__init__(config, makes_keys, is_hybrid=True)


LAYERS = {"cross": CrossLayer, "bixt": BixtLayer, "slot": SlotLayer, "hybrid": HybridLayer}


def build_layers(config: ConceptConfig) -> nn.ModuleList:
    """The one tied layer, or L layers, of which the last of "bixt" leaves tokens alone.

    With init_queries = state what each writes to the concepts starts at zero.
    """
    kind, num_layers = LAYERS[config.layer_kind], config.num_hidden_layers
    if config.tie_layers:
        layers = [kind(config)]
    elif config.layer_kind == "bixt":
        layers = [BixtLayer(config, updates_tokens=i < num_layers - 1) for i in range(num_layers)]
    else:
        layers = [kind(config, makes_keys=i % config.share_kv == 0) for i in range(num_layers)]
    layers = nn.ModuleList(layers)
    for module in layers.modules():
        if config.init_queries == "state" and isinstance(module, ResidualLinear):
            module.starts_at_zero = True
    return layers
