"""A trained model back from its Hugging Face folder, checked: nothing is unpickled, no code of the folder runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig
from transformers.utils import logging

from ..models.config import ConceptConfig
from ..models.encoder import ConceptEncoder
from ..models.folder import not_finite, of_other_shapes
from ..models.masked_lm import ConceptForMaskedLM
from ..models.objectives.view import SpecialTokens
from ..models.tasks.heads import (
    ConceptForMultipleChoice,
    ConceptForQuestionAnswering,
    ConceptForSequenceClassification,
)
from ..models.tasks.questions import ConceptForQuestions
from ..models.tasks.tokens import ConceptForTokenClassification
from .data.tokenizer import Vocabulary, describe, load
from .errors import InputError
from .model_folder import has_tokenizer, in_one_line, inspect

MODELS = {
    model.__name__: model
    for model in (
        ConceptForMaskedLM, ConceptForSequenceClassification, ConceptForMultipleChoice, ConceptForQuestionAnswering,
        ConceptForTokenClassification, ConceptForQuestions,
    )
}  # fmt: skip


def load_model(folder: Path) -> nn.Module:
    """The model that was saved in ``folder``, or the encoder of whatever else has one; float32, in evaluation mode.

    Raises:
        InputError: config.json or the weights are not there, damaged, of another model, or not finite.
    """
    kind = inspect(folder)
    if kind != ConceptConfig.model_type:
        raise InputError(f"{folder}/config.json: expected model_type {ConceptConfig.model_type!r}, got {kind!r}")
    with in_one_line(folder / "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        made = next((MODELS[name] for name in config.architectures or () if name in MODELS), ConceptEncoder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with in_one_line(folder), quiet():
        model, loaded = made.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    if loaded["missing_keys"]:
        names = sorted(loaded["missing_keys"])
        raise InputError(f"{folder}: {len(names)} weights are missing, {names[0]} among them; save the model again")
    if problem := of_other_shapes(loaded):
        raise InputError(f"{folder}: {problem}; its config.json and its weights are not of one model")
    if problem := not_finite(model.state_dict().items()):
        raise InputError(f"{folder}: {problem}; take an earlier checkpoint of its run")
    model.config.return_dict = True  # whatever the folder says: the rest of this program reads outputs by name
    return model.float().to(device).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bar and load report: what matters of them is raised."""
    level, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bar:
            logging.enable_progress_bar()


def load_vocabulary(folder: Path, config: ConceptConfig) -> Vocabulary:
    if not has_tokenizer(folder):
        raise InputError(f"{folder}: no tokenizer.json; save the tokenizer that the model was trained with beside it")
    vocabulary = describe(load(str(folder), "tokenizer"), str(folder), "tokenizer")
    check_vocabulary(vocabulary.tokens, config, folder)
    return vocabulary


def check_vocabulary(tokens: SpecialTokens, config: ConceptConfig, folder: Path) -> None:
    if tokens.vocab_size > config.vocab_size:
        raise InputError(
            f"{folder}: its embedding has {config.vocab_size} rows, the tokenizer {tokens.vocab_size} ids; "
            "they do not belong together"
        )
