"""The pretrained module that a recipe names as `model.backbone`: found, checked against the tokenizer, filled."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModel

from ..models.backbone_config import inner_config
from ..models.backbone_source import around, backbone_of, describe, load
from ..models.folder import read_json
from ..models.objectives.view import SpecialTokens
from ..models.packing import pack
from .data.corpus import Corpus
from .data.loader import EVALUATION_SEED
from .data.order import raw
from .data.tokenizer import load as load_tokenizer
from .errors import InputError
from .launch import World
from .model_folder import find, has_tokenizer, in_one_line, inspect
from .recipe.schema import Recipe
from .saved_model import quiet

KEPT = "backbone.json"  # in the run's folder: what a resumed run needs, whose source may be gone
CALIBRATION_TOKENS = 16384


class Opened(NamedTuple):
    described: dict[str, Any]  # `ConceptConfig.backbone`
    folder: Path | None  # None: of a resumed run, whose weights are in the checkpoint

    def vocab_size(self, tokens: SpecialTokens) -> int:
        return max(tokens.vocab_size, inner_config(self.described).vocab_size)


def open_backbone(recipe: Recipe, tokenizer: Any, world: World, kept: Path | None = None) -> Opened | None:
    """What `model.backbone` names; None where a recipe names nothing. Collective.

    Args:
        tokenizer: of the run, which has to be the backbone's own (a mask token may have been added).
        kept: `backbone.json` of a run that is resumed.

    Raises:
        InputError: one line: no such folder, no safetensors, code of its own, an unknown family, another tokenizer.
    """
    name = recipe.model.get("backbone")
    if name is None:
        return None
    if kept is not None and kept.exists():
        with in_one_line(kept):
            described = read_json(kept)
            inner_config(described)  # which knows whether it is one
        return Opened(described, None)
    folder = world.first_then_others(lambda: find(name, "model.backbone"))
    inspect(folder, "model.backbone")
    with in_one_line(name, "model.backbone"):
        is_folder = Path(name).expanduser().exists()
        described = describe(folder, name=None if is_folder else name)
        with torch.device("meta"):  # sizes that no module can have are found before anything is made
            AutoModel.from_config(inner_config(described))
    words = load_tokenizer(str(folder), "model.backbone") if has_tokenizer(folder) else tokenizer
    with in_one_line(name, "model.backbone"):
        described["prefix"], described["suffix"] = around(words)
    check_tokenizer(tokenizer, words, inner_config(described).vocab_size, name, recipe)
    return Opened(described, folder)


def check_tokenizer(tokenizer: Any, theirs: Any, num_rows: int, name: str, recipe: Recipe) -> None:
    """Raises InputError where a token of the run is another one to the backbone, or none."""
    ours, remedy = tokenizer.get_vocab(), f"set data.tokenizer to {name}"
    known = theirs.get_vocab()
    for token, i in ours.items():
        if known.get(token, i) != i:
            problem = f"{token!r} is id {i} there and {known[token]} in {name}"
            raise InputError(f"data.tokenizer: {recipe.data.tokenizer}: {problem}; {remedy}")
    added = {i for token, i in ours.items() if token not in known}
    if added - {tokenizer.mask_token_id} or len(known) > len(ours):
        problem = f"its {len(ours)} tokens are not the {len(known)} of {name}"
        raise InputError(f"data.tokenizer: {recipe.data.tokenizer}: {problem}; {remedy}")
    outside = {i for i in ours.values() if i >= num_rows} - {tokenizer.mask_token_id}
    if outside:
        problem = f"its largest id is {max(outside)}, {name} has embeddings of {num_rows} tokens"
        raise InputError(f"data.tokenizer: {recipe.data.tokenizer}: {problem}; {remedy}")
    hides = any(part.get("hidden") == "mask" for _, part in recipe.parts())
    if hides and tokenizer.mask_token_id >= num_rows:
        raise InputError(f"objective.hidden: {name} has no mask token that it was trained with; use hidden = 'drop'")


def fill(model: nn.Module, opened: Opened, corpus: Corpus) -> str:
    """Loads the weights, and measures how states lie where concepts start from them; says what was done.

    Raises:
        InputError: a weight is missing or does not fit.
    """
    backbone, config = backbone_of(model), model.config
    with in_one_line(opened.folder, "model.backbone"), quiet():
        load(backbone, opened.folder, config.backbone_layers)
    if config.init_queries == "state":
        backbone.calibrate(pack(sample(corpus)))
    about, layers = opened.described, len(backbone.layers)
    trained = "frozen" if config.backbone_train == "none" else f"{config.backbone_train} trained"
    return (
        f"backbone: {about['name']} (license {about['license'] or 'not stated'}, sha256 {about['sha256'][:12]}), "
        f"{layers} layers, {trained}, windows of {config.backbone_window} tokens"
    )


def checkpoint_activations(model: nn.Module) -> None:
    """The module's own recomputation, where something of it is trained.

    Raises:
        InputError: there is no backbone, nothing of it is trained, or it cannot.
    """
    backbone = backbone_of(model)
    if backbone is None or model.config.backbone_train == "none":
        raise InputError("train.checkpoint_backbone: expected false: no layer of a backbone is trained")
    try:
        backbone.model.activation_checkpointing_enable()
    except ValueError as error:
        raise InputError(f"train.checkpoint_backbone: expected false: {error}") from error


def sample(corpus: Corpus) -> list[torch.Tensor]:
    """Windows of the training text, the first of a fixed shuffle."""
    windows, texts, total = corpus.train, [], 0
    for row in raw(EVALUATION_SEED, len(windows)).argsort(kind="stable"):
        texts.append(torch.from_numpy(windows[int(row)]))
        total += len(texts[-1])
        if total >= CALIBRATION_TOKENS:
            break
    return texts
