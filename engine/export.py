"""The result of a run: a Hugging Face folder with float32 safetensors and the tokenizer."""

import shutil
from pathlib import Path
from typing import Any

from . import compat
from .launch import World


def export(world: World, engine: Any, tokenizer: Any, folder: Path) -> Path:
    """Writes `folder` so that `AutoModelForMaskedLM` and `AutoTokenizer` load it. Collective; any ZeRO stage.

    Weights are gathered one by one and kept on rank 0 only; a tied weight is written once. The folder appears when it
    is complete.

    Raises:
        OSError: on every rank.
    """
    gathered = {}
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        value = compat.whole(tensor)
        if world.is_first:
            gathered[name] = value

    def write() -> None:
        unfinished = folder.with_name(f".unfinished-{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            bare = type(engine.module)(engine.module.config)
            bare.load_state_dict(gathered)
            bare.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    world.first_then_share(write)
    return folder
