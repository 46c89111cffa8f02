"""Text in, text out: a saved model fills, continues or rewrites a text."""

from dataclasses import replace
from pathlib import Path

from ..models.generation import Sampling, fill
from ..models.heads import ConceptForMaskedLM
from ..models.objectives.view import SpecialTokens
from ..models.packing import Packed, pack
from .data.tokenizer import Vocabulary
from .errors import InputError
from .saved_model import load_model, load_vocabulary

MODES = ("fill", "prefix", "concepts")


def generate(
    checkpoint: str | Path, text: str, *, mode: str, length: int, sampling: Sampling, num_samples: int = 1
) -> list[str]:
    """``num_samples`` texts from one.

    Args:
        checkpoint: a Hugging Face folder of a masked language model with its tokenizer.
        text: what the model reads.
        mode: "fill" replaces each mask token written in the text; "prefix" continues it by ``length`` tokens;
            "concepts" writes as many tokens as the text has from its concepts alone (for a model trained on the clean
            view).
        sampling: steps, schedule, order, temperature; sample i has seed ``sampling.seed + i``.

    Raises:
        InputError: the folder holds no such model, the text is empty, or there is nothing to fill.
    """
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json; give a Hugging Face folder such as runs/demo/model")
    model = load_model(folder)
    if not isinstance(model, ConceptForMaskedLM):
        raise InputError(f"{folder}: a {type(model).__name__} cannot generate; give a masked language model")
    vocabulary = load_vocabulary(folder, model.config)
    ids = read(text, vocabulary)
    canvas, source = canvas_of(ids, mode, length, vocabulary.tokens)
    drawn = [
        fill(model, canvas, vocabulary.tokens, replace(sampling, seed=sampling.seed + i), source)
        for i in range(num_samples)
    ]
    return [vocabulary.tokenizer.decode(packed.input_ids.tolist()) for packed in drawn]


def read(text: str, vocabulary: Vocabulary) -> list[int]:
    """The text's ids; a mask token written in it becomes the mask id, anything else stays what it says.

    One space before a mask token belongs to the hidden word, as it does in byte-level vocabularies.
    """
    *before, last = text.split(vocabulary.tokenizer.mask_token)
    pieces = [*(piece.removesuffix(" ") for piece in before), last]
    encoded = vocabulary.encode(pieces)
    ids = list(encoded[0])
    for piece in encoded[1:]:
        ids += [vocabulary.tokens.mask_id, *piece]
    if not ids:
        raise InputError("--text: expected some text to read, got none")
    return ids


def canvas_of(ids: list[int], mode: str, length: int, tokens: SpecialTokens) -> tuple[Packed, Packed | None]:
    """(what is filled, what conditions it) of one mode; ``None``: the canvas itself."""
    if mode == "prefix":
        if length < 1:
            raise InputError(f"--length: expected at least 1 token, got {length}")
        return pack([[*ids, *[tokens.mask_id] * length]]), None
    if mode == "concepts":
        return pack([[tokens.mask_id] * len(ids)]), pack([ids])
    if tokens.mask_id not in ids:
        raise InputError("--text: nothing to fill; write the mask token where a token is wanted, or use --mode prefix")
    return pack([ids]), None
