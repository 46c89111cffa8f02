"""What a run keeps of its recipe: nothing in it depends on where the run was started, or on a later default."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..models.config import ConceptConfig
from ..models.decisions import FIELDS
from .data.cache import cache_folder
from .data.pydocs import NAMES
from .data.sources import is_local
from .model_folder import HUB_ID
from .recipe.checker import model_section
from .recipe.data import DataRecipe
from .recipe.finetune import Finetune
from .recipe.schema import Recipe

HERE = "a path"  # stands for any place on this machine where only its content counts


def record(recipe: Recipe | Finetune) -> Recipe | Finetune:
    """The recipe as recipe.yaml of its run has it: every field of the model, every place from the root of the disk on.

    Phrases that were counted in the text are counted again: they lie in the cache, which another machine lacks.
    """
    if isinstance(recipe, Finetune):
        run = recipe.run.model_copy(update={"folder": absolute(recipe.run.folder)})
        return task_with_places(recipe, absolute).model_copy(update={"run": run})
    recipe = with_places(recipe, absolute, lambda phrases: None if is_counted(recipe, phrases) else absolute(phrases))
    run = recipe.run.model_copy(update={"folder": absolute(recipe.run.folder)})
    cache = recipe.data.cache and absolute(recipe.data.cache)
    return recipe.model_copy(update={
        "run": run, "model": every_field(recipe), "data": recipe.data.model_copy(update={"cache": cache}),
    })  # fmt: skip


def trajectory(recipe: Recipe | Finetune) -> dict[str, Any]:
    """Dotted field -> value, of what decides the loss sequence and must be the same when a run is resumed.

    Where text, tokenizer, teacher or backbone lie on this machine is not part of it: a run may move, and so may they.
    Their contents are compared by themselves; a list of phrases is part of it by its content.
    """
    if isinstance(recipe, Finetune):
        return task_with_places(recipe, lambda place: HERE).trajectory()
    recipe = with_places(recipe, lambda place: HERE, digest)
    return recipe.model_copy(update={"model": every_field(recipe)}).trajectory()


def every_field(recipe: Recipe) -> dict[str, Any]:
    """The section `model` with the defaults of what it leaves out."""
    usual = ConceptConfig()
    known = {
        name: FIELDS[name].default if name in FIELDS else getattr(usual, name) for name in model_section().model_fields
    }
    hidden = next((part["hidden"] for _, part in recipe.parts() if "hidden" in part), known["hidden_tokens"])
    return known | {"backbone": None, "hidden_tokens": hidden} | recipe.model


def with_places(recipe: Recipe, change: Callable[[str], Any], of_phrases: Callable[[str], Any]) -> Recipe:
    """The recipe with every path of something on this machine changed; names of the hub stay."""
    changes: dict[str, Any] = {"data": data_with_places(recipe.data, change)}
    changes["model"] = {**recipe.model, **changed(recipe.model, "backbone", change)}
    if recipe.init is not None:
        changes["init"] = recipe.init.model_copy(update=changed(vars(recipe.init), "source", change))
    if recipe.distill is not None:
        changes["distill"] = {**recipe.distill, **changed(recipe.distill, "teacher", change)}

    def of_objective(section: dict[str, Any]) -> dict[str, Any]:
        section = {**section, "phrases": of_phrases(section["phrases"])} if section.get("phrases") else section
        if "parts" in section:
            section = {**section, "parts": [of_objective(part) for part in section["parts"]]}
        return section

    return recipe.model_copy(update={**changes, "objective": of_objective(recipe.objective)})


def task_with_places(recipe: Finetune, change: Callable[[str], Any]) -> Finetune:
    """The same of a recipe that learns a task: its source, its data and its cache."""
    places = {name: change(place) for name in ("data", "cache") if (place := getattr(recipe.task, name)) is not None}
    source = changed(vars(recipe), "source", change)
    return recipe.model_copy(update={"task": recipe.task.model_copy(update=places), **source})


def data_with_places(data: DataRecipe, change: Callable[[str], Any]) -> DataRecipe:
    local = [source.path not in NAMES and is_local(source.path) for source in data.source]
    sources = []
    for source, is_here in zip(data.source, local, strict=True):
        places = {"path": change(source.path)} if is_here else {}
        if is_here and isinstance(source.validation, str):
            places["validation"] = change(source.validation)
        sources.append(source.model_copy(update=places))
    fields: dict[str, Any] = {"source": sources}
    if isinstance(data.validation, str) and any(local) and is_local(data.validation):
        fields["validation"] = change(data.validation)
    return data.model_copy(update=fields | changed(vars(data), "tokenizer", change, but=NAMES))


def changed(
    fields: dict[str, Any], name: str, change: Callable[[str], Any], but: tuple[str, ...] = ()
) -> dict[str, Any]:  # fmt: skip
    """{name: its changed value} where that is a folder or file here, or was one: no name of the hub is a path."""
    place = fields.get(name)
    is_here = isinstance(place, str) and place not in but and (
        not HUB_ID.fullmatch(place) or Path(place).expanduser().exists()
    )  # fmt: skip
    return {name: change(place)} if is_here else {}


def absolute(place: str) -> str:
    return str(Path(place).expanduser().absolute())


def is_counted(recipe: Recipe, phrases: str) -> bool:
    return cache_folder(recipe.data.cache).absolute() in Path(phrases).absolute().parents


def digest(phrases: str) -> str:
    """What a list of phrases says, in sixteen hexadecimal digits; its path, where there is no such file."""
    file = Path(phrases).expanduser()
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else phrases
