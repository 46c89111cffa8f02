"""A pretrained module with random weights, in windows under concepts and in full attention, to be timed."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModel

from ...engine.data.tokenizer import load as load_tokenizer
from ...engine.model_folder import find, has_tokenizer, in_one_line, inspect
from ...models.backbone_config import inner_config
from ...models.backbone_source import describe
from ...models.config import ConceptConfig
from ...models.encoder import ConceptEncoder


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
