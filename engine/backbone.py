"""The pretrained module that a recipe names as `model.backbone`: found, checked against the tokenizer, filled."""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import AutoModel

from ..models.backbone import Backbone
from ..models.backbone_config import inner_config
from ..models.backbone_source import around, backbone_of, describe, load
from ..models.bridges import choose_layers, fit_bridges
from ..models.config import ConceptConfig
from ..models.decisions import FIELDS
from ..models.folder import read_json
from ..models.objectives.view import SpecialTokens
from ..models.packing import pack
from .data.corpus import Corpus
from .data.loader import EVALUATION_SEED
from .data.tokenizer import load as load_tokenizer
from .errors import InputError
from .launching.launch import World
from .model_folder import find, has_tokenizer, in_one_line, inspect
from .recipe.schema import Recipe
from .saved_model import quiet

KEPT = "backbone.json"  # in the run's folder: what a resumed run needs, whose source may be gone
CALIBRATION_TOKENS, CHOICE_TOKENS = 16384, 4096
WHOLE = {"backbone_layers": None, "backbone_bridges": False, "backbone_train": "none"}
UNMOVED = ("backbone_train",)  # fields that change no state of a frozen one


class Opened(NamedTuple):
    described: dict[str, Any]  # `ConceptConfig.backbone`
    folder: Path | None  # None: of a resumed run, whose weights are in the checkpoint
    tokenizer: Any = None  # its own
    layers: list[int] | None = None  # that a recipe's number of layers came to

    @property
    def kept(self) -> str:
        """What `backbone.json` holds."""
        return json.dumps({**self.described, "layers": self.layers}, indent=1, allow_nan=False)

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
    if recipe.model.get("backbone") is not None and kept is not None and kept.exists():
        with in_one_line(kept):
            described = read_json(kept)
            inner_config(described)  # which knows whether it is one
        return Opened(described, None, layers=described.pop("layers", None))
    opened = world.first_then_others(lambda: describe_backbone(recipe, tokenizer))
    if opened is not None:
        check_tokenizer(tokenizer, opened, recipe)
    return opened


def describe_backbone(recipe: Recipe, tokenizer: Any = None) -> Opened | None:
    """What `model.backbone` names, without a look at its weights; ``tokenizer``: where its folder has none.

    Raises:
        InputError: as `open_backbone`, another tokenizer apart.
    """
    name = recipe.model.get("backbone")
    if name is None:
        return None
    folder = find(name, "model.backbone")
    inspect(folder, "model.backbone")
    with in_one_line(name, "model.backbone"):
        is_folder = Path(name).expanduser().exists()
        described = describe(folder, name=None if is_folder else name)
        with torch.device("meta"):  # sizes that no module can have are found before anything is made
            AutoModel.from_config(inner_config(described))
    words = load_tokenizer(str(folder), "model.backbone") if has_tokenizer(folder) else tokenizer
    with in_one_line(name, "model.backbone"):
        described["prefix"], described["suffix"] = around(words)
    return Opened(described, folder, words)


def check_tokenizer(tokenizer: Any, opened: Opened, recipe: Recipe) -> None:
    """Raises InputError where a token of the run is another one to the backbone, or none."""
    name, num_rows = recipe.model["backbone"], inner_config(opened.described).vocab_size
    ours, remedy = tokenizer.get_vocab(), f"set data.tokenizer to {name}"
    known = opened.tokenizer.get_vocab()
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


def with_layers(opened: Opened, recipe: Recipe, corpus: Corpus) -> Opened:
    """Where the recipe says how many layers, and not which: chosen on its text, see `choose_layers`.

    Raises:
        InputError: it has not as many, or a weight is missing.
    """
    count, inner = recipe.model.get("backbone_layers"), inner_config(opened.described)
    if opened.folder is None or not isinstance(count, int) or not 0 < count < inner.num_hidden_layers:
        return opened
    size = opened.vocab_size(corpus.tokens)
    config = recipe.build_config(vocab_size=size, backbone=opened.described, **WHOLE)
    texts = pack(sample(corpus, CHOICE_TOKENS))
    return opened._replace(layers=choose_layers(whole_backbone(opened, config), count, texts))


def whole_backbone(opened: Opened, config: ConceptConfig) -> Backbone:
    """The module with all of its layers and their weights, in the windows of this configuration."""
    config = copy.deepcopy(config)
    for name, value in WHOLE.items():
        setattr(config, name, value)
    whole = Backbone(config)
    fill_weights(whole, opened, None)
    return whole


def fill_weights(backbone: Backbone, opened: Opened, layers: int | list[int] | None) -> None:
    with in_one_line(opened.folder, "model.backbone"), quiet():
        load(backbone, opened.folder, layers)


def fill(model: nn.Module, opened: Opened, corpus: Corpus) -> str:
    """Loads the weights, fits bridges, and measures how states lie where concepts start from them; says what was done.

    Raises:
        InputError: a weight is missing or does not fit.
    """
    backbone, config = backbone_of(model), model.config
    fill_weights(backbone, opened, config.backbone_layers)
    texts = pack(sample(corpus, CALIBRATION_TOKENS))
    if config.backbone_bridges:
        fit_bridges(backbone, whole_backbone(opened, config), config.backbone_layers, texts)
    if config.init_queries == "state":
        backbone.calibrate(texts)
    about, layers = opened.described, f"{len(backbone.layers)} layers"
    if isinstance(config.backbone_layers, list):
        between = " and linear maps between" if config.backbone_bridges else ""
        layers = f"layers {', '.join(map(str, config.backbone_layers))}{between}"
    trained = "frozen" if config.backbone_train == "none" else f"{config.backbone_train} trained"
    return (
        f"backbone: {about['name']} (license {about['license'] or 'not stated'}, sha256 {about['sha256'][:12]}), "
        f"{layers}, {trained}, windows of {config.backbone_window} tokens"
    )


def identity(config: ConceptConfig) -> dict[str, Any]:
    """What decides a state, of the text apart; JSON."""
    fields = {name: getattr(config, name) for name in FIELDS if name.startswith("backbone_") and name not in UNMOVED}
    return {name: config.backbone[name] for name in ("config", "prefix", "suffix", "sha256")} | fields


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


def sample(corpus: Corpus, num_tokens: int) -> list[torch.Tensor]:
    """Windows of the training text, each source by its weight and each window by its length, as training reads them."""
    windows, texts, total = corpus.train, [], 0
    weights = np.concatenate([part.weight * part.lengths / part.lengths.sum() for part in windows.parts])
    lots = np.random.default_rng(EVALUATION_SEED).exponential(size=len(windows)) / np.maximum(weights, 1e-300)
    for row in lots.argsort(kind="stable"):
        texts.append(torch.from_numpy(windows[int(row)]))
        total += len(texts[-1])
        if total >= num_tokens:
            break
    return texts
