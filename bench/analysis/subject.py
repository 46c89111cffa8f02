"""What a report is about: a finished run with its held-out text, or a bare checkpoint with text to read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ...engine.data import sources, tokenizer
from ...engine.data.corpus import open_corpus
from ...engine.data.loader import Loader
from ...engine.data.phrases import open_phrases
from ...engine.data.windows import Part, Windows, cut
from ...engine.errors import InputError
from ...engine.recipe.data import DataRecipe
from ...engine.recipe.load import load_recipe
from ...engine.recipe.schema import Recipe
from ...engine.saved_model import check_vocabulary, load_model, load_vocabulary
from ...models.config import ConceptConfig
from ...models.masked_lm import ConceptForMaskedLM
from ...models.objectives import Diffusion, MaskedLM, SpecialTokens

CHECKPOINT_TOKENS = 65536  # held-out tokens read of a bare checkpoint
CHECKPOINT_WINDOW = 512


@dataclass(frozen=True)
class Subject:
    """A model and the held-out text that the report reads."""

    name: str
    folder: Path  # the run or the checkpoint; the report goes below it
    checkpoint: Path
    model: nn.Module  # ConceptForMaskedLM, or ConceptEncoder
    tokenizer: Any
    loader: Loader  # of the held-out windows
    train: Windows | None  # the run's training text
    text: str  # where the held-out text comes from
    num_tokens: int  # of it that are read for the losses
    recipe: Recipe | None

    @property
    def can_predict(self) -> bool:
        return isinstance(self.model, ConceptForMaskedLM)

    @property
    def encoder(self) -> nn.Module:
        return self.model.base_model

    @property
    def seed(self) -> int | None:
        return self.recipe.run.seed if self.recipe else None


def open_subject(path: Path, text: Sequence[str] = ()) -> Subject:
    """
    Raises:
        InputError: ``path`` is neither a finished run nor a checkpoint of ours, or its text cannot be used.
    """
    if not path.is_dir():
        found = "expected a folder, got a file" if path.exists() else "no such folder"
        raise InputError(f"{path}: {found}; give a run folder such as runs/demo, or a checkpoint")
    if (path / "recipe.yaml").is_file():
        return open_run(path, text)
    if (path / "config.json").is_file():
        return open_checkpoint(path, text)
    raise InputError(f"{path}: neither a run folder (recipe.yaml) nor a Hugging Face checkpoint (config.json)")


def open_run(path: Path, text: Sequence[str]) -> Subject:
    recipe = load_recipe(path / "recipe.yaml")
    if recipe.needs_phrases:
        recipe = recipe.with_phrases(open_phrases(recipe.data))
    checkpoint = path / "model"
    if not (checkpoint / "config.json").is_file():
        raise InputError(f"{path}: the run has not finished, {checkpoint} is missing; go on with resume=auto")
    model = load_model(checkpoint)
    if text:
        vocabulary = load_vocabulary(checkpoint, model.config)
        windows, tokens, train = read_windows(text, vocabulary, recipe.data.window), vocabulary.tokens, None
        words, where = vocabulary.tokenizer, ", ".join(text)
    else:
        corpus = open_corpus(recipe.data)
        check_vocabulary(corpus.tokens, model.config, checkpoint)
        windows, tokens, train = corpus.validation, corpus.tokens, corpus.train
        words, where = corpus.tokenizer, f"validation split of {', '.join(s.path for s in recipe.data.sources())}"
    # without a task of its own, the untrained decoder is asked all the same: its figures then say what they are worth
    objective = recipe.build_objective() if recipe.has_task else default_objective(model.config)
    return Subject(
        name=recipe.run.name, folder=path, checkpoint=checkpoint, model=model, tokenizer=words,
        loader=reader(windows, objective, tokens), train=train, text=where,
        num_tokens=recipe.eval.tokens, recipe=recipe,
    )  # fmt: skip


def open_checkpoint(path: Path, text: Sequence[str]) -> Subject:
    model = load_model(path)
    vocabulary = load_vocabulary(path, model.config)
    if text:
        windows, where = read_windows(text, vocabulary, CHECKPOINT_WINDOW), ", ".join(text)
    else:
        corpus = open_corpus(DataRecipe(tokenizer=str(path), window=CHECKPOINT_WINDOW))
        windows, where = corpus.validation, "validation split of pydocs"
    return Subject(
        name=path.resolve().name, folder=path, checkpoint=path, model=model, tokenizer=vocabulary.tokenizer,
        loader=reader(windows, default_objective(model.config), vocabulary.tokens), train=None, text=where,
        num_tokens=CHECKPOINT_TOKENS, recipe=None,
    )  # fmt: skip


def default_objective(config: ConceptConfig) -> MaskedLM | Diffusion:
    """For a checkpoint, which does not say what it was trained on: asks for tokens that the encoder does not see."""
    if config.timestep_conditioning:
        return Diffusion(weighting="none", hidden=config.hidden_tokens)
    return MaskedLM(hidden=config.hidden_tokens)


def read_windows(paths: Sequence[str], vocabulary: tokenizer.Vocabulary, window: int) -> Windows:
    """The documents of files, folders or globs, cut into windows."""
    files = [file for path in paths for file in sources.find(path)]
    encoded = vocabulary.encode(list(sources.read_files(files, "text")))
    offsets = np.cumsum([0] + [len(ids) for ids in encoded])
    starts, lengths = cut(offsets, np.arange(len(encoded)), window)
    if len(lengths) < 2:
        raise InputError(f"{', '.join(paths)}: one window of {offsets[-1]} tokens is too little; give more text")
    return Windows([Part(np.concatenate([np.array(ids, dtype=np.int64) for ids in encoded]), starts, lengths)])


def reader(windows: Windows, objective: Any, tokens: SpecialTokens) -> Loader:
    """A loader that serves for evaluation only."""
    budget = max(16384, int(windows.lengths.max()))
    return Loader(windows, objective, tokens, seed=0, tokens_per_step=budget, micro_tokens=budget)
