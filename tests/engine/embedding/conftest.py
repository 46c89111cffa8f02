"""The model that `conceptron build` makes of a small BERT."""

from pathlib import Path

import pytest

from conceptron.engine.build import build
from conceptron.engine.embedding.model import ConceptModel
from conceptron.engine.recipe.load import load_recipe

STATES = ["model.backbone_window=16", "model.init_queries=state"]


@pytest.fixture(scope="session")
def built(recipe_in, bert, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    build(load_recipe(recipe_in(folder), [*STATES, f"model.backbone={bert}"]), folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def reader(built) -> ConceptModel:
    return ConceptModel.from_pretrained(built, "cpu")
