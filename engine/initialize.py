"""The first weights of a run from another model of this package."""

import copy
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoConfig

from ..models.config import ConceptConfig
from ..models.masked_lm import ConceptForMaskedLM
from ..models.start.warm_start import WarmStart, warm_start_tied
from ..models.tasks.model import LoadReport
from .errors import InputError
from .launch import World
from .recipe.schema import Init
from .saved_model import quiet

FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "README.md")  # of a hub repository: no pickles, no code


def initialize(model: ConceptForMaskedLM, init: Init, world: World) -> str:
    """Fills ``model`` from ``init.source``; returns what became of every tensor, for people to read. Collective.

    Raises:
        InputError: there is no such model, it is of another kind, a size does not fit, or nothing could be loaded.
    """
    folder = world.first_then_others(lambda: find(init.source, "init.source"))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(config, ConceptConfig):
            kind = getattr(config, "model_type", None)
            raise InputError(
                f"init.source: {init.source}: expected a model of this package, got one of type {kind}; "
                "model.backbone takes pretrained models of transformers"
            )
        return str(from_ours(model, folder, config, init))
    except InputError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        raise InputError(f"init.source: {init.source}: {' '.join(str(error).split())}") from error


def from_ours(model: ConceptForMaskedLM, folder: Path, config: ConceptConfig, init: Init) -> WarmStart | LoadReport:
    """A model of this package: its weights by name, resized where concepts or positions are more or fewer now."""
    if model.config.tie_layers and not config.tie_layers:
        return warm_start_tied(model, folder, init.layer)
    if init.layer:
        raise InputError("init.layer: expected nothing unless model.tie_layers is true and those of the source are not")
    with quiet():
        source, info = ConceptForMaskedLM.from_pretrained(
            folder, config=copy.deepcopy(model.config), use_safetensors=True, output_loading_info=True
        )
    new = sorted(info["missing_keys"])
    loaded = sorted({name for name, _ in source.named_parameters()} - set(new))
    if not loaded:
        raise InputError(f"init.source: {init.source}: none of its weights has a place in this model")
    model.load_state_dict(source.state_dict())
    return LoadReport(tuple(loaded), tuple(new), tuple(sorted(info["unexpected_keys"])))


def find(source: str, field: str) -> Path:
    """The folder itself, or what the hub has under this name."""
    folder = Path(source).expanduser()
    if folder.exists():
        return folder
    try:
        return Path(snapshot_download(source, allow_patterns=list(FILES)))
    except Exception as error:  # huggingface_hub has dozens of kinds
        raise InputError(
            f"{field}: {source}: no such folder here, and it cannot be fetched from the hub "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); give a folder with config.json and "
            "safetensors, or a hub id"
        ) from error


def has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").exists() or (folder / "tokenizer_config.json").exists()
