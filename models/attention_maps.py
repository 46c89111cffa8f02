"""Which tokens a concept reads, and how much: the weights of a read, made again exactly for those who ask.

The fused operators never hold them. Here they are made of the same queries and keys, in float32, a text and a head at a
time: 16,384 tokens and 128 concepts take 8 MiB.

B sequences, T packed tokens, N tokens of one sequence, C concepts, H heads, Hkv key/value heads, D head width.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import ConceptConfig
from .door import Door
from .encoder_layers import BixtLayer, ConceptAngles, SlotLayer, Tokens, with_keys_values
from .packing import Packed

EPS = 1e-8  # of the slots' weighted mean, as in the operator
MAX_WEIGHTS = 2**28  # that a call hands out at once: 1 GiB

# before each layer: the layer, concepts [B, C, d], where they stand, tokens
Watch = Callable[[nn.Module, Tensor, ConceptAngles, Tokens], None]


class Read(NamedTuple):
    """Of one layer."""

    queries: Tensor  # [B, C, H, D]
    keys: Tensor  # [T, Hkv, D]
    num_cross: int  # the first so many heads have their softmax over tokens, the others theirs over concepts
    normalize: str  # of those others, see ``kernels.slot_attention``
    packed: Packed

    @property
    def num_heads(self) -> int:
        return self.queries.shape[2]

    def texts(self) -> Iterator[tuple[int, slice]]:
        """(b, its rows among the T) of each text."""
        for b, (start, end) in enumerate(pairwise(self.packed.cu_seqlens.tolist())):
            yield b, slice(start, end)

    def head(self, b: int, rows: slice, head: int) -> tuple[Tensor, Tensor]:
        """Two float32 matrices [C, N] of one head of text b:

            weights  what the values of tokens are multiplied by in the sum that concept c reads; over the tokens they
                     add up to 1, but for slots with normalize = sum, where they do so on average over concepts
            shares   of token n among the concepts; over the concepts they add up to 1
        """
        q_CD, k_ND = self.queries[b, :, head].float(), self.keys[rows, head * self.keys.shape[1] // self.num_heads]
        scores_CN = (q_CD @ k_ND.float().T) * q_CD.shape[-1] ** -0.5
        if head < self.num_cross:
            weights_CN = scores_CN.softmax(1)
            return weights_CN, weights_CN / weights_CN.sum(0).clamp_min(torch.finfo(torch.float32).tiny)
        shares_CN = scores_CN.softmax(0)
        if self.normalize == "sum":
            return shares_CN * (scores_CN.shape[0] / max(1, scores_CN.shape[1])), shares_CN
        return (shares_CN + EPS) / (shares_CN + EPS).sum(1, keepdim=True), shares_CN

    def mean(self, b: int, rows: slice) -> tuple[Tensor, Tensor]:
        """The same two, averaged over the heads."""
        weights, shares = self.head(b, rows, 0)
        for head in range(1, self.num_heads):
            more_weights, more_shares = self.head(b, rows, head)
            weights, shares = weights + more_weights, shares + more_shares
        return weights / self.num_heads, shares / self.num_heads


@torch.no_grad()
def read_of(layer: nn.Module, c_BCd: Tensor, angles: ConceptAngles, tokens: Tokens) -> Read:
    """What a layer, whatever its kind, is about to read; ``tokens`` whole, with their states."""
    x_BCd = layer.read_norm(c_BCd)
    if isinstance(layer, BixtLayer):
        queries = layer.read.concept_key(x_BCd, angles.reading)
        keys = layer.read.token_key(layer.token_norm(tokens.states), tokens.angles)
        return Read(queries, keys, queries.shape[2], "", tokens.packed)
    is_tied = layer.is_tied if isinstance(layer, SlotLayer) else layer.read.is_tied
    keys, _ = with_keys_values(layer.read, tokens, is_tied).keys_values
    queries = layer.read.query(x_BCd, angles.reading)
    if isinstance(layer, SlotLayer):
        return Read(queries, keys, layer.read.num_cross, layer.read.normalize, tokens.packed)
    return Read(queries, keys, queries.shape[2], "", tokens.packed)


class Rows:
    """Collects the weights of every layer by token: [T, H, C] float32 each.

    Raises:
        ValueError: concepts read merged tokens, or each device holds a part of every text, or the weights would be too
            many.
    """

    def __init__(
        self, config: ConceptConfig, packed: Packed, num_iterations: int | None, num_concepts: int | None,
        is_shared: bool,
    ) -> None:  # fmt: skip
        if config.funnel:
            raise ValueError("output_attentions: expected False with funnel: concepts read tokens that it has merged")
        if is_shared:
            raise ValueError("output_attentions: expected False where each device holds a part of every text")
        num_layers = (num_iterations or config.iterations) if config.tie_layers else config.num_hidden_layers
        check_size(packed.num_tokens, config.num_attention_heads, num_concepts or config.num_concepts, num_layers)
        self.packed = packed
        self.layers: list[Tensor] = []

    @torch.no_grad()
    def watch(self, layer: nn.Module, c_BCd: Tensor, angles: ConceptAngles, tokens: Tokens) -> None:
        read = read_of(layer, c_BCd, angles, tokens)
        rows_THC = c_BCd.new_zeros(self.packed.num_tokens, read.num_heads, c_BCd.shape[1], dtype=torch.float32)
        for b, rows in read.texts():
            for head in range(read.num_heads):
                rows_THC[rows, head] = read.head(b, rows, head)[0].T
        self.layers.append(rows_THC)

    def maps(self) -> tuple[Tensor, ...]:
        """[H, C, T] of each layer."""
        return tuple(rows_THC.movedim(0, -1) for rows_THC in self.layers)


def spread(maps: tuple[Tensor, ...], door: Door, read_T: Tensor | None = None) -> tuple[Tensor, ...]:
    """Maps [H, C, T] as the texts came: [B, H, C, N] of a padded batch, [1, H, C, T] of a flattened one, else as they
    are.

    ``read_T``: which of the door's tokens were read, bool; None: all. The others have no weight.
    """
    found = []
    for map_HCT in maps:
        rows_THC = map_HCT.movedim(-1, 0)
        if read_T is not None:
            all_THC = rows_THC.new_zeros(len(read_T), *rows_THC.shape[1:])
            all_THC[read_T] = rows_THC
            rows_THC = all_THC
        found.append(door.spread(rows_THC).movedim(-3, -1))
    return tuple(found)


def check_size(num_tokens: int, num_heads: int, num_concepts: int, num_layers: int) -> None:
    """
    Raises:
        ValueError: so many weights would take more than 1 GiB.
    """
    count = num_tokens * num_heads * num_concepts * num_layers
    if count > MAX_WEIGHTS:
        raise ValueError(
            f"output_attentions: expected at most {MAX_WEIGHTS:,} weights (1 GiB), got {count:,}: {num_layers} layers "
            f"x {num_heads} heads x {num_concepts} concepts x {num_tokens:,} tokens; give fewer texts, or watch layer "
            "by layer (encoder.encode(..., watch=), models/attention_maps.py)"
        )
