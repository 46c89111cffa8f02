"""Starting from a language model that somebody else has trained: its embeddings and its first layers become ours.

V rows of embeddings, H heads, Hkv key/value heads, D head width, e width of our tokens, w width of the backbone.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .backbone_source import Backbone, SourceLayer, open_backbone
from .config import ConceptConfig
from .encoder import ConceptPreTrainedModel
from .similarity import wide


@dataclass
class BackboneReport:
    """What became of a backbone. The first three name parameters of our model, each at most one of them."""

    loaded: list[str] = field(default_factory=list)  # copied value by value
    mapped: list[str] = field(default_factory=list)  # put together from several, chosen or scaled
    projected: list[str] = field(default_factory=list)  # brought to another width
    skipped: tuple[str, ...] = ()  # tensors of the backbone that have no place here
    approximate: list[str] = field(default_factory=list)  # where our model computes something else than the backbone
    kept_variance: float | None = None  # of a projection: share of the squared norm of all embeddings

    def __str__(self) -> str:
        parts = [f"{len(names)} {kind}" for kind in ("loaded", "mapped", "projected") if (names := getattr(self, kind))]
        if self.kept_variance is not None:
            parts.append(f"{self.kept_variance:.1%} of the embeddings' variance kept")
        kinds = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in self.skipped)
        parts.append(f"{len(self.skipped)} skipped" + "".join(f"\n  skipped {n} x {name}" for name, n in kinds.items()))
        return "backbone: " + ", ".join(parts) + "".join(f"\n  approximate: {note}" for note in self.approximate)


def backbone_config(source: str | Path | nn.Module, layers: int = 4, **changes) -> ConceptConfig:
    """The configuration whose first ``layers`` token layers, and concepts, have the shape of a backbone's layers.

    ``changes`` are fields of ``ConceptConfig`` and go before. With a ``hidden_size`` other than the backbone's width,
    tokens keep that width and a learned matrix brings them to ``hidden_size``: nothing of the backbone is lost. A
    smaller ``token_dim`` projects it. ``token_window`` stays ours: 64 unless changed.
    """
    backbone = open_backbone(source)
    shape, width = backbone.shape, changes.get("token_dim", backbone.shape.width)
    hidden = changes.get("hidden_size", width)
    fields = dict(
        vocab_size=shape.vocab_size, hidden_size=hidden, token_dim=width, intermediate_size=shape.intermediate_size,
        num_token_layers=min(layers, shape.num_layers), token_intermediate_size=shape.intermediate_size,
        normalize_tokens=False, token_attention_bias=shape.has_bias, norm_eps=max(shape.norm_eps, 1e-6),
        pad_token_id=backbone.config.pad_token_id,
    )  # fmt: skip
    group = shape.num_heads // shape.num_kv_heads
    for prefix, size in (("", hidden), ("token_", width)):
        heads = changes.get(f"{prefix}num_attention_heads", max(1, size // shape.head_dim))
        fields[f"{prefix}num_attention_heads"] = heads
        fields[f"{prefix}num_key_value_heads"] = heads // group if heads % group == 0 else heads
    if backbone.is_llama:
        fields["rope_theta"] = float(shape.rope_theta)
    else:
        fields |= {"token_positions": "learned", "max_position_embeddings": len(backbone.positions())}
    return ConceptConfig(**{**fields, **changes})


@torch.no_grad()
def init_from_backbone(
    model: ConceptPreTrainedModel, source: str | Path | nn.Module, layers: int | None = None, *,
    read_layer: int | None = None, vocabulary: Mapping[str, int] | None = None,
    source_vocabulary: Mapping[str, int] | None = None,
) -> BackboneReport:  # fmt: skip
    """Overwrites the beginning of ``model`` with the beginning of a Llama- or BERT-like checkpoint.

    Embeddings become ``embed_tokens``, layer i becomes token layer i. A Llama-like layer (Llama, SmolLM2, Qwen2:
    grouped heads, RMSNorm, SwiGLU, biases of q, k and v) computes the same here but for the causal mask, once
    ``token_window`` spans the text. BERT's post-norm layers do so in the first attention only; its GELU feed-forward
    has no place.

    Where ``token_dim`` e is less than the backbone's width w, everything is turned into the e leading principal
    directions P [w, e] of the embeddings (not centred: there is no bias to hold a mean). With the norm's weight g
    folded into what follows it, W' = W diag(g) P sqrt(w / e) reads the stream and W' = P^T W writes it: exact for a
    stream that lies in these directions. Heads keep their width; the ones that write most stay. Source: Ashkboos et
    al. 2024 (SliceGPT), arXiv:2401.15024, whose directions are those of each layer's activations.

    Args:
        model: any model here; best from ``backbone_config``.
        source: a folder with config.json and safetensors, or a model of transformers.
        layers: how many; by default as many as the model has token layers.
        read_layer: also start the layers by which concepts read tokens from the backbone's layers read_layer,
            read_layer + 1, ...; needs token_dim = hidden_size, and ``layer_kind`` cross.
        vocabulary, source_vocabulary: token -> id of our tokenizer and the backbone's. Rows are then found by token;
            without them by id. A row that is not found, such as [MASK], starts as the mean of all.

    Raises:
        ValueError: a size does not fit, or nothing could be loaded; the message says what was expected.
    """
    backbone, config = open_backbone(source), model.config
    layers = config.num_token_layers if layers is None else layers
    report = BackboneReport()
    check_fit(config, backbone, layers, read_layer)
    transfer = Transfer(model.base_model, backbone, report)
    transfer.embeddings(model, vocabulary, source_vocabulary)
    for i in range(layers):
        transfer.token_layer(i)
    if read_layer is not None:
        for i in range(config.num_hidden_layers if not config.tie_layers else 1):
            transfer.concept_layer(i, read_layer + i)
    report.skipped = backbone.untaken()
    report.approximate += differences(config, backbone, layers, read_layer)
    return report


class Transfer:
    """Writes a backbone into the parameters of an encoder, and into the report."""

    def __init__(self, encoder: nn.Module, backbone: Backbone, report: BackboneReport):
        self.targets, self.backbone, self.report = dict(encoder.named_parameters()), backbone, report
        self.config = encoder.config
        self.directions = None
        if self.config.token_dim < backbone.shape.width:
            self.directions, report.kept_variance = principal_directions(backbone.table, self.config.token_dim)

    @property
    def is_narrow(self) -> bool:
        return self.directions is not None

    def put(self, name: str, value: Tensor, parameter: nn.Parameter | None = None) -> None:
        """``parameter``: where the name is not one of the encoder."""
        parameter = self.targets[name] if parameter is None else parameter
        if parameter.shape != value.shape:
            raise ValueError(f"{name}: expected shape {list(parameter.shape)}, the backbone has {list(value.shape)}")
        parameter.copy_(value)
        if self.is_narrow and value.ndim == 2:
            self.report.projected.append(name)
        elif any(value is tensor for tensor in self.backbone.taken.values()):
            self.report.loaded.append(name)
        else:
            self.report.mapped.append(name)

    def stream(self, rows: Tensor) -> Tensor:
        """[R, w] rows of the stream -> [R, e]."""
        return rows if self.directions is None else wide(rows) @ self.directions.to(wide(rows))

    def writes(self, matrix: Tensor) -> Tensor:
        """[w, n], which writes into the stream, -> [e, n]."""
        return self.stream(matrix.T).T if self.is_narrow else matrix

    def reads(self, matrix: Tensor, norm: Tensor, is_folded: bool = False) -> Tensor:
        """[n, w], which reads what RMSNorm with this weight made of the stream, -> [n, e]."""
        if self.directions is None:
            return wide(matrix) * wide(norm) if is_folded else matrix
        w, e = self.directions.shape
        return self.stream(wide(matrix) * wide(norm)) * math.sqrt(w / e)

    def embeddings(
        self, model: ConceptPreTrainedModel, vocabulary: Mapping[str, int] | None, theirs: Mapping[str, int] | None
    ) -> None:
        rows, note = rows_for(self.stream(self.backbone.table), self.config.vocab_size, vocabulary, theirs)
        self.put("embed_tokens.weight", rows)
        if note:
            self.report.approximate.append(note)
        decoder = getattr(model, "decoder", None)
        own = None if decoder is None else decoder.get_input_embeddings()
        if own is not None and own.weight is not self.targets["embed_tokens.weight"]:
            self.put("decoder.embed_tokens.weight", rows, own.weight)
        positions = self.backbone.positions() if "positions.table.weight" in self.targets else None
        if positions is not None:
            num_ours = self.config.max_position_embeddings
            if len(positions) < num_ours:
                raise ValueError(
                    f"max_position_embeddings: expected at most the backbone's {len(positions)}, got {num_ours}; "
                    "start with that, save, and load it with more"
                )
            self.put("positions.table.weight", self.stream(positions[:num_ours]))

    def token_layer(self, i: int) -> None:
        config, at = self.config, f"token_layers.{i}."
        heads = config.token_num_attention_heads, config.token_num_key_value_heads
        layer = self.chosen(self.backbone.layer(i), heads, f"token layer {i}")
        for name, matrix, bias in zip(("query", "key", "value"), layer[1:4], layer.biases, strict=True):
            self.put(f"{at}attention.{name}.weight", self.reads(matrix, layer.norm))
            if bias is not None:
                self.put(f"{at}attention.{name}.bias", bias)
        self.put(f"{at}attention.out.weight", self.writes(layer.out))
        self.norms_and_feed(at, ("attention_norm", "feed_norm"), layer, is_folded=self.is_narrow)

    def concept_layer(self, i: int, source: int) -> None:
        config, at = self.config, f"layers.{i}."
        heads = config.num_attention_heads, config.num_key_value_heads
        layer = self.chosen(self.backbone.layer(source), heads, f"concept layer {i}")
        for name, matrix in zip(("query.project", "key.project", "value"), layer[1:4], strict=True):
            # folded, since tokens reach keys and values through another norm than concepts reach queries
            self.put(f"{at}read.{name}.weight", self.reads(matrix, layer.norm, is_folded=True))
        self.put(f"{at}read.out.weight", self.writes(layer.out))
        self.norms_and_feed(at, ("read_norm", "feed_norm"), layer, is_folded=True)

    def norms_and_feed(self, at: str, norms: tuple[str, str], layer: SourceLayer, is_folded: bool) -> None:
        for name, weight in zip(norms, (layer.norm, layer.feed_norm), strict=True):
            target = f"{at}{name}.weight"
            self.put(target, torch.ones_like(self.targets[target]) if is_folded else weight)
        if layer.gate_up is not None:
            self.put(f"{at}feed.gate_up.weight", self.reads(layer.gate_up, layer.feed_norm, is_folded))
            self.put(f"{at}feed.down.weight", self.writes(layer.down))

    def chosen(self, layer: SourceLayer, heads: tuple[int, int], what: str) -> SourceLayer:
        """The layer with H heads and Hkv key/value heads, out of the more that it has."""
        shape, D = self.backbone.shape, self.backbone.shape.head_dim
        if heads == (shape.num_heads, shape.num_kv_heads):
            return layer
        kept, kept_kv = choose_heads(layer, D, *heads)
        if len(kept) < shape.num_heads:
            self.report.approximate.append(f"{what} keeps heads {kept} of {shape.num_heads}, those that write most")
        rows, kv_rows = (torch.cat([torch.arange(h * D, (h + 1) * D) for h in part]) for part in (kept, kept_kv))
        biases = (None if b is None else b[r] for b, r in zip(layer.biases, (rows, kv_rows, kv_rows), strict=True))
        return layer._replace(
            query=layer.query[rows], key=layer.key[kv_rows], value=layer.value[kv_rows], out=layer.out[:, rows],
            biases=tuple(biases),
        )  # fmt: skip


def choose_heads(layer: SourceLayer, head_dim: int, num_heads: int, num_kv_heads: int) -> tuple[list[int], list[int]]:
    """The heads that stay, and the key/value head of each of ours, both rising.

    A head counts by |W_out| * |W_value|, how much it can write. Either each of ours gets a copy of its key/value head,
    or whole groups stay, with the same number of heads in each.
    """
    value, out = wide(layer.value), wide(layer.out)
    theirs, their_groups = layer.query.shape[0] // head_dim, value.shape[0] // head_dim
    size = theirs // their_groups
    value_norms = value.unflatten(0, (their_groups, head_dim)).flatten(1).norm(dim=1).repeat_interleave(size)
    weight = out.unflatten(1, (theirs, head_dim)).transpose(0, 1).flatten(1).norm(dim=1) * value_norms  # [H]
    if num_heads == num_kv_heads and num_heads <= theirs:
        kept = weight.topk(num_heads).indices.sort().values
        return kept.tolist(), (kept // size).tolist()
    ours = num_heads // num_kv_heads
    if ours > size or num_kv_heads > their_groups:
        raise ValueError(
            f"num_key_value_heads: {num_heads} heads in {num_kv_heads} groups cannot be chosen from {theirs} in "
            f"{their_groups}; expected as many key/value heads as heads, or groups of at most {size}"
        )
    best, places = weight.view(their_groups, size).topk(ours, dim=1)
    groups = best.sum(1).topk(num_kv_heads).indices.sort().values
    kept = (groups[:, None] * size + places[groups].sort(dim=1).values).flatten()
    return kept.tolist(), groups.tolist()


def principal_directions(table: Tensor, width: int) -> tuple[Tensor, float]:
    """Orthonormal [w, e] directions that hold most of the squared norm of the rows [V, w], and the share they hold."""
    gram = sum(rows.T @ rows for rows in map(Tensor.double, table.split(8192)))
    strengths, directions = torch.linalg.eigh(gram)  # rising
    return directions[:, -width:].flip(1), float(strengths[-width:].sum() / strengths.sum())


def rows_for(
    rows: Tensor, num_rows: int, vocabulary: Mapping[str, int] | None, theirs: Mapping[str, int] | None
) -> tuple[Tensor, str]:
    """[V', e] -> [V, e], by token where both vocabularies are given, else by id; and a note on rows not found."""
    if (vocabulary is None) != (theirs is None):
        raise ValueError("vocabulary: expected both vocabulary and source_vocabulary, or neither")
    if vocabulary is None:
        missing = num_rows - len(rows)
        if missing < 0:
            raise ValueError(
                f"vocab_size: expected at least the backbone's {len(rows)}, got {num_rows}; with another tokenizer "
                "give vocabulary and source_vocabulary, so that rows are found by token"
            )
        full = torch.cat((rows, rows.mean(0, keepdim=True).expand(missing, -1))) if missing else rows
        return full, f"{missing} rows behind the backbone's start as the mean embedding" if missing else ""
    pairs = [(id, theirs[token]) for token, id in vocabulary.items() if token in theirs]
    pairs = [(ours, other) for ours, other in pairs if ours < num_rows and other < len(rows)]
    if not pairs:
        raise ValueError("vocabulary: no token in common with source_vocabulary, so no embedding can be loaded")
    full = rows.mean(0, keepdim=True).repeat(num_rows, 1)
    ours, others = (torch.tensor(part, device=rows.device) for part in zip(*pairs, strict=True))
    full[ours] = rows[others]
    found = len(set(ours.tolist()))
    return full, f"{found} of {num_rows} rows found by token, the others start as the mean embedding"


def check_fit(config: ConceptConfig, backbone: Backbone, layers: int, read_layer: int | None) -> None:
    """Raises ValueError with the field, what was expected and what came."""
    shape = backbone.shape

    def expect(name: str, expected: object, holds: bool) -> None:
        if not holds:
            got = getattr(config, name)
            raise ValueError(f"{name}: expected {expected}, got {got}; backbone_config makes a configuration that fits")

    if not 0 <= layers <= min(config.num_token_layers, shape.num_layers):
        raise ValueError(
            f"layers: expected at most {config.num_token_layers} (num_token_layers) and {shape.num_layers} "
            f"(of the backbone), got {layers}"
        )
    expect("token_dim", f"at most the backbone's width {shape.width}", config.token_dim <= shape.width)
    for prefix in ["token_"] * (layers > 0) + [""] * (read_layer is not None):
        names = [f"{prefix}{name}" for name in ("head_dim", "num_attention_heads", "intermediate_size")]
        head_dim, num_heads, intermediate = (getattr(config, name) for name in names)
        expect(names[0], f"the backbone's {shape.head_dim}", head_dim == shape.head_dim)
        expect(names[1], f"at most the backbone's {shape.num_heads}", num_heads <= shape.num_heads)
        is_same = intermediate == shape.intermediate_size
        expect(names[2], f"the backbone's {shape.intermediate_size}", is_same or not backbone.is_llama)
    if layers > 0:
        expect("token_mixer", "local", config.token_mixer == "local")
        expect("normalize_tokens", False, not config.normalize_tokens)
        expect("token_attention_bias", True, config.token_attention_bias or not shape.has_bias)
    if read_layer is not None:
        last = shape.num_layers - (1 if config.tie_layers else config.num_hidden_layers)
        if not 0 <= read_layer <= last:
            raise ValueError(f"read_layer: expected 0 to {last}, so that every layer has its own, got {read_layer}")
        expect("layer_kind", "cross with read_layer", config.layer_kind == "cross")
        is_same = config.token_dim == config.hidden_size
        expect("hidden_size", f"token_dim = {config.token_dim} with read_layer", is_same)


def differences(config: ConceptConfig, backbone: Backbone, layers: int, read_layer: int | None) -> list[str]:
    """Where our model computes something else than the backbone, in words."""
    shape, notes = backbone.shape, []
    if layers < config.num_token_layers:
        notes.append(f"token layers {layers} to {config.num_token_layers - 1} are new")
    if backbone.is_llama:
        if layers:
            window = config.token_window
            notes.append(f"tokens read {window} positions to both sides, the backbone's read all that came before")
        if config.token_positions != "rope" or config.rope_theta != shape.rope_theta:
            notes.append(f"positions are {config.token_positions} with theta {config.rope_theta}, the backbone's rope "
                         f"with theta {shape.rope_theta}")  # fmt: skip
        if shape.rope_type != "default":
            notes.append(f"the backbone's angles are scaled ({shape.rope_type}), ours are not")
        if shape.activation not in ("silu", "swish") and layers:
            notes.append(f"gates are silu, the backbone's {shape.activation}")
    else:
        notes.append("the stream is not normalised after each layer, as it was; the first attention alone is the same")
        notes.append("feed-forwards of one matrix and GELU have no place in gated ones, which stay as they were")
        if config.token_positions != "learned":
            notes.append(f"positions are {config.token_positions}, the backbone's learned")
    if config.norm_eps != shape.norm_eps:
        notes.append(f"norm_eps is {config.norm_eps}, the backbone's {shape.norm_eps}")
    if read_layer is not None:
        notes.append("concepts read with normalised queries and keys and without biases; the backbone had its own way")
    inside = re.compile(r"(?:^|\.)layers?\.(\d+)\.")
    for name in backbone.untaken():
        index = inside.search(name)
        if index and int(index[1]) < layers and (backbone.is_llama or name.endswith("attention.output.dense.bias")):
            notes.append(f"{name} has no counterpart")
    return notes
