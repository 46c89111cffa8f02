"""A world of one, a tiny model under ZeRO, and steps over made-up text."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from conceptron.engine import zero
from conceptron.engine.checkpoints import checkpoint
from conceptron.engine.data import tokenizer
from conceptron.engine.launching import launch
from conceptron.engine.launching.launch import World
from conceptron.engine.optimizing.optimizer import build_optimizer
from conceptron.engine.recipe.schema import Recipe
from conceptron.models.config import ConceptConfig
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.objectives import OBJECTIVES, SampleKey, SpecialTokens, View
from conceptron.models.packing import pack

TOKENS = SpecialTokens(mask_id=1, special_ids=frozenset({0, 1}), vocab_size=97)
# no size is a multiple of 2, so that every fragment is cut somewhere awkward when two ranks share it
SHAPE = dict(
    vocab_size=97, hidden_size=30, num_concepts=5, num_hidden_layers=1, num_attention_heads=3, intermediate_size=33,
    num_decoder_layers=1, mask_token_id=1,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="session")
def on_the_cpu() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"  # also where there is a GPU: test_gpu.py goes there, in processes of its own
    torch.set_num_threads(1)  # sums are then taken in one order, here and in the processes that tests start


@pytest.fixture
def tokens() -> SpecialTokens:
    return TOKENS


@pytest.fixture
def world() -> Iterator[World]:
    with launch.world() as world:
        yield world


@pytest.fixture
def build(world) -> Callable[..., Any]:
    """A DeepSpeed engine around a small diffusion model, at the start of training or as a checkpoint holds it."""

    def build(
        stage: int = 1, precision: str = "fp32", found: Any = None, offload: str | None = None, **optim: Any
    ) -> Any:  # fmt: skip
        torch.manual_seed(0)
        model = ConceptForMaskedLM(ConceptConfig(**SHAPE, dropout=0.1))
        if found:
            checkpoint.load_weights(found, model)
        of_zero = {"stage": stage, "offload": offload}
        sections = {"data": {}, "objective": {"name": "diffusion"}, "optim": optim, "zero": of_zero}
        recipe = Recipe.model_validate({**sections, "train": {"steps": 9, "precision": precision}})
        engine = zero.initialize(model.train(), build_optimizer(model, recipe.optim), recipe)
        if found:
            checkpoint.load_moments(found, engine, checkpoint.load_progress(found).optimizer_steps)
        return engine

    return build


def views(step: int) -> list[View]:
    """Three micro-batches of one step, the second of them empty."""
    generator = np.random.default_rng(step)
    batches = [pack([generator.integers(2, 97, size=n) for n in lengths]) for lengths in ((7, 0, 40), (), (1, 23))]
    keys = [[SampleKey(0, step, 10 * i + j) for j in range(b.num_sequences)] for i, b in enumerate(batches)]
    objective = OBJECTIVES["diffusion"]()
    return [objective.view(batch, of, TOKENS) for batch, of in zip(batches, keys, strict=True)]


@pytest.fixture
def steps() -> Callable[..., list[tuple[float, float]]]:
    """Trains over the steps `start` to `stop` and returns each one's loss and gradient norm."""

    def steps(engine: Any, start: int, stop: int) -> list[tuple[float, float]]:
        history = []
        for step in range(start, stop):
            parts = views(step)
            divisor, loss = sum(view.divisor for view in parts), 0.0
            for i, view in enumerate(parts):
                torch.manual_seed(100 * step + i)
                engine.set_gradient_accumulation_boundary(i == len(parts) - 1)
                output = engine(view=replace(view, divisor=divisor))
                engine.backward(output.loss)
                loss += float(output.loss.detach())
            engine.step()
            history.append((loss, float(engine.get_global_grad_norm())))
        return history

    return steps


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A folder with a few dozen short documents, and one with a tokenizer for them."""
    folder = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    words = ["concept", "token", "reads", "writes", "the", "a", "of", "encoder", "decoder", "slowly", "again", "text"]
    for i in range(40):
        lines = [" ".join(generator.choice(words, size=n)) for n in generator.integers(3, 30, size=1 + i % 4)]
        (folder / f"{i:02d}.txt").write_text("\n".join(lines))
    tokenizer.save(tokenizer.train((path.read_text() for path in folder.glob("*.txt")), 300), folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def recipe_in(text) -> Callable[[Path], Path]:
    """Writes a recipe that trains a tiny model on `text` within seconds; its run is FOLDER/runs/tiny."""

    def write(folder: Path) -> Path:
        path = folder / "tiny.yaml"
        path.write_text(
            f"""
run: {{folder: {folder}/runs}}
model: {{hidden_size: 30, num_concepts: 5, num_hidden_layers: 1, num_attention_heads: 3, intermediate_size: 33,
        num_decoder_layers: 1, dropout: 0.1}}
data: {{source: {text}, tokenizer: {text}/tokenizer, window: 48, validation: 0.2, cache: {text}/cache}}
objective: {{name: diffusion}}
optim: {{lr: 3e-3, warmup_steps: 3}}
batch: {{tokens: 256, micro_tokens: 64}}
train: {{steps: 12, precision: fp32, label_smoothing: 0.05}}
eval: {{every: 5, tokens: 400}}
checkpoint: {{every: 4, keep_last: 2}}
"""
        )
        return path

    return write


@pytest.fixture
def recipe(recipe_in, tmp_path) -> Path:
    return recipe_in(tmp_path)


@pytest.fixture(scope="session")
def save_random() -> Callable[..., Path]:
    """Saves a model of transformers with large random matrices, and its tokenizer."""

    def save(folder: Path, model: torch.nn.Module, words: Any) -> Path:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.2)
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def bert(text, save_random, tmp_path_factory) -> Path:
    """A BERT of three layers with the tokenizer of the tests."""
    words = tokenizer.load(f"{text}/tokenizer")
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(words), hidden_size=30, intermediate_size=20, num_hidden_layers=3, num_attention_heads=3,
        max_position_embeddings=32,
    )  # fmt: skip
    return save_random(tmp_path_factory.mktemp("bert"), BertModel(config), words)


@pytest.fixture(scope="session")
def save_teacher(text) -> Callable[..., Path]:
    """Makes a sentence encoder that has not learned anything."""

    def save(folder: Path, width: int, pooling: str = "mean_tokens", **files: object) -> Path:
        """A random BERT of this width with the tokenizer of the tests and the files of sentence-transformers."""
        torch.manual_seed(width)
        words = AutoTokenizer.from_pretrained(text / "tokenizer")
        config = BertConfig(
            vocab_size=len(words), hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=32,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder)
        words.save_pretrained(folder)
        kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
        modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds]
        (folder / "modules.json").write_text(json.dumps(files.get("modules", modules)))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
        return folder

    return save
