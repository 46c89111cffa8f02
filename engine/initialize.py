"""The first weights of a run from another model of this package."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from ..models.backbone_source import check_loaded
from ..models.config import ConceptConfig
from ..models.folder import not_finite, of_other_shapes
from ..models.masked_lm import ConceptForMaskedLM
from ..models.start.warm_start import WarmStart, warm_start_tied
from ..models.tasks.model import LoadReport
from .errors import InputError
from .launching.launch import World
from .model_folder import find, has_tokenizer, in_one_line, inspect
from .recipe.schema import Init
from .saved_model import quiet


def initialize(model: ConceptForMaskedLM, init: Init, tokenizer: Any, world: World) -> str:
    """Fills ``model`` from ``init.source``; returns what became of every tensor, for people to read. Collective.

    Raises:
        InputError: there is no such model, it is of another kind, a size does not fit, or nothing could be loaded.
    """
    folder, field = world.first_then_others(lambda: find(init.source, "init.source")), "init.source"
    kind = inspect(folder, field)
    with in_one_line(init.source, field):
        if init.embeddings:
            return take_embeddings(model, folder, init, tokenizer)
        if kind != ConceptConfig.model_type:
            raise InputError(
                f"{field}: {init.source}: expected a model of this package, got one of type {kind}; "
                "model.backbone takes pretrained models of transformers"
            )
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        report = from_ours(model, folder, config, init)
    if problem := not_finite(model.state_dict().items()):
        raise InputError(f"{field}: {init.source}: {problem}; take an earlier checkpoint of that run")
    return str(report)


def take_embeddings(model: ConceptForMaskedLM, folder: Path, init: Init, tokenizer: Any) -> str:
    """The word embeddings of any encoder, each by its entry in the vocabulary."""
    with quiet():
        source, info = AutoModel.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    check_loaded(folder, source, info)
    if not has_tokenizer(folder):
        raise InputError(f"init.source: {init.source}: no tokenizer.json, which says whose embeddings these are")
    theirs, ours = source.get_input_embeddings().weight.detach(), model.encoder.embed_tokens.weight
    if theirs.shape[1] != ours.shape[1]:
        raise InputError(
            f"init.source: {init.source}: its embeddings are {theirs.shape[1]} wide, the model's {ours.shape[1]}; "
            f"set model.token_dim to {theirs.shape[1]}"
        )
    words = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
    both = [(mine, words[entry]) for entry, mine in tokenizer.get_vocab().items() if entry in words]
    both = [(mine, row) for mine, row in both if row < len(theirs)]
    if not both:
        raise InputError(f"init.source: {init.source}: its vocabulary shares no entry with data.tokenizer")
    rows = torch.tensor(both)
    with torch.no_grad():
        ours[rows[:, 0]] = theirs[rows[:, 1]].to(ours)
    return f"word embeddings of {len(both)} of {len(tokenizer)} entries, {init.embeddings}; everything else is drawn"


def from_ours(model: ConceptForMaskedLM, folder: Path, config: ConceptConfig, init: Init) -> WarmStart | LoadReport:
    """A model of this package: its weights by name, resized where concepts or positions are more or fewer now."""
    if model.config.tie_layers and not config.tie_layers:
        return warm_start_tied(model, folder, init.layer)
    if init.layer:
        raise InputError("init.layer: expected nothing unless model.tie_layers is true and those of the source are not")
    with quiet():
        source, info = ConceptForMaskedLM.from_pretrained(
            folder, config=copy.deepcopy(model.config), use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    if problem := of_other_shapes(info):
        raise InputError(f"init.source: {init.source}: {problem}; say under model: what its config.json says")
    new = sorted(info["missing_keys"])
    loaded = sorted({name for name, _ in source.named_parameters()} - set(new))
    if not loaded:
        raise InputError(f"init.source: {init.source}: none of its weights has a place in this model")
    model.load_state_dict(source.state_dict())
    return LoadReport(tuple(loaded), tuple(new), tuple(sorted(info["unexpected_keys"])))
