"""Matmul FLOPs of a training step, by part, from the sizes of a view: what model FLOPs utilisation is a share of.

A multiply and an add count as two. Only matrix products count, not norms, softmax, RoPE or embedding look-ups. The
backward pass costs twice the forward: recomputation inside an operator is not useful work and is not counted.

B sequences, T tokens the encoder reads, R rows of tokens after a funnel, C concepts, M target rows, Q rows of the
decoder (M, and context that nobody asks for), d model width, e width of tokens, k width of the keys, I feed-forward
width, V vocabulary, K layers or iterations.
"""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass

from .backbone_flops import backbone_flops
from .config import ConceptConfig
from .layers import TimestepEmbedding
from .mixing import CopeMixing
from .objectives.view import View
from .queries import AnchorFeatures
from .token_layers import CONV_RADIUS

BACKWARD = 2  # times the forward pass


@dataclass(frozen=True)
class Sizes:
    """What the cost of one view depends on."""

    num_sequences: int  # B
    num_tokens: int  # T
    num_targets: int  # M
    num_rows: int  # Q
    longest: int  # tokens of the longest sequence
    longest_rows: int  # rows of the decoder of the longest sequence
    are_stored: bool = False  # the states of a backbone, which then computes nothing

    @classmethod
    def of(cls, view: View) -> "Sizes":
        encoder = view.encoder
        return cls(
            encoder.num_sequences, encoder.num_tokens, view.num_targets, len(view.decoder_position_ids),
            encoder.max_seqlen, view.decoder_max_seqlen, encoder.states is not None,
        )  # fmt: skip

    @classmethod
    def of_text(cls, num_tokens: int) -> "Sizes":
        """One text of N tokens, each of which is read and asked for."""
        return cls(1, num_tokens, num_tokens, num_tokens, num_tokens, num_tokens)


def forward_flops(config: ConceptConfig, sizes: Sizes) -> dict[str, int]:
    """FLOPs of one forward pass, by part: each is linear in T and in M."""
    return {**encoder_flops(config, sizes), "decoder": decoder(config, sizes), "head": head(config, sizes)}


def encoder_flops(config: ConceptConfig, sizes: Sizes) -> dict[str, int]:
    """Those of the encoder alone."""
    return {
        "backbone": 0 if sizes.are_stored else backbone_flops(config, sizes.num_sequences, sizes.num_tokens),
        "embedding": embedding(config, sizes),
        "tokens": token_layers(config, sizes) + token_updates(config, sizes),
        "concepts": queries(config),
        "read": read(config, sizes),
        "mix": mix(config, sizes),
        "feed": feed(config, sizes),
    }


def training_flops(
    config: ConceptConfig, sizes: Sizes, forward_of: Callable[..., dict[str, int]] = forward_flops
) -> dict[str, int]:  # fmt: skip
    """FLOPs of forward and backward together, by part; iterations that pass no gradient have no backward, nor have
    layers of a backbone that are not trained. ``forward_of``: ``encoder_flops`` for the encoder alone."""
    forward = forward_of(config, sizes)
    through = forward
    if config.backprop_iterations is not None and config.iterations > config.backprop_iterations:
        short = {"num_iterations": config.backprop_iterations, "backprop_iterations": None}
        through = {**forward, **encoder_flops(ConceptConfig(**{**config.to_dict(), **short}), sizes)}
    trained = backbone_flops(config, sizes.num_sequences, sizes.num_tokens, trained_only=True)
    through = {**through, "backbone": trained}
    return {part: flops + BACKWARD * through[part] for part, flops in forward.items()}


def step_flops(config: ConceptConfig, sizes: Sizes) -> int:
    """FLOPs of forward and backward together."""
    return sum(training_flops(config, sizes).values())


def view_flops(config: ConceptConfig, view: View) -> int:
    """The same of a view, with as many concepts as its texts are read into."""
    return step_flops(resized(config, view.num_concepts), Sizes.of(view))


def resized(config: ConceptConfig, num_concepts: int | None) -> ConceptConfig:
    """With another number of concepts, to be counted only: its fields are not checked again, which would take
    milliseconds of every step. None: its own."""
    if num_concepts in (None, config.num_concepts):
        return config
    other = copy(config)
    other.num_concepts = num_concepts
    return other


def embedding(config: ConceptConfig, sizes: Sizes) -> int:
    """2 R e d, from the width of tokens to that of the model; nothing where they are the same."""
    rows, _ = funnelled(config, sizes)
    return 2 * rows * config.token_dim * config.hidden_size if config.token_dim != config.hidden_size else 0


def token_layers(config: ConceptConfig, sizes: Sizes) -> int:
    """Layers of tokens before concepts read them.

        local    4 R e^2  +  4 R e k  +  4 R e 3W  +  6 R e I       queries and output, keys and values, the window
        conv     2 R e (25 + e)  +  6 R e I                         five taps, each picked among five; pointwise
        funnel   queries, output and feed-forward at half of R, 4W keys

    W is the window, or the longest text. Blocks of W rows read three, as they are computed.
    """
    e, inner = config.token_dim, 2 * config.token_dim
    k = config.num_token_heads * config.token_head_dim
    taps, total = 2 * CONV_RADIUS + 1, 0
    for rows, rows_out, longest in token_stages(config, sizes):
        total += 6 * rows_out * e * inner
        if config.token_mixer == "conv":
            total += 2 * rows * e * (taps * taps + e)
            continue
        W = max(1, min(config.token_window, longest))
        seen = 3 * W if rows == rows_out else 4 * W
        total += 4 * rows_out * e * e + 4 * rows * e * k + 4 * in_blocks(rows_out, W) * e * seen
    return total


def token_stages(config: ConceptConfig, sizes: Sizes) -> Iterator[tuple[int, int, int]]:
    """Of each layer of tokens the rows that go in, those that come out, and the longest sequence that goes in."""
    rows, B = sizes.num_tokens, sizes.num_sequences
    longest = sizes.longest
    for i in range(config.num_token_layers):
        halves = config.funnel is not None and i in config.funnel
        rows_out = (rows + B) // 2 if halves else rows
        yield rows, rows_out, longest
        rows = rows_out
        if halves:
            longest = max((longest + 1) // 2, B if B > 1 else 0)


def funnelled(config: ConceptConfig, sizes: Sizes) -> tuple[int, int]:
    """(rows of tokens that concepts read, sequences): a funnel leaves one sequence more, of pairs that do not exist."""
    rows, B = sizes.num_tokens, sizes.num_sequences
    for _, rows_out, _ in token_stages(config, sizes):
        rows = rows_out
    return rows, B + 1 if config.funnel and B > 1 else B


def in_blocks(rows: int, width: int) -> int:
    """Rows when the last block is filled up."""
    return -(-rows // width) * width


def token_updates(config: ConceptConfig, sizes: Sizes) -> int:
    """BiXT's feed-forward of tokens, 6 T d I, after every layer but the last."""
    if config.layer_kind != "bixt":
        return 0
    return (config.iterations - 1) * 6 * sizes.num_tokens * config.hidden_size * config.intermediate_size


def queries(config: ConceptConfig) -> int:
    """2 C d (256 + d): concepts that a network makes of their anchors, once for the whole batch."""
    if config.init_queries != "anchor":
        return 0
    return 2 * config.num_concepts * config.hidden_size * (AnchorFeatures.NUM_FEATURES + config.hidden_size)


def read(config: ConceptConfig, sizes: Sizes) -> int:
    """How concepts read tokens, K times; keys and values are made ceil(K / share_kv) times, once by tied layers:

        cross    4 R d k  +  4 B C d^2  +  4 C R d                  keys and values; queries and output; attention
        bixt     4 R d^2  +  4 B C d^2  +  4 C R d                  and where tokens read too
                 2 R d^2  +  2 B C d^2  +  2 C R d                  the similarity is shared
        slot     4 R d k  +  for each of its reads  2 B C d^2  +  4 C R d  +  12 B C d^2 (gated) or 2 B C d^2 (residual)
        hybrid   as slot
    """
    rows, B = funnelled(config, sizes)
    C, d, K = config.num_concepts, config.hidden_size, config.iterations
    k = config.num_key_value_heads * config.head_dim
    made = (1 if config.tie_layers else -(-K // config.share_kv)) * 4 * rows * d * k
    match config.layer_kind:
        case "cross":
            return made + K * (4 * B * C * d * d + 4 * C * rows * d)
        case "bixt":
            both = 2 * rows * d * d + 2 * B * C * d * d + 2 * C * rows * d
            return K * 2 * both + (K - 1) * both
    update = 12 if config.slot_update == "gated" else 2
    return made + K * ((2 + update) * B * C * d * d + 4 * C * rows * d)


def mix(config: ConceptConfig, sizes: Sizes) -> int:
    """4 B C d (d + k) + 4 B C^2 d: the concepts of a text among themselves, K times; CoPE adds 2 B C d (2 P + 1)."""
    _, B = funnelled(config, sizes)
    C, d, k = config.num_concepts, config.hidden_size, config.num_key_value_heads * config.head_dim
    places = 2 * CopeMixing.MAX_PLACES + 1 if config.concept_positions == "cope" else 0
    return config.iterations * (4 * B * C * d * (d + k) + 4 * B * C * C * d + 2 * B * C * d * places)


def feed(config: ConceptConfig, sizes: Sizes) -> int:
    """6 B C d I: gate, up and down, K times."""
    _, B = funnelled(config, sizes)
    return config.iterations * 6 * B * config.num_concepts * config.hidden_size * config.intermediate_size


def decoder(config: ConceptConfig, sizes: Sizes) -> int:
    """A layer, and what every text adds with a timestep:

        read      4 B C d k  +  4 Q d^2  +  4 C Q d                 half of the first two with weighted queries
        local     4 Q d k  +  4 Q d^2  +  4 Q d 3W                  in blocks of W rows, as in ``token_layers``
        concepts  4 Q d k  +  4 B C d^2  +  4 C Q d                 the concepts read the rows first
        feed      6 Q d I
        time      2 B (256 d + d^2),  and for each norm 4 B d^2, 6 B d^2 if it closes a branch

    Concepts that training withholds are counted as if they were there.
    """
    B, C, d = sizes.num_sequences, config.num_concepts, config.hidden_size
    Q, k = sizes.num_rows, config.num_key_value_heads * config.head_dim
    products = 2 if config.decoder_queries == "weighted" else 4
    layer = products * (B * C * d * k + Q * d * d) + 4 * C * Q * d + 6 * Q * d * config.intermediate_size
    chunks = 3 * 2  # of every layer's norms: gate, shift and scale before each of its two branches
    if config.decoder_mixing == "local":
        W = max(1, min(config.decoder_window, sizes.longest_rows))
        layer += 4 * Q * d * (d + k) + 4 * in_blocks(Q, W) * d * 3 * W
        chunks += 3
    elif config.decoder_mixing == "concepts":
        layer += 4 * Q * d * k + 4 * B * C * d * d + 4 * C * Q * d
        chunks += 2 + 3
    total = config.num_decoder_layers * layer
    if config.decoder_queries == "token+position" and config.token_dim != d:
        total += 2 * Q * config.token_dim * d
    if config.timestep_conditioning:
        chunks = config.num_decoder_layers * chunks + 2  # the first norm closes nothing, the last opens nothing
        if config.decoder_queries == "weighted" and config.decoder_mixing == "none":
            chunks -= 2  # the first branch looks at no row
        total += 2 * B * d * d * chunks + 2 * B * (TimestepEmbedding.NUM_FEATURES * d + d * d)
    return total


def head(config: ConceptConfig, sizes: Sizes) -> int:
    """2 M e V, and 2 M d e before it where tokens are thin."""
    M, d, e = sizes.num_targets, config.hidden_size, config.token_dim
    return 2 * M * e * config.vocab_size + (2 * M * d * e if e != d else 0)


def full_attention_flops(width: int, num_layers: int, inner: int, num_tokens: int) -> int:
    """An encoder like BERT on one text of N tokens: 8 N d^2 + 4 N^2 d + 4 N d I a layer."""
    N, d = num_tokens, width
    return num_layers * (8 * N * d * d + 4 * N * N * d + 4 * N * d * inner)
