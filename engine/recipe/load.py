"""A recipe from its file: read, laid over, overridden, checked.

`size=tiny` makes a recipe of any size one that ends in under a minute on a CPU: `recipes/tiny.yaml` is laid over it
(sizes, text, number of steps), then what the recipe itself says under `tiny:`, then the overrides. Everything that is
the idea of the recipe stays: kinds of layers, objective, regularisers.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...models.objectives import Distill
from ...models.pretraining import ContrastiveTerm
from ...models.ranges import PLACE
from ...models.regularizers import Regularization
from ..errors import InputError
from .checker import Checker
from .combinations import conflicts, of_task
from .finetune import Finetune, is_finetune
from .reader import describe, dump, parse, read_yaml
from .schema import Recipe
from .shipped import SHIPPED

SIZES = ("full", "tiny")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """``load_any`` of a recipe that trains on text.

    Raises:
        InputError: also where it learns a task.
    """
    recipe = load_any(path, overrides)
    if not isinstance(recipe, Recipe):
        raise InputError(f"{path}: fine-tunes a finished model, which only `conceptron prepare` and `train` do")
    return recipe


def load_any(path: str | Path, overrides: Sequence[str] = ()) -> Recipe | Finetune:
    """Reads and checks a recipe.

    Args:
        path: the YAML file, or the name of a shipped one such as `pretrain/mlm.yaml`.
        overrides: `section.field=value`, each value parsed as YAML; later ones win.

    Raises:
        InputError: the file cannot be read, or a field is unknown or has a wrong value.
    """
    path = find_recipe(path)
    tree = read_yaml(path)
    if path.name == "recipe.yaml" and (path.parent / "environment.json").is_file():  # of a run: it lies where it lies
        place = path.absolute().parent
        tree = lay_over(tree, {"run": {"name": place.name, "folder": str(place.parent)}})
    changes: dict[str, Any] = {}
    overridden = {apply_override(changes, text): text for text in overrides if text.startswith("size=")}
    checker = Checker(str(path), overridden)
    size, tiny = changes.get("size", tree.pop("size", "full")), tree.pop("tiny", {})
    if size not in SIZES:
        raise InputError(checker.line("size", f"expected one of {', '.join(SIZES)}, got {describe(size)}"))
    if not isinstance(tiny, dict):
        raise InputError(checker.line("tiny", f"expected a section, got {describe(tiny)}"))
    if size == "tiny" and is_finetune(tree):
        raise InputError(checker.line("size", "expected full with a recipe that fine-tunes; lower train.steps instead"))
    if size == "tiny":
        tree = lay_over(tree, read_yaml(SHIPPED / "tiny.yaml"), tiny)
    for text in overrides:
        if not text.startswith("size="):
            overridden[apply_override(tree, text)] = text
    tree.setdefault("run", {})
    if isinstance(tree["run"], dict) and tree["run"].get("name") in (None, ""):
        tree["run"]["name"] = Path(path).stem + ("-tiny" if size == "tiny" else "")
    if is_finetune(tree):
        finetune = checker.check(Finetune, tree)
        for name in ("stages", "tokens_per_concept"):
            if getattr(finetune.train, name):
                raise InputError(checker.line(f"train.{name}", "expected nothing with a recipe that fine-tunes"))
        for field, problem in of_task(finetune):
            raise InputError(checker.line(field, problem))
        return finetune
    model, data = tree.get("model"), tree.get("data")
    if isinstance(model, dict) and isinstance(data, dict) and PLACE.holds(model.get("backbone")):
        asked = "tokenizer" in (tiny.get("data") or {}) or any(text.startswith("data.tokenizer=") for text in overrides)
        if "tokenizer" not in data or (size == "tiny" and not asked):
            data["tokenizer"] = model["backbone"]  # no other tokenizer would do
    recipe = checker.check(Recipe, tree)
    sections = {"objective": checker.check_objective(recipe.objective), "model": checker.check_model(recipe.model)}
    for name, options in (
        ("contrastive", ContrastiveTerm), ("distill", Distill), ("regularization", Regularization)
    ):
        section = getattr(recipe, name)
        sections[name] = None if section is None else checker.check_options(options, section, name)
    recipe = recipe.model_copy(update=sections)
    for field, problem in conflicts(recipe):
        raise InputError(checker.line(field, problem))
    return recipe


def find_recipe(path: str | Path) -> Path:
    """The file itself; a relative path that does not exist is looked up among the recipes that the package ships."""
    path = Path(path)
    if os.path.lexists(path) or path.is_absolute():
        return path
    inside = SHIPPED / (path.relative_to("recipes") if path.parts[:1] == ("recipes",) else path)
    return inside if os.path.exists(inside) else path


def save_recipe(recipe: Recipe | Finetune, path: Path) -> None:
    """Writes the resolved recipe, and reads it back to make sure that the file says the same.

    Raises:
        RuntimeError: it does not (a fault of the schema, not of the user).
    """
    text = dump(recipe.resolved())
    path.write_text("# the recipe of this run with every default filled in\n" + text, encoding="utf-8")
    if load_any(path) != recipe:
        raise RuntimeError(f"{path}: the saved recipe does not read back as the one that was saved")


def lay_over(tree: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """The tree with the fields of others in place of its own, section by section; the last one wins."""
    for other in others:
        merged = dict(tree)
        for key, value in other.items():
            is_section = isinstance(value, dict) and isinstance(tree.get(key), dict)
            merged[key] = lay_over(tree[key], value) if is_section else value
        tree = merged
    return tree


def apply_override(tree: dict[str, Any], text: str) -> str:
    """Writes one `section.field=value` into the tree and returns the dotted field."""
    field, separator, value = text.partition("=")
    keys = field.strip().split(".")
    if not separator or not all(keys):
        raise InputError(f"override {text!r}: expected section.field=value, such as optim.lr=1e-3")
    parsed = parse(value, f"override {text!r}")
    for key in keys[:-1]:
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise InputError(f"override {text!r}: {key} holds {describe(tree)}, which has no field inside")
    tree[keys[-1]] = parsed
    return ".".join(keys)
