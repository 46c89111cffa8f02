"""The model of a recipe as it starts, nothing trained, in a Hugging Face folder.

With an exact backbone and concepts that start from its states that is a useful model already: the mean of its concepts
is the mean of the backbone's states.
"""

import argparse
from pathlib import Path

import torch

from .beginning import begin
from .card import About
from .data.corpus import open_corpus
from .data.teacher import read_pooling
from .errors import InputError
from .export import export
from .launching import launch
from .model_folder import find
from .recipe.load import load_recipe
from .recipe.schema import Recipe


def build(recipe: Recipe, folder: Path) -> str:
    """Writes the weights with which a run of this recipe would take its first step; returns where they come from.

    The text of the recipe is opened as for a run: the tokenizer, and how states of a backbone lie, depend on it.

    Raises:
        InputError: the folder is in use or cannot be written, or the recipe, its data or its backbone cannot be used.
    """
    if folder.exists() and not (folder.is_dir() and is_free(folder)):
        raise InputError(f"--out {folder}: in use already; name a new folder, or one that holds a model only")
    with launch.world() as world:
        corpus = open_corpus(recipe.data)
        torch.manual_seed(recipe.run.seed)  # as a run does
        model, origin, *_ = begin(recipe, corpus, world)
        about = About(recipe.run.name, recipe.data.window, recipe.resolved(), is_trained=False)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            export(world, model.eval(), corpus.tokenizer, folder, about)
        except OSError as error:
            raise InputError(f"--out {folder}: cannot be written ({error.strerror or error})") from error
    return origin


def pooling_note(recipe: Recipe) -> str:
    """What to know of a backbone that is no sentence encoder of averaged tokens, where concepts are such averages."""
    name = recipe.model.get("backbone")
    if name is None or recipe.model.get("init_queries") != "state":
        return ""
    try:
        pooling, _ = read_pooling(find(name, "model.backbone"))
    except InputError:
        pooling = "its own way"
    return "" if pooling == "mean" else f"note: {name} pools by {pooling}, and concepts start as means of its states"


def is_free(folder: Path) -> bool:
    """Whether a folder is empty, or a model that may be written again."""
    return not any(folder.iterdir()) or (folder / "config.json").is_file()


def main(options: argparse.Namespace) -> int:
    """``options``: recipe, overrides, out."""
    recipe, folder = load_recipe(options.recipe, options.overrides), options.out
    origin = build(recipe, folder)
    for line in filter(None, (origin, pooling_note(recipe))):
        print(line)
    print(f"{folder}: the model of {recipe.run.name} as it starts, nothing trained")
    return 0
