"""Text in, text out: a saved model continues, fills or rewrites a text."""

import argparse
from dataclasses import fields, replace
from pathlib import Path

from ..models.generation.canvas import blank_canvas, fill, given_text
from ..models.generation.sampling import Sampling
from ..models.masked_lm import ConceptForMaskedLM
from ..models.objectives.view import SpecialTokens
from ..models.packing import Packed, pack
from .data.sources import read_text
from .data.tokenizer import Vocabulary
from .errors import InputError
from .model_folder import find
from .saved_model import load_model, load_vocabulary

MODES = ("prefix", "fill", "infill", "concepts")
LENGTH = 32  # tokens, of a continuation or a gap


def generate(
    checkpoint: str | Path, text: str, *, mode: str, sampling: Sampling, length: int | None = None,
    read_once: bool = False, num_samples: int = 1,
) -> list[str]:  # fmt: skip
    """``num_samples`` texts from one.

    Args:
        checkpoint: a Hugging Face folder of a masked language model with its tokenizer, or its hub id.
        text: what the model reads.
        mode: "prefix" continues the text by ``length`` tokens; "fill" replaces each mask token written in it by one
            token, "infill" by ``length`` tokens; "concepts" writes ``length`` tokens from the concepts of the text
            alone.
        sampling: steps, schedule, order, temperature; sample i has seed ``sampling.seed + i``.
        length: None means 32; for "concepts" as many as the text has.
        read_once: the encoder reads the given text only, once, and not what has been generated: for models trained
            with prefix_diffusion.

    Raises:
        InputError: the folder holds no such model, the text is empty or no text, there is nothing to fill, or the model
            cannot sample in this way or gives no finite logits.
    """
    folder = find(str(checkpoint), "CHECKPOINT")
    model = load_model(folder)
    if not isinstance(model, ConceptForMaskedLM):
        raise InputError(f"{folder}: a {type(model).__name__} cannot generate; give a masked language model")
    vocabulary = load_vocabulary(folder, model.config)
    ids = read(text, vocabulary)
    canvas, source = canvas_of(ids, mode, length, vocabulary.tokens, read_once)
    try:
        drawn = [
            fill(model, canvas, vocabulary.tokens, replace(sampling, seed=sampling.seed + i), source)
            for i in range(num_samples)
        ]
    except ValueError as error:
        option = str(error).partition(":")[0]  # of `Sampling`, or something about the model
        is_option = option in {field.name for field in fields(Sampling)}
        dashed = f"--{error}".replace("_", "-", option.count("_"))
        raise InputError(dashed if is_option else f"{folder}: {error}") from error
    return [vocabulary.tokenizer.decode(packed.input_ids.tolist()) for packed in drawn]


def read(text: str, vocabulary: Vocabulary) -> list[int]:
    """The text's ids; a mask token written in it becomes the mask id, anything else stays what it says.

    White space before a mask token belongs to the hidden word, as it does in byte-level vocabularies. The exported
    tokenizer gives the same ids (`for_use`), and training masks such a text in the same places.

    Raises:
        InputError: there is nothing to read, or what is there is no text.
    """
    for place, character in enumerate(text):
        if character == "\0" or "\ud800" <= character <= "\udfff":
            what = "NUL" if character == "\0" else "bytes that are not UTF-8"
            raise InputError(f"--text: expected text, got {what} at character {place + 1}; convert it to UTF-8")
    ids = vocabulary.encode_with_masks(text)
    if not ids:
        raise InputError("--text: expected some text to read, got none")
    return ids


def canvas_of(
    ids: list[int], mode: str, length: int | None, tokens: SpecialTokens, read_once: bool = False
) -> tuple[Packed, Packed | None]:
    """(what is filled, what conditions it) of one mode; ``None``: the canvas itself."""
    if length is not None and (length < 1 or mode == "fill"):
        expected = "nothing with --mode fill: one token for each mask token" if mode == "fill" else "at least 1 token"
        raise InputError(f"--length: expected {expected}, got {length}")
    if mode == "concepts":
        return blank_canvas([length or len(ids)], tokens), pack([ids])
    if mode == "prefix":
        ids = [*ids, *[tokens.mask_id] * (length or LENGTH)]
    elif tokens.mask_id not in ids:
        raise InputError("--text: nothing to fill; write the mask token where text is wanted, or use --mode prefix")
    if mode == "infill":
        ids = [i for token in ids for i in [token] * ((length or LENGTH) if token == tokens.mask_id else 1)]
    canvas = pack([ids])
    return canvas, given_text(canvas, tokens) if read_once else None


def main(options: argparse.Namespace) -> None:
    """The command line."""
    sampling = Sampling(**{field.name: getattr(options, field.name) for field in fields(Sampling)})
    text = options.text if options.file is None else read_text(options.file)
    samples = generate(
        options.checkpoint, text, mode=options.mode, sampling=sampling, length=options.length,
        read_once=options.read_once, num_samples=options.samples,
    )  # fmt: skip
    print("\n---\n".join(samples))
