"""The result of a run: a Hugging Face folder with float32 safetensors and the tokenizer."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from . import compat
from .launch import World


def export(world: World, model: nn.Module, tokenizer: Any, folder: Path) -> Path:
    """Writes `folder` so that `AutoModelForMaskedLM` and `AutoTokenizer` load it. Collective; any ZeRO stage.

    Weights are gathered one by one and kept on rank 0 only; a tied weight is written once. The folder appears when it
    is complete.

    Raises:
        OSError: on every rank.
    """
    gathered = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        value = compat.whole(tensor)
        if world.is_first:
            gathered[name] = value

    def write() -> None:
        unfinished = folder.with_name(f".unfinished-{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            bare = type(model)(model.config)
            bare.load_state_dict(gathered)
            with quiet():
                bare.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            for weights in unfinished.glob("*.safetensors"):
                shutil.copymode(unfinished / "config.json", weights)  # safetensors lets only the owner read
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    world.first_then_share(write)
    return folder


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars."""
    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()
