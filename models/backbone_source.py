"""Checkpoints of other architectures in one form: a table of embeddings, and layers of attention and feed-forward.

V rows of embeddings, H heads, Hkv key/value heads, D head width, w model width of the checkpoint, I width of its
feed-forward.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from .similarity import wide

LLAMA_LIKE = ("llama", "mistral", "qwen2")  # model types whose layers are those of SourceLayer
BERT_LIKE = ("bert", "camembert", "roberta", "xlm-roberta")


@dataclass(frozen=True)
class Shape:
    """The sizes of a backbone, under one name each."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    has_bias: bool  # of queries, keys and values
    norm_eps: float
    rope_theta: float | None
    rope_type: str
    activation: str


class SourceLayer(NamedTuple):
    """A layer as pre-norm with RMSNorm and a gated feed-forward, or what of it can be said so."""

    norm: Tensor  # [w], before attention
    query: Tensor  # [H * D, w]
    key: Tensor  # [Hkv * D, w]
    value: Tensor  # [Hkv * D, w]
    out: Tensor  # [w, H * D]
    biases: tuple[Tensor | None, Tensor | None, Tensor | None]  # of query, key, value
    feed_norm: Tensor  # [w]
    gate_up: Tensor | None  # [2 * I, w]; None: the feed-forward is of another kind
    down: Tensor | None  # [w, I]


class Backbone:
    """Reads a checkpoint tensor by tensor, and remembers which were asked for.

    Raises:
        ValueError: it is of a model type that is not known here, or has no embeddings.
    """

    def __init__(self, config: PretrainedConfig, names: list[str], read: Callable[[str], Tensor], where: str):
        self.config, self.where, self._read = config, where, read
        self.names, self.taken = names, {}
        kind = getattr(config, "model_type", None)
        if kind not in (*LLAMA_LIKE, *BERT_LIKE):
            known = ", ".join((*LLAMA_LIKE, *BERT_LIKE))
            raise ValueError(f"{where}: expected a model of type {known}, got {kind}")
        self.is_llama = kind in LLAMA_LIKE
        end = "embed_tokens.weight" if self.is_llama else "embeddings.word_embeddings.weight"
        tables = [name for name in names if name == end or name.endswith(f".{end}")]
        if not tables:
            raise ValueError(f"{where}: expected a tensor {end}, got {', '.join(names[:3]) or 'none'} ...")
        self.prefix = tables[0].removesuffix(end)
        self.shape = self._shape()

    def has(self, name: str) -> bool:
        return self.prefix + name in self.names

    def take(self, name: str) -> Tensor:
        full = self.prefix + name
        if full not in self.names:
            raise ValueError(f"{self.where}: expected a tensor {full}, which a layer like its others has")
        if full not in self.taken:
            self.taken[full] = self._read(full).detach()
        return self.taken[full]

    def take_if_there(self, name: str) -> Tensor | None:
        return self.take(name) if self.has(name) else None

    def untaken(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name not in self.taken)

    @cached_property
    def table(self) -> Tensor:
        """[V, w] embeddings, so that RMSNorm of a row is the norm that follows them in the backbone.

        BERT's first norm centres its input over the channels, and adds the vector of text type 0 to all rows: both are
        done to the table here.
        """
        if self.is_llama:
            return self.take("embed_tokens.weight")
        rows = wide(self.take("embeddings.word_embeddings.weight"))
        kind = self.take_if_there("embeddings.token_type_embeddings.weight")
        return centred(rows if kind is None else rows + wide(kind[0]))

    def positions(self) -> Tensor | None:
        """[N, w] learned positions; those of RoBERTa's kin begin behind the padding id."""
        if self.is_llama:
            return None
        first = 0 if self.config.model_type == "bert" else self.config.pad_token_id + 1
        return centred(wide(self.take("embeddings.position_embeddings.weight")[first:]))

    def layer(self, i: int) -> SourceLayer:
        return self._llama_layer(f"layers.{i}.") if self.is_llama else self._bert_layer(i)

    def _llama_layer(self, at: str) -> SourceLayer:
        query, key, value, out = (self.take(f"{at}self_attn.{name}_proj.weight") for name in "qkvo")
        return SourceLayer(
            norm=self.take(f"{at}input_layernorm.weight"), query=query, key=key, value=value, out=out,
            biases=tuple(self.take_if_there(f"{at}self_attn.{name}_proj.bias") for name in "qkv"),
            feed_norm=self.take(f"{at}post_attention_layernorm.weight"),
            gate_up=torch.cat([self.take(f"{at}mlp.{name}_proj.weight") for name in ("gate", "up")]),
            down=self.take(f"{at}mlp.down_proj.weight"),
        )  # fmt: skip

    def _bert_layer(self, i: int) -> SourceLayer:
        """Post-norm read as pre-norm: the norm before attention is the one that closed what came before.

        What that norm adds goes into the biases of queries, keys and values. What attention writes is centred, as the
        next norm would do, and scaled by the size of the embeddings: the stream was normalised where it is added, and
        is as large as embeddings here.
        """
        before = "embeddings.LayerNorm" if i == 0 else f"encoder.layer.{i - 1}.output.LayerNorm"
        shift, at = wide(self.take(f"{before}.bias")), f"encoder.layer.{i}.attention."
        matrices = [self.take(f"{at}self.{name}.weight") for name in ("query", "key", "value")]
        biases = [self.take(f"{at}self.{name}.bias") for name in ("query", "key", "value")]
        out = centred(wide(self.take(f"{at}output.dense.weight")).T).T * self.table.square().mean().sqrt()
        query, key, value = matrices
        return SourceLayer(
            norm=self.take(f"{before}.weight"), query=query, key=key, value=value, out=out,
            biases=tuple(wide(b) + wide(m) @ shift for b, m in zip(biases, matrices, strict=True)),
            feed_norm=self.take(f"{at}output.LayerNorm.weight"), gate_up=None, down=None,
        )  # fmt: skip

    def _shape(self) -> Shape:
        c = self.config
        rope = c.rope_parameters if self.is_llama else {}
        first = "layers.0.self_attn.q_proj.bias" if self.is_llama else "encoder.layer.0.attention.self.query.bias"
        return Shape(
            vocab_size=c.vocab_size, width=c.hidden_size, num_layers=c.num_hidden_layers,
            num_heads=c.num_attention_heads,
            num_kv_heads=getattr(c, "num_key_value_heads", None) or c.num_attention_heads,
            head_dim=getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
            intermediate_size=c.intermediate_size, has_bias=self.has(first),
            norm_eps=c.rms_norm_eps if self.is_llama else c.layer_norm_eps,
            rope_theta=rope.get("rope_theta"), rope_type=rope.get("rope_type", "default"), activation=c.hidden_act,
        )  # fmt: skip


def open_backbone(source: str | Path | nn.Module) -> Backbone:
    """A folder of transformers with safetensors, whose tensors are read when asked for, or a model.

    Raises:
        ValueError: there is no such folder, no weights in it, or weights of another kind.
    """
    if isinstance(source, nn.Module):
        state: Mapping[str, Any] = source.state_dict()
        return Backbone(source.config, list(state), state.__getitem__, type(source).__name__)
    folder = Path(source)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: expected the folder of a model of transformers, there is no config.json")
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    elif single.is_file():
        with safe_open(single, "pt") as opened:
            files = dict.fromkeys(opened.keys(), single)
    else:
        raise ValueError(f"{folder}: expected model.safetensors; load the model and save it with save_pretrained")

    def read(name: str) -> Tensor:
        with safe_open(files[name], "pt") as opened:
            return opened.get_tensor(name)

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return Backbone(config, sorted(files), read, str(folder))


def centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(-1, keepdim=True)
