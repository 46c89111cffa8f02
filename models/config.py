"""ConceptConfig: one flat description of an architecture, checked when it is made."""

from typing import ClassVar

from transformers import AutoConfig, PretrainedConfig

from .auto import register_models
from .backbone_config import CAUSAL, inner_config, layer_numbers, position_limit

CHOICES = {
    "layer_kind": ("cross", "bixt", "slot", "hybrid"),
    "slot_normalize": ("mean", "sum"),
    "slot_update": ("gated", "residual"),
    "block_norm": ("pre", "sandwich"),
    "iteration_sampling": ("fixed", "random"),
    "token_mixer": ("local", "conv"),
    "token_positions": ("rope", "learned", "sinusoidal"),
    "concept_positions": ("rope", "cope", "learned", "sinusoidal", "none"),
    "rope_extension": ("none", "linear", "ntk", "yarn"),
    "init_queries": ("segment", "orthogonal", "embedding", "anchor", "state"),
    "decoder_queries": ("token+position", "position", "weighted"),
    "decoder_mixing": ("none", "concepts", "local"),
    "hidden_tokens": ("drop", "mask"),
    "pool": ("mean", "weighted", "attention", "cls_query", "multi_query", "decoder", "decoder_positions"),
    "pair": ("joint", "separate"),
    "pair_features": ("concat", "cosine", "slots"),
}


class ConceptConfig(PretrainedConfig):
    """Describes a concept encoder, its decoder and its heads.

    Every error in a field, or between two fields, is a ``ValueError`` of one line at construction.
    """

    model_type = "conceptron"
    keys_to_ignore_at_inference: ClassVar = ["concepts", "nll"]  # transformers' Trainer then gathers logits only

    def __init__(
        self,
        # sizes
        vocab_size: int = 50368,
        hidden_size: int = 512,  # d, of concepts, and of tokens where concepts read them
        token_dim: int | None = None,  # width of embeddings, token layers and the tied head, None: hidden_size
        num_concepts: int = 128,  # C
        num_hidden_layers: int = 2,  # of the encoder; with tie_layers how often the one layer is applied
        num_attention_heads: int = 8,  # H
        num_key_value_heads: int | None = None,  # Hkv, None: H
        intermediate_size: int = 1024,  # width of the gated feed-forward
        # layers of the encoder
        layer_kind: str = "cross",  # how concepts read: cross, bixt, slot, or hybrid: half the heads cross, half slot
        slot_normalize: str = "mean",  # of slot attention: weighted mean, or sum scaled by N / C
        slot_update: str = "gated",  # gated: a GRU takes what a slot read; residual: it is added
        slot_iterations: int = 1,  # reads of a slot layer before its feed-forward, with the same weights
        block_norm: str = "pre",  # sandwich: also after each branch, so that any number of iterations stays bounded
        share_kv: int = 1,  # so many layers in a row read with one projection to keys and values, each its own queries
        tie_layers: bool = False,  # one layer, applied K times
        num_iterations: int | None = None,  # K of tied layers, None: num_hidden_layers
        iteration_sampling: str = "fixed",  # random: K of each training step is drawn, num_iterations on average
        max_iterations: int = 16,  # of a K that is drawn
        backprop_iterations: int | None = None,  # gradients flow through the last of the iterations only; None: all
        loss_every_iteration: bool = False,  # the decoder answers from each iteration, not the last only
        # layers of tokens before concepts read them
        num_token_layers: int = 0,
        token_mixer: str = "local",  # local: windowed attention; conv: depthwise convolution
        token_window: int = 64,  # a token reads those at most this far away
        token_num_attention_heads: int | None = None,  # None: as many of the model's head width as fit in token_dim
        token_num_key_value_heads: int | None = None,  # None: token_num_attention_heads
        token_intermediate_size: int | None = None,  # None: 2 * token_dim
        normalize_tokens: bool = True,  # token layers start from normalised embeddings; false: as they are, as in Llama
        funnel: list[int] | None = None,  # token layers (from 0) that halve the number of tokens
        # a pretrained model in their place, see models/backbone.py
        backbone: dict | None = None,  # what backbone_source.describe says of it; in a recipe a folder or a hub id
        backbone_layers: int | list[int] | None = None,  # which of its layers: the first so many, or a list; None: all
        backbone_window: int = 256,  # tokens that it sees at once, special ones included
        backbone_overlap: int = 0,  # tokens that two windows share
        backbone_train: str = "none",  # none, last N (of its layers), or all
        backbone_two_sided: bool = False,  # a causal one without its mask
        # positions
        token_positions: str = "rope",
        concept_positions: str = "rope",  # rope: a concept stands at its anchor; else all stand at position 0
        max_position_embeddings: int = 512,  # rows of learned positions; the length that rope_extension extends
        rope_theta: float = 10000.0,
        rope_extension: str = "none",
        rope_factor: float = 1.0,  # how many times max_position_embeddings a text may be long
        anchor_bias: float = 3.0,  # 0: attention starts blind to distance; larger: it starts by reading near the anchor
        anchor_sharpness: float = 2.0,  # initial weight of the norms of queries and keys: how near is near
        # concepts
        init_queries: str = "segment",  # segment: each concept starts from the mean of the tokens around its anchor;
        # state: from that of the backbone's states, and the layers start as the identity (ConceptQueries)
        row_scale: float = 0.5,  # with state: how large the fixed rows are beside states of mean square 1
        concept_dropout: float = 0.0,  # share of the concepts that the decoder does not get in a training step
        nested_concepts: bool = False,  # the decoder of a training step gets the first k concepts, k drawn evenly
        # decoder
        num_decoder_layers: int = 2,
        decoder_queries: str = "token+position",
        decoder_mixing: str = "none",  # how target rows see each other: not, through the concepts, or in a window
        decoder_window: int = 64,  # of local mixing: a row reads those at most this far away
        timestep_conditioning: bool = False,  # AdaLN-Zero in the decoder
        condition_dropout: float = 0.0,  # share of the texts whose concepts are withheld in training, for guidance
        hidden_tokens: str = "drop",  # what stands for a hidden token in the encoder's input: nothing, or [MASK]
        # heads of tasks
        pool: str = "mean",
        num_pool_queries: int = 4,  # of multi_query
        pair: str = "joint",  # two texts as one sequence, or each encoded by itself
        pair_features: str = "concat",  # of separate pairs: [a, b, |a - b|, a * b], cosine, or slot-wise cosines
        label_offset: float = 0.0,  # a regression predicts label_offset + label_scale * x, with x = 0 at the start
        label_scale: float = 1.0,
        # the rest
        dropout: float = 0.0,  # of every residual branch
        initializer_range: float = 0.02,  # of embeddings; every other matrix starts at 1 / sqrt(fan in)
        norm_eps: float = 1e-6,
        tie_word_embeddings: bool = True,
        pad_token_id: int | None = None,
        mask_token_id: int | None = None,
        **kwargs,
    ):
        fields = dict(locals())
        for name in ("self", "kwargs", "__class__", "tie_word_embeddings", "pad_token_id"):
            fields.pop(name)
        for name, value in fields.items():
            setattr(self, name, value)
        if num_key_value_heads is None:
            self.num_key_value_heads = num_attention_heads
        if token_dim is None:
            self.token_dim = hidden_size if backbone is None else inner_config(backbone).hidden_size
        self.check()
        if token_num_attention_heads is None:
            fitting = 1 if backbone is not None else max(1, self.token_dim // self.head_dim)  # of no layer there
            self.token_num_attention_heads = fitting
        if token_num_key_value_heads is None:
            self.token_num_key_value_heads = self.token_num_attention_heads
        if token_intermediate_size is None:
            self.token_intermediate_size = 2 * self.token_dim
        self.check_tokens()
        super().__init__(tie_word_embeddings=tie_word_embeddings, pad_token_id=pad_token_id, **kwargs)
        register_models()

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """As in transformers for a class of somebody else's module; this package registers its own, and a folder holds
        no copy of its code."""
        if cls.__module__.partition(".")[0] != __name__.partition(".")[0]:
            super().register_for_auto_class(auto_class)

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        register_models()

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def token_head_dim(self) -> int:
        return self.token_dim // self.token_num_attention_heads

    @property
    def anchored_reads(self) -> bool:
        """Whether concepts and tokens stand in the same text, so that attention can know how far apart they are."""
        return self.token_positions == "rope" and self.concept_positions == "rope"

    @property
    def iterations(self) -> int:
        """How many layers a forward pass applies by default."""
        return self.num_hidden_layers if self.num_iterations is None else self.num_iterations

    def check(self) -> None:
        """Raises ValueError with the field, what was expected and what came."""
        for name in ("vocab_size", "hidden_size", "token_dim", "num_concepts", "num_hidden_layers",
                     "num_attention_heads", "num_key_value_heads", "intermediate_size", "slot_iterations",
                     "share_kv", "max_iterations", "token_window", "max_position_embeddings", "num_decoder_layers",
                     "decoder_window", "num_pool_queries"):  # fmt: skip
            self._expect(name, "a whole number of at least 1", lambda x: _is_int(x) and x >= 1)
        self._expect("num_token_layers", "a whole number of at least 0", lambda x: _is_int(x) and x >= 0)
        for name in ("num_iterations", "backprop_iterations", "token_num_attention_heads",
                     "token_num_key_value_heads", "token_intermediate_size"):  # fmt: skip
            expected = "a whole number of at least 1, or nothing"
            self._expect(name, expected, lambda x: x is None or (_is_int(x) and x >= 1))
        for name, allowed in CHOICES.items():
            self._expect(name, f"one of {', '.join(allowed)}", lambda x, allowed=allowed: x in allowed)
        for name in ("dropout", "concept_dropout", "condition_dropout"):
            self._expect(name, "a number in [0, 1)", lambda x: _is_number(x) and 0 <= x < 1)
        for name in ("timestep_conditioning", "tie_layers", "loss_every_iteration", "backbone_two_sided",
                     "normalize_tokens", "nested_concepts"):  # fmt: skip
            self._expect(name, "true or false", lambda x: isinstance(x, bool))
        for name in ("rope_theta", "anchor_sharpness", "initializer_range", "norm_eps", "label_scale",
                     "row_scale"):
            self._expect(name, "a number above 0", lambda x: _is_number(x) and x > 0)
        self._expect("rope_factor", "a number of at least 1", lambda x: _is_number(x) and x >= 1)
        self._expect("anchor_bias", "a number of at least 0", lambda x: _is_number(x) and x >= 0)
        self._expect("label_offset", "a number", _is_number)
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
        self.check_positions()
        self.check_layers()
        self.check_heads()
        self.check_backbone()

    def check_positions(self) -> None:
        """What only fits tokens, or concepts, that RoPE turns."""
        if self.token_positions != "rope":
            expected = f"none with token_positions = {self.token_positions}: only RoPE is extended"
            self._expect("rope_extension", expected, lambda x: x == "none")
        if self.decoder_queries == "weighted":
            expected = "rope with decoder_queries = weighted: weights come from places alone"
            for name in ("token_positions", "concept_positions"):
                self._expect(name, expected, lambda x: x == "rope")
        if self.rope_extension == "none":
            self._expect("rope_factor", "1 with rope_extension = none: nothing uses it", lambda x: x == 1)
        if self.rope_extension == "ntk":
            expected = f"more than 2 channels a head with num_attention_heads = {self.num_attention_heads}, for NTK"
            self._expect("hidden_size", expected, lambda x: x // self.num_attention_heads > 2)

    def check_layers(self) -> None:
        """What only fits together with tied layers, slots, hybrid heads or a decoder."""
        for name, default in (("num_iterations", None), ("backprop_iterations", None), ("loss_every_iteration", False),
                              ("iteration_sampling", "fixed")):  # fmt: skip
            expected = f"{default!r} without tie_layers = true: only one layer applied again has iterations"
            self._expect(name, expected, lambda x, default=default: self.tie_layers or x == default)
        if self.tie_layers and self.iteration_sampling == "random":
            expected = f"at least num_iterations = {self.iterations}"
            self._expect("max_iterations", expected, lambda x: x >= self.iterations)
        if self.layer_kind == "bixt":
            expected = "1 with layer_kind = bixt: its layers change the tokens that keys and values are made of"
            self._expect("share_kv", expected, lambda x: x == 1)
        if self.tie_layers:
            self._expect("share_kv", "1 with tie_layers = true: one layer has one projection", lambda x: x == 1)
        expected = f"at most num_hidden_layers = {self.num_hidden_layers}"
        self._expect("share_kv", expected, lambda x: x <= self.num_hidden_layers)
        self._expect(
            "slot_iterations", "1 with a layer_kind other than slot and hybrid",
            lambda x: x == 1 or self.layer_kind in ("slot", "hybrid"),
        )  # fmt: skip
        if self.layer_kind == "hybrid":
            self._expect("num_attention_heads", "an even number with layer_kind = hybrid", lambda x: x % 2 == 0)
            self._expect("num_key_value_heads", "an even number with layer_kind = hybrid", lambda x: x % 2 == 0)
        if self.layer_kind == "bixt":
            expected = f"num_attention_heads = {self.num_attention_heads} with layer_kind = bixt: one similarity"
            self._expect("num_key_value_heads", expected, lambda x: x == self.num_attention_heads)
        if self.decoder_mixing == "local":
            self._expect(
                "decoder_queries", "token+position or position with decoder_mixing = local", lambda x: x != "weighted"
            )

    def check_heads(self) -> None:
        """What a pool or the features of a pair need of the rest."""
        fitting, other = "decoder", "decoder_positions"
        if self.decoder_queries != "token+position":
            fitting, other = other, fitting
        self._expect(
            "pool", f"a pool of concepts, or {fitting}, with decoder_queries = {self.decoder_queries}",
            lambda x: x != other,
        )  # fmt: skip
        if self.pair == "separate" and self.pair_features == "slots":
            self._expect("pool", "mean with pair_features = slots, which uses no pool", lambda x: x == "mean")

    def check_backbone(self) -> None:
        """What only fits a backbone, or its sizes."""
        if self.backbone is None:
            expected = "other than state without a backbone, whose states are meant"
            self._expect("init_queries", expected, _is_not("state"))
            return
        inner = inner_config(self.backbone)
        self._expect("token_dim", f"the backbone's width {inner.hidden_size}", lambda x: x == inner.hidden_size)
        self._expect("vocab_size", f"at least the backbone's {inner.vocab_size}", lambda x: x >= inner.vocab_size)
        self._expect("num_token_layers", "0 with a backbone, which stands in their place", lambda x: x == 0)
        self._expect("token_positions", "rope with a backbone, which has its own", lambda x: x == "rope")
        num = inner.num_hidden_layers
        self._expect(
            "backbone_layers", f"up to {num}, or rising numbers of its layers, 0 to {num - 1}",
            lambda x: x is None or (_is_int(x) and 0 <= x <= num) or (
                isinstance(x, list | tuple) and len(x) > 0 and all(_is_int(i) and 0 <= i < num for i in x)
                and list(x) == sorted(set(x))
            ),
        )  # fmt: skip
        added = len(self.backbone.get("prefix", ())) + len(self.backbone.get("suffix", ()))
        limit = position_limit(inner)
        self._expect(
            "backbone_window", f"{added + 1} to {limit}, for which the backbone has positions",
            lambda x: _is_int(x) and added < x <= limit,
        )  # fmt: skip
        inside = self.backbone_window - added
        self._expect(
            "backbone_overlap", f"0 to {inside // 2}, half of what a window holds",
            lambda x: _is_int(x) and 0 <= x <= inside // 2,
        )  # fmt: skip
        kept = len(layer_numbers(inner, self.backbone_layers))
        self._expect(
            "backbone_train", f"none, all, or last 1 to last {kept}",
            lambda x: x in ("none", "all") or x in [f"last {n}" for n in range(1, kept + 1)],
        )  # fmt: skip
        self._expect(
            "backbone_two_sided", f"false with {inner.model_type}, which has no causal mask",
            lambda x: not x or inner.model_type in CAUSAL,
        )  # fmt: skip
        if self.init_queries == "state":
            expected = f"the backbone's width {inner.hidden_size} with init_queries = state"
            self._expect("hidden_size", expected, lambda x: x == inner.hidden_size)
            self._expect("block_norm", "pre with init_queries = state: layers start as the identity", _is("pre"))
            if self.layer_kind in ("slot", "hybrid"):
                self._expect("slot_update", "residual with init_queries = state", _is("residual"))
            expected = "rope or none with init_queries = state: rows stay as they are"
            self._expect("concept_positions", expected, lambda x: x in ("rope", "none", "cope"))

    def check_tokens(self) -> None:
        """The layers of tokens, once their sizes are known."""
        heads = self.token_num_attention_heads
        self._expect("token_dim", f"a multiple of token_num_attention_heads = {heads}", lambda x: x % heads == 0)
        self._expect(
            "token_dim", f"an even width per head with token_num_attention_heads = {heads}, for RoPE",
            lambda x: (x // heads) % 2 == 0 or self.num_token_layers == 0,
        )  # fmt: skip
        self._expect(
            "token_num_key_value_heads", f"a divisor of token_num_attention_heads = {heads}", lambda x: heads % x == 0
        )
        last = self.num_token_layers - 1
        self._expect(
            "funnel", f"rising numbers of token layers, 0 to {last} with num_token_layers = {self.num_token_layers}",
            lambda x: x is None or (
                isinstance(x, list | tuple) and len(x) > 0 and all(_is_int(i) and 0 <= i <= last for i in x)
                and list(x) == sorted(set(x))
            ),
        )  # fmt: skip
        if self.funnel:
            self._expect(
                "layer_kind", "cross with funnel: slots and bixt count tokens, which a funnel has merged",
                lambda x: x == "cross",
            )  # fmt: skip
            self._expect("token_mixer", "local with funnel: its halving layers pool queries", lambda x: x == "local")

    def _expect(self, name: str, expected: str, holds) -> None:
        value = getattr(self, name)
        if not holds(value):
            raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _is(wanted: str):
    return lambda value: value == wanted


def _is_not(unwanted: str):
    return lambda value: value != unwanted


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


AutoConfig.register(ConceptConfig.model_type, ConceptConfig)
