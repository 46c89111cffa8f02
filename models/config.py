"""ConceptConfig: one flat description of an architecture, checked when it is made."""

from transformers import PretrainedConfig

LAYER_KINDS = ("cross",)
QUERY_INITS = ("segment", "orthogonal", "embedding")
TOKEN_POSITIONS = ("rope",)
CONCEPT_POSITIONS = ("rope", "none")
DECODER_QUERIES = ("token+position", "position")
HIDDEN_TOKENS = ("drop", "mask")


class ConceptConfig(PretrainedConfig):
    """Describes a concept encoder, its decoder and its head.

    Every error in a field, or between two fields, is a ``ValueError`` of one line at construction.
    """

    model_type = "conceptron"

    def __init__(
        self,
        vocab_size: int = 50368,
        hidden_size: int = 512,  # d, of concepts and tokens
        num_concepts: int = 128,  # C
        num_hidden_layers: int = 2,  # of the encoder
        num_attention_heads: int = 8,  # H
        num_key_value_heads: int | None = None,  # Hkv, None: H
        intermediate_size: int = 1024,  # width of the gated feed-forward
        layer_kind: str = "cross",
        init_queries: str = "segment",  # segment: each concept starts from the mean of the tokens around its anchor
        token_positions: str = "rope",
        concept_positions: str = "rope",  # rope: a concept stands at its anchor; none: all stand at position 0
        rope_theta: float = 10000.0,
        anchor_bias: float = 3.0,  # 0: attention starts blind to distance; larger: it starts by reading near the anchor
        anchor_sharpness: float = 2.0,  # initial weight of the norms of queries and keys: how near is near
        num_decoder_layers: int = 2,
        decoder_queries: str = "token+position",
        timestep_conditioning: bool = False,  # AdaLN-Zero in the decoder
        hidden_tokens: str = "drop",  # what stands for a hidden token in the encoder's input: nothing, or [MASK]
        dropout: float = 0.0,  # of every residual branch
        initializer_range: float = 0.02,  # of embeddings; every other matrix starts at 1 / sqrt(fan in)
        norm_eps: float = 1e-6,
        tie_word_embeddings: bool = True,
        pad_token_id: int | None = None,
        mask_token_id: int | None = None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_concepts = num_concepts
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.intermediate_size = intermediate_size
        self.layer_kind = layer_kind
        self.init_queries = init_queries
        self.token_positions = token_positions
        self.concept_positions = concept_positions
        self.rope_theta = rope_theta
        self.anchor_bias = anchor_bias
        self.anchor_sharpness = anchor_sharpness
        self.num_decoder_layers = num_decoder_layers
        self.decoder_queries = decoder_queries
        self.timestep_conditioning = timestep_conditioning
        self.hidden_tokens = hidden_tokens
        self.dropout = dropout
        self.initializer_range = initializer_range
        self.norm_eps = norm_eps
        self.mask_token_id = mask_token_id
        self.check()
        super().__init__(tie_word_embeddings=tie_word_embeddings, pad_token_id=pad_token_id, **kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def check(self) -> None:
        """Raises ValueError with the field, what was expected and what came."""
        for name in ("vocab_size", "hidden_size", "num_concepts", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "intermediate_size", "num_decoder_layers"):  # fmt: skip
            self._expect(name, "a whole number of at least 1", lambda x: _is_int(x) and x >= 1)
        for name, allowed in (
            ("layer_kind", LAYER_KINDS), ("init_queries", QUERY_INITS), ("token_positions", TOKEN_POSITIONS),
            ("concept_positions", CONCEPT_POSITIONS), ("decoder_queries", DECODER_QUERIES),
            ("hidden_tokens", HIDDEN_TOKENS),
        ):  # fmt: skip
            self._expect(name, f"one of {', '.join(allowed)}", lambda x, allowed=allowed: x in allowed)
        self._expect("dropout", "a number in [0, 1)", lambda x: _is_number(x) and 0 <= x < 1)
        self._expect("timestep_conditioning", "true or false", lambda x: isinstance(x, bool))
        for name in ("rope_theta", "anchor_sharpness", "initializer_range", "norm_eps"):
            self._expect(name, "a number above 0", lambda x: _is_number(x) and x > 0)
        self._expect("anchor_bias", "a number of at least 0", lambda x: _is_number(x) and x >= 0)
        self._expect(
            "mask_token_id", f"an id below vocab_size = {self.vocab_size}, or none",
            lambda x: x is None or (_is_int(x) and 0 <= x < self.vocab_size),
        )  # fmt: skip
        self._expect(
            "hidden_size", f"a multiple of num_attention_heads = {self.num_attention_heads}",
            lambda x: x % self.num_attention_heads == 0,
        )  # fmt: skip
        self._expect(
            "hidden_size", f"an even width per head with num_attention_heads = {self.num_attention_heads}, for RoPE",
            lambda x: (x // self.num_attention_heads) % 2 == 0,
        )  # fmt: skip
        self._expect(
            "num_key_value_heads", f"a divisor of num_attention_heads = {self.num_attention_heads}",
            lambda x: self.num_attention_heads % x == 0,
        )  # fmt: skip

    def _expect(self, name: str, expected: str, holds) -> None:
        value = getattr(self, name)
        if not holds(value):
            raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
