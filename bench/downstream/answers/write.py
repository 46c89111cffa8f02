"""Answers and summaries in a model's own words: the encoder reads document and question once, the decoder denoises what
follows from their concepts. For models that were trained so (objective prefix_diffusion). Nothing else is trained.
"""

from collections.abc import Sequence

import torch

from ....engine.errors import InputError
from ....engine.labelled.examples import Example
from ....engine.labelled.task import Task
from ....models.generation.canvas import continue_canvas, fill
from ....models.generation.sampling import Sampling
from ....models.masked_lm import ConceptForMaskedLM
from ....models.packing import pack
from ..readers import Ablated, ConceptReader, Reader, others

ANSWERS = ("span", "summary", "written")  # kinds of task that a text answers
STEPS = 32  # rounds of denoising
LONGEST = 64  # tokens, where the task does not say how many words


def check(task: Task, reader: Reader) -> None:
    """
    Raises:
        InputError: the task wants something else, or the model has no decoder.
    """
    if task.answer not in ANSWERS:
        raise InputError(f"answer=written: {task.name} is answered by one of its own {task.answer}; leave it out")
    if not isinstance(reader, ConceptReader) or not isinstance(reader.model, ConceptForMaskedLM):
        raise InputError(
            f"{task.name}: wants text to be written, and the model has no decoder; give a masked language model "
            "(recipes/pretrain/prefix.yaml), or score what another program wrote: conceptron score"
        )


def prompts(given: Sequence[Example], reader: ConceptReader) -> list[list[int]]:
    """Token ids of document and question; of what is longer than a piece the middle is left out, as LongBench does."""
    texts = [f"{each.document}\n\n{each.question}".strip() for each in given]
    kept = []
    for ids in reader.vocabulary.encode(texts):
        half = len(ids) if reader.piece is None else reader.piece // 2
        kept.append(list(ids) if len(ids) <= 2 * half else [*ids[:half], *ids[-half:]])
    return kept


def count(given: Sequence[Example], reader: ConceptReader) -> tuple[int, int]:
    """(tokens that are read, tokens of documents and questions)"""
    whole = reader.vocabulary.encode([f"{each.document}\n\n{each.question}".strip() for each in given])
    return sum(map(len, prompts(given, reader))), sum(map(len, whole))


def predict(task: Task, given: Sequence[Example], reader: Reader) -> dict[str, str]:
    """Of an ablated reader: from nothing (zeroed), or from what another example is read from (shuffled)."""
    whole: ConceptReader = reader.reader if isinstance(reader, Ablated) else reader
    how = reader.how if isinstance(reader, Ablated) else None
    known = prompts(given, whole)
    sources = {None: known, "zeroed": [[]] * len(known)}.get(how)
    if sources is None:
        sources = [known[i] for i in others([each.id for each in given])]
    made, tokens = {}, whole.vocabulary.tokens
    for each, ids, source in zip(given, known, sources, strict=True):
        per_word = len(ids) / max(1, len(f"{each.document} {each.question}".split()))
        count = max(1, round(task.words * per_word)) if task.words else LONGEST
        canvas = continue_canvas([ids], count, tokens)
        sampling = Sampling(steps=min(STEPS, count), temperature=0.0)
        with torch.inference_mode():
            try:
                filled = fill(whole.model, canvas, tokens, sampling, pack([source]))
            except ValueError as error:
                raise InputError(f"{task.name}: {each.id!r} cannot be written: {error}") from error
        made[each.id] = whole.vocabulary.tokenizer.decode(filled.input_ids[len(ids) :].tolist()).strip()
    return made
