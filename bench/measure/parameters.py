"""How many parameters a model has, by part, in closed form.

V vocabulary, C concepts, d model width, e width of tokens, k width of the keys, D head width, I feed-forward width.
"""

from ...models.backbone_flops import counted
from ...models.config import ConceptConfig
from ...models.layers import TimestepEmbedding
from ...models.mixing import CopeMixing
from ...models.queries import AnchorFeatures
from ...models.token_layers import CONV_RADIUS


def parameters(config: ConceptConfig) -> dict[str, int]:
    """Parameters of a ``ConceptForMaskedLM`` by part; those of a table that is used twice count where it is first."""
    V, d, e = config.vocab_size, config.hidden_size, config.token_dim
    num_layers = 1 if config.tie_layers else config.num_hidden_layers
    closing = d if config.block_norm == "sandwich" else 0
    thin = e * d if e != d else 0
    places = (2 * CopeMixing.MAX_PLACES + 1) * config.head_dim if config.concept_positions == "cope" else 0
    return {
        "backbone": counted(config).parameters if config.backbone else 0,
        "embedding": (0 if config.backbone else V * e) + thin + d + positions(config, e),
        "tokens": config.num_token_layers * token_layer(config) + token_updates(config),
        "concepts": concepts(config),
        "read": num_layers * (d + closing) + reads(config, num_layers),
        "mix": num_layers * (d + closing + attention(config) + places),
        "feed": num_layers * (d + closing + feed_forward(config)),
        "decoder": decoder(config),
        "head": V + thin + (0 if config.tie_word_embeddings else V * e),
    }


def positions(config: ConceptConfig, width: int) -> int:
    return config.max_position_embeddings * width if config.token_positions == "learned" else 0


def concepts(config: ConceptConfig) -> int:
    """Rows, or the network that makes them of anchors; learned places; what stands for withheld ones."""
    C, d, features = config.num_concepts, config.hidden_size, AnchorFeatures.NUM_FEATURES
    rows = {"anchor": features * d + d + d * d + d, "state": 0}.get(config.init_queries, C * d)
    return rows + C * d * (config.concept_positions == "learned") + C * d * (config.condition_dropout > 0)


def heads(width: int, key_width: int, head_dim: int) -> int:
    """A projection to heads, with the vector on them and their norm."""
    return width * key_width + 2 * head_dim


def attention(config: ConceptConfig) -> int:
    """2 d^2 + 2 d k, and the vectors and norms of queries and keys."""
    d, D, k = config.hidden_size, config.head_dim, config.num_key_value_heads * config.head_dim
    return heads(d, d, D) + heads(d, k, D) + d * k + d * d


def feed_forward(config: ConceptConfig) -> int:
    return 3 * config.hidden_size * config.intermediate_size


def reads(config: ConceptConfig, num_layers: int) -> int:
    """The reads of all layers, without their norms."""
    d, D, k = config.hidden_size, config.head_dim, config.num_key_value_heads * config.head_dim
    match config.layer_kind:
        case "cross":
            return num_layers * attention(config) - num_borrowing(config) * (heads(d, k, D) + d * k)
        case "bixt":
            return num_layers * (2 * heads(d, d, D) + 2 * d * d) + num_telling(config) * 2 * d * d
    update = 4 * d * d + 2 * d + d * d + d * d + d if config.slot_update == "gated" else d * d
    making = num_layers - num_borrowing(config)
    return num_layers * (heads(d, d, D) + update) + making * (heads(d, k, D) + d * k)


def num_borrowing(config: ConceptConfig) -> int:
    """Layers that read the keys and values of one before them and own none."""
    return 0 if config.tie_layers else config.num_hidden_layers - -(-config.num_hidden_layers // config.share_kv)


def num_telling(config: ConceptConfig) -> int:
    """Layers of BiXT whose tokens read concepts: all but the last, or the one that is tied."""
    return 1 if config.tie_layers else config.num_hidden_layers - 1


def token_updates(config: ConceptConfig) -> int:
    """BiXT's norm of tokens in every layer; feed-forward and norms where tokens are updated."""
    if config.layer_kind != "bixt":
        return 0
    d, num_layers = config.hidden_size, 1 if config.tie_layers else config.num_hidden_layers
    norms = 3 * d if config.block_norm == "sandwich" else d
    return num_layers * d + num_telling(config) * (norms + feed_forward(config))


def token_layer(config: ConceptConfig) -> int:
    e, inner = config.token_dim, 2 * config.token_dim
    k = config.num_token_heads * config.token_head_dim
    is_conv = config.token_mixer == "conv"
    mixer = (2 * CONV_RADIUS + 1) * e + e * e if is_conv else 2 * e * e + 2 * e * k
    return 2 * e + mixer + 3 * e * inner


def decoder(config: ConceptConfig) -> int:
    d, e, D, k = config.hidden_size, config.token_dim, config.head_dim, config.num_key_value_heads * config.head_dim
    if config.decoder_queries == "token+position":
        total = positions(config, e) + (e * d if e != d else 0)
        total += 0 if config.tie_word_embeddings else config.vocab_size * e
    else:
        total = positions(config, d) + d
    is_weighted = config.decoder_queries == "weighted"
    layer = feed_forward(config) + (d + k + 4 * D + d * k + d * d if is_weighted else attention(config))
    num_norms, chunks = 2, 3 * 2  # of a layer: gate, shift and scale before each of its two branches
    if config.decoder_mixing == "local":
        layer, num_norms, chunks = layer + attention(config), num_norms + 1, chunks + 3
    elif config.decoder_mixing == "concepts":
        layer, num_norms, chunks = layer + attention(config), num_norms + 2, chunks + 2 + 3
    num_norms, chunks = config.num_decoder_layers * num_norms + 1, config.num_decoder_layers * chunks + 2
    if is_weighted and config.decoder_mixing == "none":  # a branch that looks at no row needs no norm
        num_norms, chunks = num_norms - config.num_decoder_layers, chunks - 2  # but later ones have a gate
    norms = num_norms * d
    if config.timestep_conditioning:
        norms = chunks * (d * d + d) + TimestepEmbedding.NUM_FEATURES * d + d + d * d + d
    return total + d + config.num_decoder_layers * layer + norms
