"""The result of a run: a Hugging Face folder with float32 safetensors, the tokenizer and a model card."""

import contextlib
import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from .. import __version__
from ..models.folder import not_finite
from . import compat
from .card import INSTALL, About, card, peer_card
from .data.tokenizer import for_use
from .errors import InputError
from .launching.launch import World


def export(world: World, model: nn.Module, tokenizer: Any, folder: Path, about: About) -> Path:
    """Writes `folder` so that transformers' Auto classes and `SentenceTransformer` load it. Collective; any ZeRO stage.

    Weights are gathered one by one and kept on rank 0 only; a tied weight is written once. The folder appears when it
    is complete.

    Raises:
        InputError: a weight is not finite; nothing is written, and what was in the folder stays.
        OSError: on every rank.
    """

    def fill(weights: dict[str, Tensor], unfinished: Path) -> None:
        bare = type(model)(finished(model.config, about.length))
        bare.load_state_dict(weights)
        with quiet():
            bare.save_pretrained(unfinished)
        for_use(tokenizer, about.length).save_pretrained(unfinished)
        for name, content in sentence_transformers_files(about.length).items():
            (unfinished / name).parent.mkdir(exist_ok=True)
            (unfinished / name).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (unfinished / "README.md").write_text(card(bare, about), encoding="utf-8")

    return written(world, model, folder, fill)


def export_peer(world: World, model: nn.Module, tokenizer: Any, folder: Path, about: About) -> Path:
    """The same of a model of transformers with a head: a plain folder of its own kind. ``tokenizer``: its own."""

    def fill(weights: dict[str, Tensor], unfinished: Path) -> None:
        bare = type(model)(model.config)
        bare.load_state_dict(weights)
        with quiet():
            bare.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(peer_card(bare, about), encoding="utf-8")

    return written(world, model, folder, fill)


def written(
    world: World, model: nn.Module, folder: Path, fill: Callable[[dict[str, Tensor], Path], None]
) -> Path:  # fmt: skip
    """``folder``, with what ``fill`` makes of the gathered weights. See `export`."""
    gathered = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        value = compat.whole(tensor)
        if world.is_first:
            gathered[name] = value

    def write() -> None:
        if problem := not_finite(gathered.items()):
            raise InputError(
                f"{folder}: not written, {problem}; start again under another run.name with a lower optim.lr, or with "
                "init.source = the model of a run that went well"
            )
        unfinished = folder.with_name(f".unfinished-{folder.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            fill(gathered, unfinished)
            for weights in unfinished.glob("*.safetensors"):
                shutil.copymode(unfinished / "config.json", weights)  # safetensors lets only the owner read
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    world.first_then_share(write)
    return folder


def finished(config: Any, length: int) -> Any:
    """The configuration that a folder gets: what to install, and where nothing in the model depends on
    max_position_embeddings, the trained length in it, since other programs cut texts there."""
    config = copy.deepcopy(config)
    config.conceptron_version, config.install = __version__, INSTALL
    if config.token_positions != "learned" and config.rope_extension == "none":
        config.max_position_embeddings = length
    return config


def sentence_transformers_files(length: int) -> dict[str, Any]:
    """What `SentenceTransformer(folder)` reads: the vector is `pooler_output`, normalised. Without it the library would
    average concepts under the mask of the tokens."""
    module = "sentence_transformers.base.modules"
    of_forward = {"method": "forward", "method_output_name": "pooler_output"}
    return {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": f"{module}.transformer.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Normalize", "type": f"{module}.normalize.Normalize"},
        ],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction", "modality_config": {"text": of_forward},
            "module_output_name": "sentence_embedding", "max_seq_length": length,
        },
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer", "similarity_fn_name": "cosine", "prompts": {},
            "default_prompt_name": None,
        },
        "1_Normalize/config.json": {
            "module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding",
        },
    }  # fmt: skip


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
