"""The first weights of a run from another model: one of this package, or a Llama- or BERT-like one."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer

from ..models.backbone import init_from_backbone
from ..models.config import ConceptConfig
from ..models.encoder import ConceptPreTrainedModel
from ..models.warm_start import warm_start
from .errors import InputError
from .launch import World
from .recipe import Init

FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # of a hub repository: no pickles, no code


def initialize(model: ConceptPreTrainedModel, init: Init, tokenizer: Any, world: World) -> str:
    """Fills ``model`` from ``init.source``; returns what became of every tensor, for people to read. Collective.

    Raises:
        InputError: there is no such model, it is of another kind, a size does not fit, or nothing could be loaded.
    """
    folder = world.first_then_others(lambda: find(init.source))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if isinstance(config, ConceptConfig):
            return str(warm_start(model, folder, init.layer))
        words = AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if has_tokenizer(folder) else None
        return str(
            init_from_backbone(
                model, folder, init.layers, read_layer=init.read_layer,
                vocabulary=words and tokenizer.get_vocab(), source_vocabulary=words and words.get_vocab(),
            )
        )  # fmt: skip
    except (ValueError, OSError) as error:
        raise InputError(f"init.source: {init.source}: {' '.join(str(error).split())}") from error


def find(source: str) -> Path:
    """The folder itself, or what the hub has under this name."""
    folder = Path(source).expanduser()
    if folder.exists():
        return folder
    try:
        return Path(snapshot_download(source, allow_patterns=list(FILES)))
    except Exception as error:  # huggingface_hub has dozens of kinds
        raise InputError(
            f"init.source: {source}: no such folder here, and it cannot be fetched from the hub "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); give a folder with config.json and "
            "safetensors, or a hub id"
        ) from error


def has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").exists() or (folder / "tokenizer_config.json").exists()
