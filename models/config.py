"""ConceptConfig: the five decisions of ``decisions.py`` in one flat description, checked when it is made."""

from dataclasses import fields
from itertools import pairwise
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from .auto import register_models
from .backbone_config import CAUSAL, inner_config, layer_numbers, position_limit
from .decisions import ALLOWED, DECISIONS, FIELDS, Answers, Places, Reading, Size, Tokens, is_count


class ConceptConfig(PretrainedConfig):
    """Describes a concept encoder, its decoder and its heads: the fields of ``decisions.Size``, ``Tokens``, ``Places``,
    ``Reading`` and ``Answers``, by name.

    Every error in a field, or between two fields, is a ``ValueError`` of one line at construction.
    """

    model_type = "conceptron"
    keys_to_ignore_at_inference: ClassVar = ["concepts", "nll"]  # transformers' Trainer then gathers logits only

    def __init__(
        self, *, tie_word_embeddings: bool = True, pad_token_id: int | None = None, mask_token_id: int | None = None,
        **kwargs: Any,
    ):  # fmt: skip
        for name, each in FIELDS.items():
            setattr(self, name, kwargs.pop(name, each.default))
        self.mask_token_id = mask_token_id
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.token_dim is None:
            self.token_dim = self.hidden_size if self.backbone is None else inner_config(self.backbone).hidden_size
        self.check()
        super().__init__(tie_word_embeddings=tie_word_embeddings, pad_token_id=pad_token_id, **kwargs)
        register_models()

    def decisions(self) -> dict[str, Size | Tokens | Places | Reading | Answers]:
        """The fields by what they decide: size, tokens, places, reading, answers."""
        return {
            name: group(**{each.name: getattr(self, each.name) for each in fields(group)})
            for name, group in DECISIONS.items()
        }

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
    def num_token_heads(self) -> int:
        """Of layers of tokens: as many of the model's head width as fit."""
        return max(1, self.token_dim // self.head_dim)

    @property
    def token_head_dim(self) -> int:
        return self.token_dim // self.num_token_heads

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
        for name, allowed in ALLOWED.items():
            self._expect(name, allowed.words, allowed.holds)
        self._expect(
            "mask_token_id", f"an id below vocab_size = {self.vocab_size}, or none",
            lambda x: x is None or (is_count(x, 0) and x < self.vocab_size),
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
        self.check_tokens()

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
        for name, default in (("num_iterations", None), ("backprop_iterations", None),
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
            for name, each in FIELDS.items():
                if name.startswith("backbone_"):
                    self._expect(name, f"{each.default!r} without a backbone, which it is about", _is(each.default))
            return
        inner = inner_config(self.backbone)
        self._expect("token_dim", f"the backbone's width {inner.hidden_size}", lambda x: x == inner.hidden_size)
        self._expect("vocab_size", f"at least the backbone's {inner.vocab_size}", lambda x: x >= inner.vocab_size)
        self._expect("num_token_layers", "0 with a backbone, which stands in their place", lambda x: x == 0)
        self._expect("token_positions", "rope with a backbone, which has its own", lambda x: x == "rope")
        num = inner.num_hidden_layers
        self._expect(
            "backbone_layers", f"up to {num}, or rising numbers of its layers, 0 to {num - 1}",
            lambda x: x is None or (is_count(x, 0) and x <= num) or (
                isinstance(x, list | tuple) and len(x) > 0 and all(is_count(i, 0) and i < num for i in x)
                and list(x) == sorted(set(x))
            ),
        )  # fmt: skip
        added = len(self.backbone.get("prefix", ())) + len(self.backbone.get("suffix", ()))
        limit = position_limit(inner)
        self._expect(
            "backbone_window", f"{added + 1} to {limit}, for which the backbone has positions",
            lambda x: is_count(x, added + 1) and x <= limit,
        )  # fmt: skip
        inside = self.backbone_window - added
        self._expect(
            "backbone_overlap", f"0 to {inside // 2}, half of what a window holds",
            lambda x: is_count(x, 0) and x <= inside // 2,
        )  # fmt: skip
        kept = len(layer_numbers(inner, self.backbone_layers))
        self._expect(
            "backbone_train", f"none, all, or last 1 to last {kept}",
            lambda x: x in ("none", "all") or x in [f"last {n}" for n in range(1, kept + 1)],
        )  # fmt: skip
        expected = "false where no layer is left out between others"
        gaps = [b - a for a, b in pairwise([-1, *layer_numbers(inner, self.backbone_layers)])]
        self._expect("backbone_bridges", expected, lambda x: not x or max(gaps, default=1) > 1)
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
        """What the layers of tokens need."""
        if self.num_token_layers > 0:
            heads = self.num_token_heads
            expected = f"a multiple of {heads} with an even width per head, for {heads} heads of token layers"
            self._expect("token_dim", expected, lambda x: x % heads == 0 and (x // heads) % 2 == 0)
        last = self.num_token_layers - 1
        self._expect(
            "funnel", f"rising numbers of token layers, 0 to {last} with num_token_layers = {self.num_token_layers}",
            lambda x: x is None or (
                isinstance(x, list | tuple) and len(x) > 0 and all(is_count(i, 0) and i <= last for i in x)
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


AutoConfig.register(ConceptConfig.model_type, ConceptConfig)
