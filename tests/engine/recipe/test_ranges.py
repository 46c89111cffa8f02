"""Every field of every section, with every kind of value that is none: one line, or a value that the field may have."""

import copy
import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from conceptron.engine.errors import InputError
from conceptron.engine.recipe.checker import element, model_section
from conceptron.engine.recipe.load import load_recipe
from conceptron.engine.recipe.schema import Recipe
from conceptron.models.decisions import ALLOWED, FIELDS
from conceptron.models.objectives import OBJECTIVES, Distill
from conceptron.models.pretraining import ContrastiveTerm
from conceptron.models.ranges import ranges
from conceptron.models.regularizers import Regularization

SECTIONS = {"contrastive": ContrastiveTerm, "distill": Distill, "regularization": Regularization}
BASE = {"data": {"source": "pydocs"}, "objective": {"name": "mlm"}, "train": {"steps": 10}}
VALUES = (
    ".nan", ".inf", "-.inf", "1e-320", "18446744073709551616", "-1", "true", "[]", "{}", '""', '"\\ud800"',
    "'1e-3'", "2026-11-29", "~no.such.user/here",
)  # fmt: skip


def schema_fields(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and field, of every field inside; items of a list under the number 0."""
    for key, field in schema.model_fields.items():
        name = field.alias or key
        inner = element(field.annotation)
        yield f"{prefix}{name}", field
        if inner is not None:
            is_list = "list[" in str(field.annotation)
            yield from schema_fields(inner, f"{prefix}{name}.{'0.' if is_list else ''}")


def every_field() -> dict[str, str]:
    """Dotted field -> the objective it needs."""
    found = {name: "mlm" for name, _ in schema_fields(Recipe)}
    found |= {f"model.{name}": "mlm" for name in model_section().model_fields}
    for section, options in SECTIONS.items():
        found |= {f"{section}.{each.name}": "mlm" for each in fields(options)}
    for objective, options in OBJECTIVES.items():
        found |= {f"objective.{each.name}@{objective}": objective for each in fields(options)}
    return found | {"objective.parts.0.weight": "mixed", "objective.parts": "mixed", "objective.name": "mlm"}


def attempt(path, field: str, objective: str, value: str) -> str:
    """The error, or "" if the recipe was taken."""
    tree: dict = copy.deepcopy(BASE)
    tree["objective"] = {"name": objective}
    if objective == "mixed":
        tree["objective"]["parts"] = [{"name": "mlm"}, {"name": "mlm"}]
    if field.startswith("distill."):
        tree["distill"] = {"teacher": "folder"}
    if field.startswith("init."):
        tree["init"] = {"source": "folder"}
    if field.startswith("data.source.0"):
        tree["data"]["source"] = [{"path": "pydocs"}]
    if field.startswith("train.stages.0"):
        tree["train"]["stages"] = [{"until": 5, "window": 16}]
    *sections, name = field.partition("@")[0].split(".")
    place: Any = tree
    for section in sections:
        place = place[int(section)] if isinstance(place, list) else place.setdefault(section, {})
    place[int(name) if isinstance(place, list) else name] = "PLACE"
    path.write_text(json.dumps(tree).replace('"PLACE"', value))  # JSON is YAML
    try:
        load_recipe(path)
    except InputError as error:
        return str(error)
    return ""

# what a field may hold, of what looks wrong elsewhere
FINE = {
    "1e-320": """optim.weight_decay optim.min_lr_ratio optim.decay optim.muon.momentum ema.decay
        train.label_smoothing model.dropout model.anchor_bias
        model.condition_dropout model.label_offset contrastive.start distill.whole distill.similarity distill.stretch
        distill.contrast
        objective.random@mlm objective.unchanged@mlm objective.kept_weight@tsdae""",  # acts as 0, which is allowed
    "18446744073709551616": """data.source.0.weight optim.lr optim.muon.lr optim.eps optim.weight_decay optim.clip
        model.initializer_range model.norm_eps model.rope_theta model.anchor_bias model.anchor_sharpness model.row_scale
        model.label_offset model.label_scale contrastive.temperature contrastive.weight contrastive.temperature_floor
        distill.weight distill.whole distill.similarity distill.stretch distill.contrast distill.temperature
        distill.max_gib regularization.weight regularization.gradient_ratio objective.parts.0.weight
        objective.words@read_back""",  # any number below 1e30
    "-1": "model.label_offset",
    "true": """train.checkpoint_backbone train.recompute train.compile ema.use
        model.normalize_tokens model.tie_layers model.nested_concepts
        model.asked_reading
        model.tie_word_embeddings contrastive.across_ranks contrastive.learnable_temperature regularization.dynamic
        checkpoint.async batch.by_length data.dedup""",
    "[]": "train.stages",
    "{}": """run model data contrastive regularization optim optim.muon batch zero ema eval checkpoint logging
        profile""",
    '""': "run.name",  # the file's
}
TEXTS = """run.name run.folder data.source data.source.0.path data.source.0.text_column data.source.0.split
    data.source.0.validation data.source.0.revision data.text_column data.split data.validation data.revision
    data.tokenizer data.cache init.source model.backbone distill.teacher"""
FINE |= dict.fromkeys(("'1e-3'", "2026-11-29"), f"{TEXTS} logging.wandb")
FINE["~no.such.user/here"] = """data.source.0.text_column data.source.0.split data.source.0.revision data.text_column
    data.split data.revision"""  # no paths


@pytest.mark.parametrize("value", VALUES)
def test_a_value_is_refused_in_one_line_or_belongs_there(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    taken = []
    for field, objective in every_field().items():
        problem = attempt(tmp_path / "recipe.yaml", field, objective, value)
        if not problem:
            taken.append(field)
            continue
        assert problem.startswith(f"{tmp_path}/recipe.yaml: {field.partition('@')[0]}"), problem
        says = "expected" in problem and ", got " in problem
        others = ("is missing", "no timesteps", "no row would", " without a ")
        assert says or any(words in problem for words in others), problem
        assert len(problem.splitlines()) == 1 and problem.isprintable(), problem
    assert sorted(taken) == sorted(FINE.get(value, "").split())
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_every_field_has_its_range():
    assert set(ALLOWED) == set(FIELDS)
    for options in (*OBJECTIVES.values(), *SECTIONS.values()):
        assert set(ranges(options)) == {each.name for each in fields(options)}, options
    plain = {int, float, str, bool}
    for name, field in schema_fields(Recipe):
        inside = get_args(field.annotation) if type(None) in get_args(field.annotation) else ()
        assert not plain & {field.annotation, *inside} or field.metadata, name
