"""The five decisions that make a concept encoder, each with its fields: default, what is allowed, what it means.

``ConceptConfig`` holds all fields side by side, as transformers stores them; ``config.decisions()`` gives them back in
these groups. What depends on other fields is checked there: all of a field that names no range here.
"""

import re
from dataclasses import dataclass, field, fields
from typing import Any

from .ranges import (
    Allowed,
    at_least,
    count,
    count_or_none,
    given,
    is_count,
    metadata,
    number,
    one_of,
    or_nothing,
    positive,
    share,
    switch,
)  # fmt: skip


def is_rising(x: Any) -> bool:
    """A list of whole numbers, each larger than the one before it."""
    return isinstance(x, list | tuple) and len(x) > 0 and all(is_count(i, 0) for i in x) and list(x) == sorted(set(x))


def is_trained(x: Any) -> bool:
    return isinstance(x, str) and bool(re.fullmatch(r"none|all|last [1-9]\d{0,5}", x))


DESCRIBED = metadata(or_nothing(Allowed("the description of a pretrained model", lambda x: isinstance(x, dict))))
RISING = metadata(or_nothing(Allowed("rising whole numbers", is_rising)))
LAYERS = metadata(or_nothing(Allowed("a whole number, or rising ones", lambda x: is_count(x, 0) or is_rising(x))))
TRAINED = Allowed("none, all, or last N", is_trained)


@dataclass(frozen=True)
class Size:
    """How large it is."""

    vocab_size: int = count(50368)
    hidden_size: int = count(512)  # d, of concepts, and of tokens where concepts read them
    token_dim: int | None = count_or_none()  # width of embeddings, token layers and the tied head; None: hidden_size
    num_concepts: int = count(128)  # C
    num_hidden_layers: int = count(2)  # of the encoder; with tie_layers how often the one layer is applied
    num_attention_heads: int = count(8)  # H
    num_key_value_heads: int | None = count_or_none()  # Hkv; None: H
    intermediate_size: int = count(1024)  # width of the gated feed-forward
    num_decoder_layers: int = count(2)
    dropout: float = share(0.0)  # of every residual branch
    initializer_range: float = positive(0.02)  # of embeddings; every other matrix starts at 1 / sqrt(fan in)
    norm_eps: float = positive(1e-6)


@dataclass(frozen=True)
class Tokens:
    """What happens to tokens before concepts read them: nothing, layers of their own, or a pretrained model."""

    num_token_layers: int = count(0, least=0)
    token_mixer: str = one_of("local", "conv")  # local: windowed attention; conv: depthwise convolution
    token_window: int = count(64)  # a token reads those at most this far away
    normalize_tokens: bool = switch(True)  # layers start from normalised embeddings; false: from embeddings as they are
    funnel: list[int] | None = field(default=None, metadata=RISING)  # token layers (from 0) that halve their number
    # what backbone_source.describe says; in a recipe a folder or hub id
    backbone: dict | None = field(default=None, metadata=DESCRIBED)
    backbone_layers: int | list[int] | None = field(default=None, metadata=LAYERS)  # the first so many, or a list
    backbone_bridges: bool = switch()  # linear maps where layers of it were left out between others
    backbone_window: int = count(256)  # tokens that it sees at once, special ones included
    backbone_overlap: int = count(0, least=0)  # tokens that two windows share
    backbone_train: str = given("none", TRAINED)  # none, last N (of its layers), or all
    backbone_two_sided: bool = switch()  # a causal one without its mask


@dataclass(frozen=True)
class Places:
    """Where tokens and concepts stand, and what concepts are before they have read anything."""

    token_positions: str = one_of("rope", "learned", "sinusoidal")
    # rope: a concept stands at its anchor; else all stand at position 0
    concept_positions: str = one_of("rope", "cope", "learned", "sinusoidal", "none")
    max_position_embeddings: int = count(512)  # rows of learned positions; the length that rope_extension extends
    rope_theta: float = positive(10000.0)
    rope_extension: str = one_of("none", "linear", "ntk", "yarn")
    rope_factor: float = at_least(1, 1.0)  # how many times max_position_embeddings a text may be long
    anchor_bias: float = at_least(0, 3.0)  # 0: attention starts blind to distance; larger: it starts near the anchor
    anchor_sharpness: float = positive(2.0)  # initial weight of the norms of queries and keys: how near is near
    # segment: each concept starts from the mean of the tokens around its anchor; state: from that of the backbone's
    # states, and the layers start as the identity (``ConceptQueries``)
    init_queries: str = one_of("segment", "orthogonal", "embedding", "anchor", "state")
    row_scale: float = positive(0.5)  # with state: how large the fixed rows are beside states of mean square 1


@dataclass(frozen=True)
class Reading:
    """How concepts read tokens, and how often."""

    layer_kind: str = one_of("cross", "bixt", "slot", "hybrid")  # hybrid: half the heads cross, half slot
    slot_normalize: str = one_of("mean", "sum")  # of slot attention: weighted mean, or sum scaled by N / C
    slot_update: str = one_of("gated", "residual")  # gated: a GRU takes what a slot read; residual: it is added
    block_norm: str = one_of("pre", "sandwich")  # sandwich: also after each branch, so that any K stays bounded
    share_kv: int = count(1)  # so many layers in a row share one projection to keys and values
    tie_layers: bool = switch()  # one layer, applied K times
    num_iterations: int | None = count_or_none()  # K of tied layers; None: num_hidden_layers
    iteration_sampling: str = one_of("fixed", "random")  # random: K of each training step is drawn
    max_iterations: int = count(16)  # of a K that is drawn; num_iterations is its mean
    backprop_iterations: int | None = count_or_none()  # gradients flow through the last of the iterations; None: all


@dataclass(frozen=True)
class Answers:
    """What is asked of concepts: rows of a decoder, and heads of tasks."""

    decoder_queries: str = one_of("token+position", "position", "weighted")
    decoder_mixing: str = one_of("none", "concepts", "local")  # how target rows see each other
    decoder_window: int = count(64)  # of local mixing: a row reads those at most this far away
    timestep_conditioning: bool = switch()  # AdaLN-Zero in the decoder
    nested_concepts: bool = switch()  # the decoder of a training step gets the first k concepts, k drawn evenly
    condition_dropout: float = share(0.0)  # share of texts whose concepts are withheld in training, for guidance
    hidden_tokens: str = one_of("drop", "mask")  # what the encoder sees of a hidden token: nothing, or [MASK]
    pool: str = one_of("mean", "weighted", "attention", "cls_query", "multi_query", "decoder", "decoder_positions")
    num_pool_queries: int = count(4)  # of multi_query
    pair: str = one_of("joint", "separate")  # two texts as one sequence, or each encoded by itself
    pair_features: str = one_of("concat", "cosine", "slots")  # of separate pairs: [a, b, |a - b|, a * b], or cosines
    num_question_concepts: int = count(8)  # Q of a question about a text that is read by itself
    asked_reading: bool = switch()  # a question's concepts join those that read the text: C + Q rows instead of C
    label_offset: float = given(0.0, number())  # a regression predicts label_offset + label_scale * x,
    label_scale: float = positive(1.0)  # with x = 0 at the start


DECISIONS = {"size": Size, "tokens": Tokens, "places": Places, "reading": Reading, "answers": Answers}
FIELDS = {each.name: each for group in DECISIONS.values() for each in fields(group)}
ALLOWED: dict[str, Allowed] = {name: each.metadata["allowed"] for name, each in FIELDS.items()}
CHOICES = {name: allowed.choices for name, allowed in ALLOWED.items() if allowed.choices}
