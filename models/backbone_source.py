"""Opening a pretrained model of transformers: what a configuration must keep of it, and its weights.

The folder is needed once. What ``describe`` returns is part of ``ConceptConfig``, and weights are saved with ours.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from .backbone import Backbone, keep_layers
from .backbone_config import inner_config, layer_numbers
from .folder import not_finite, of_other_shapes, read_config, weight_files

IGNORED = ("pooler.", "cls.", "lm_head.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector.", "head.",
           "decoder.", "classifier.", "qa_outputs.", "embeddings.position_ids")  # fmt: skip


def describe(folder: str | Path, tokenizer: Any = None, name: str | None = None) -> dict[str, Any]:
    """What ``ConceptConfig.backbone`` holds: ``config`` of the module, the special ids ``prefix`` and ``suffix`` that
    ``tokenizer`` puts around a text, and where all comes from (``name``, ``license``, ``revision``, ``sha256``).

    Args:
        folder: of a model of transformers with safetensors.
        tokenizer: its tokenizer; None: no special tokens stand around a text.
        name: by which people know it; the folder's name by default.

    Raises:
        ValueError: one line: no folder, no config.json, no safetensors, code of its own, an unknown family.
    """
    folder = Path(folder)
    fields = read_config(folder)
    if "auto_map" in fields:
        raise ValueError(f"{folder}: its config.json asks for code of its own (auto_map), which is never run here")
    files = weight_files(folder)
    inner = inner_config({"config": fields})
    prefix, suffix = around(tokenizer)
    return {
        "config": {**inner.to_diff_dict(), "model_type": inner.model_type, "vocab_size": inner.vocab_size},
        "prefix": prefix, "suffix": suffix, "name": name or folder.resolve().name, "license": license_of(folder),
        "revision": revision_of(folder), "sha256": digest(files),
    }  # fmt: skip


@torch.no_grad()
def load(backbone: Backbone, folder: str | Path, layers: int | list[int] | None) -> None:
    """Fills a backbone with the weights of its folder, all of them, value by value; bridges stay as they are.

    Rows of the embeddings behind the folder's own (of a mask token that was added) start as the mean of the others.

    Raises:
        ValueError: a weight is missing, has another shape, or is not finite.
    """
    source, info = AutoModel.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True, dtype=torch.float32,
        ignore_mismatched_sizes=True,  # which check_loaded names
    )
    check_loaded(folder, source, info)
    state = keep_layers(source, layer_numbers(source.config, layers)).state_dict()
    table = backbone.embeddings_name.removeprefix("model.")
    num_new = backbone.embeddings.num_embeddings - len(state[table])
    if num_new > 0:
        state[table] = torch.cat((state[table], state[table].mean(0, keepdim=True).expand(num_new, -1)))
    state |= {name: value for name, value in backbone.model.state_dict().items() if ".bridge." in name}
    backbone.model.load_state_dict(state)


def check_loaded(folder: str | Path, source: nn.Module, info: dict[str, Any]) -> None:
    """What ``from_pretrained`` only warns of, where it says what it did (``info``), but for heads that nothing needs.

    Raises:
        ValueError: a weight is missing, has another shape, or is not finite.
    """
    if missing := sorted(name for name in info["missing_keys"] if not name.startswith(IGNORED)):
        raise ValueError(f"{folder}: {len(missing)} weights are missing, {missing[0]} among them; get the model again")
    if problem := of_other_shapes(info) or not_finite(source.state_dict().items()):
        raise ValueError(f"{folder}: {problem}; get the model again")


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and behind a text by itself."""
    if tokenizer is None:
        return [], []
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for i in range(len(full) - len(bare) + 1):
        if full[i : i + len(bare)] == bare:
            return full[:i], full[i + len(bare) :]
    raise ValueError("tokenizer: expected special tokens around a text, got other ids for the text itself")


def license_of(folder: Path) -> str | None:
    """From the head of the model card; None where the folder does not say."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    head = card.read_text(encoding="utf-8", errors="replace").split("---")[1:2]
    lines = [line for part in head for line in part.splitlines() if line.startswith("license:")]
    return lines[0].removeprefix("license:").strip() if lines else None


def revision_of(folder: Path) -> str | None:
    """The commit, of a folder that the hub's cache holds; else None: ``sha256`` tells versions apart."""
    folder = folder.resolve()
    return folder.name if folder.parent.name == "snapshots" else None


def digest(files: list[Path]) -> str:
    """sha256 of the weights, as one file has it; of several the digest of their digests."""
    found = []
    for file in files:
        with file.open("rb") as opened:
            found.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def backbone_of(model: nn.Module) -> Backbone | None:
    return next((module for module in model.modules() if isinstance(module, Backbone)), None)
