"""What a pretrained module costs: counted on the module itself, which is built without weights; and the module with
random ones, in windows under concepts and in full attention, to be timed.

R rows of all windows, special tokens included, L rows of one window, e width of the module's heads together.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import AutoModel

from ...engine.data.tokenizer import load as load_tokenizer
from ...engine.model_folder import find, has_tokenizer, in_one_line, inspect
from ...models.backbone import Backbone, cut
from ...models.backbone_config import inner_config
from ...models.backbone_source import describe
from ...models.config import ConceptConfig
from ...models.decisions import FIELDS
from ...models.encoder import ConceptEncoder


class Counted(NamedTuple):
    parameters: int
    matrices: tuple[int, ...]  # numbers in the matrices of each layer
    num_trained: int  # layers, the last ones
    width: int  # e
    capacity: int  # tokens of the text that a window holds
    num_added: int  # special tokens of each window


def counted(config: ConceptConfig) -> Counted:
    named = {name: getattr(config, name) for name in FIELDS if name.startswith("backbone")}
    return _counted(json.dumps(named | {"vocab_size": config.vocab_size}, sort_keys=True, allow_nan=False))


@lru_cache(maxsize=8)
def _counted(fields: str) -> Counted:
    config = ConceptConfig(**json.loads(fields))
    with torch.device("meta"):
        backbone = Backbone(config)
    inner, layers = backbone.model.config, list(backbone.layers)
    parts = backbone.trained_parts()
    num_trained = len(layers) if backbone.trained == "all" else sum(any(p is layer for p in parts) for layer in layers)
    head_dim = getattr(inner, "head_dim", None) or inner.hidden_size // inner.num_attention_heads
    return Counted(
        sum(parameter.numel() for parameter in backbone.model.parameters()),
        tuple(sum(p.numel() for p in layer.parameters() if p.ndim == 2) for layer in layers),
        num_trained, inner.num_attention_heads * head_dim, backbone.capacity,
        len(backbone.prefix) + len(backbone.suffix),
    )  # fmt: skip


def backbone_flops(config: ConceptConfig, num_sequences: int, num_tokens: int, trained_only: bool = False) -> int:
    """A layer: 2 R x the numbers in its matrices  +  4 R L e of attention, over texts of equal length.

    A causal mask or a narrow one inside a window saves nothing here, as it is computed. ``trained_only``: of the layers
    that a gradient passes.
    """
    if config.backbone is None or num_tokens == 0:
        return 0
    found = counted(config)
    length = -(-num_tokens // max(1, num_sequences))
    windows = cut(np.array([length]), found.capacity, config.backbone_overlap)
    rows_of_window = windows.lengths + found.num_added
    rows, pairs = int(rows_of_window.sum()), int((rows_of_window**2).sum())
    matrices = found.matrices[len(found.matrices) - found.num_trained :] if trained_only else found.matrices
    of_text = sum(2 * rows * numbers + 4 * pairs * found.width for numbers in matrices)
    return of_text * num_tokens // length


def described(place: str) -> dict[str, Any]:
    """``ConceptConfig.backbone`` of a folder or hub id, for `--backbone`.

    Raises:
        InputError: one line: no such folder, no safetensors, code of its own, an unknown family.
    """
    folder = find(place, "--backbone")
    inspect(folder, "--backbone")
    with in_one_line(place, "--backbone"):
        words = load_tokenizer(str(folder), "--backbone") if has_tokenizer(folder) else None
        return describe(folder, words, None if Path(place).expanduser().exists() else place)


def in_windows(backbone: dict[str, Any], num_concepts: int, train: str) -> nn.Module:
    """The module in windows of 256 tokens and one layer of concepts that start from its states, as `pretrain/read.yaml`
    has them; ``train``: ``backbone_train``. Random weights."""
    inner = inner_config(backbone)
    window = min(256, getattr(inner, "max_position_embeddings", None) or 256)
    return ConceptEncoder(ConceptConfig(
        vocab_size=inner.vocab_size, hidden_size=inner.hidden_size, num_concepts=num_concepts, num_hidden_layers=1,
        num_attention_heads=inner.num_attention_heads, intermediate_size=2 * inner.hidden_size,
        init_queries="state", backbone=backbone, backbone_window=window, backbone_train=train,
    ))  # fmt: skip


def whole(backbone: dict[str, Any], max_tokens: int) -> nn.Module:
    """The bare module, its table of positions stretched to ``max_tokens``. Random weights, no dropout."""
    inner = inner_config(backbone)
    inner.max_position_embeddings = max_tokens + 8  # some families begin to count behind the padding
    return AutoModel.from_config(inner).eval()
