"""What of a pretrained module's configuration is looked at; loads none of transformers' models."""

from typing import Any

from transformers import PretrainedConfig

LAYERS = {  # model types that are known here -> where their layers are
    "bert": "encoder.layer", "camembert": "encoder.layer", "roberta": "encoder.layer", "xlm-roberta": "encoder.layer",
    "mpnet": "encoder.layer", "distilbert": "transformer.layer", "modernbert": "layers", "ultrabert": "layers",
    "llama": "layers", "qwen2": "layers", "qwen3": "layers",
}  # fmt: skip
CAUSAL = ("llama", "qwen2", "qwen3")
AFTER_PADDING = ("camembert", "roberta", "xlm-roberta", "mpnet")  # positions begin behind the padding id


def inner_config(described: dict[str, Any]) -> PretrainedConfig:
    """The configuration of transformers inside ``ConceptConfig.backbone``.

    Raises:
        ValueError: its family is not one of ``LAYERS``, or it is not the configuration of a model.
    """
    fields = described.get("config") if isinstance(described, dict) else None
    if not isinstance(fields, dict):
        raise ValueError(f"backbone: expected what backbone_source.describe makes of a folder, got {described!r}")
    kind = fields.get("model_type")
    if kind not in LAYERS:
        raise ValueError(f"backbone: expected a model of type {', '.join(LAYERS)}, got {kind}")
    fields = {name: value for name, value in fields.items() if name not in ("model_type", "dtype", "torch_dtype")}
    from transformers import AutoConfig  # whose arrival loads config.py, which loads this file: `auto.py`

    return AutoConfig.for_model(kind, **fields)


def position_limit(inner: PretrainedConfig) -> int:
    """Tokens of the longest text that the module has positions for, special ones included."""
    behind = inner.pad_token_id + 1 if inner.model_type in AFTER_PADDING else 0
    return inner.max_position_embeddings - behind


def layer_numbers(inner: PretrainedConfig, layers: int | list[int] | None) -> list[int]:
    """The layers that are kept, in order: all, the first so many, or those of a list."""
    if layers is None:
        return list(range(inner.num_hidden_layers))
    return list(range(layers)) if isinstance(layers, int) else list(layers)
