"""What a pretrained module costs, counted on the module itself, which is built without weights.

R rows of all windows, special tokens included, L rows of one window, e width of the module's heads together.
"""

import json
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from .backbone import Backbone, cut
from .config import ConceptConfig
from .decisions import FIELDS


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
