"""A small BERT, and the model that `conceptron build` makes of it."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from conceptron.engine.build import build
from conceptron.engine.data import tokenizer
from conceptron.engine.embedding.model import ConceptModel
from conceptron.engine.recipe.load import load_recipe

STATES = ["model.backbone_window=16", "model.init_queries=state"]


def save_bert(folder: Path, text: Path, seed: int, **sizes: int) -> Path:
    words = tokenizer.load(f"{text}/tokenizer")
    torch.manual_seed(seed)
    options = dict(hidden_size=30, intermediate_size=20, num_hidden_layers=3, num_attention_heads=3) | sizes
    model = BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(text, tmp_path_factory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"), text, seed=1)


@pytest.fixture(scope="session")
def built(recipe_in, bert, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    build(load_recipe(recipe_in(folder), [*STATES, f"model.backbone={bert}"]), folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def reader(built) -> ConceptModel:
    return ConceptModel.from_pretrained(built, "cpu")
