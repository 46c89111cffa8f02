"""A fine-tuned model answers its own task, by the head that the training engine gave it.

Q questions, L labels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ....engine.jobs.finetuning import Group, grouped
from ....engine.labelled.examples import Example
from ....engine.labelled.task import Task
from ....models.packing import pack
from ....models.tasks.questions import ConceptForQuestions
from ..readers import BATCH_TOKENS, Ablated, ConceptReader, PeerReader, Reader
from . import joint
from .labels import as_predictions

ABLATE = {"zeroed": "zero", "shuffled": "shuffle"}


def has_head(reader: Reader, task: Task) -> bool:
    if isinstance(reader, PeerReader):
        return reader.note is not None and reader.note.name == task.name
    return isinstance(reader, ConceptReader) and getattr(reader.config, "task", None) == task.name


def predict(task: Task, given: Sequence[Example], reader: Reader) -> dict[str, Any]:
    """What ``scoring.score`` takes. Documents that are read at once are a batch, in which an ablation shuffles them."""
    if isinstance(reader, PeerReader):
        return joint.predict(task, given, reader)
    how = ABLATE[reader.how] if isinstance(reader, Ablated) else None
    whole: ConceptReader = reader.reader if isinstance(reader, Ablated) else reader
    groups = grouped(given, whole.vocabulary.encode, max_tokens=2**30, is_pair=task.form == "pair")
    by_id: dict[str, np.ndarray] = {}
    for batch in batches(groups, at_least=2 if how == "shuffle" else 1):
        for name, row in zip((name for group in batch for name in group.names), answers(whole, batch, task, how),
                             strict=True):  # fmt: skip
            by_id[name] = row
    found = np.stack([by_id[each.id] for each in given])
    if task.answer == "choice":
        return {each.id: each.options[int(row.argmax())] for each, row in zip(given, found, strict=True)}
    return as_predictions(task, given, found[:, 0] if task.answer == "values" else found)


def count(task: Task, given: Sequence[Example], reader: Reader) -> tuple[int, int]:
    """(tokens of the documents that are read, of all of them)"""
    if isinstance(reader, PeerReader) and has_head(reader, task):
        return joint.count(task, given, reader)
    return reader.count(list(dict.fromkeys(each.document for each in given)))


def batches(groups: Sequence[Group], at_least: int) -> list[list[Group]]:
    """Of about BATCH_TOKENS; the last of too few documents joins the one before."""
    made: list[list[Group]] = []
    total = 0
    for group in sorted(groups, key=lambda group: group.num_tokens):
        if not made or (total + group.num_tokens > BATCH_TOKENS and len(made[-1]) >= at_least):
            made.append([])
            total = 0
        made[-1].append(group)
        total += group.num_tokens
    if len(made) > 1 and len(made[-1]) < at_least:
        made[-2] += made.pop()
    return made


@torch.inference_mode()
def answers(reader: ConceptReader, groups: Sequence[Group], task: Task, how: str | None) -> np.ndarray:
    """[examples, L]: values, or the softmax of a head's scores; of options their scores."""
    model = reader.model
    device = next(model.parameters()).device
    texts = pack([group.document for group in groups]).to(device)
    questions = pack([question for group in groups for question in group.questions]).to(device)
    if isinstance(model, ConceptForQuestions):
        owners = torch.tensor([i for i, group in enumerate(groups) for _ in group.questions], device=device)
        per_example = sum(len(group.questions) for group in groups) // sum(len(group.names) for group in groups)
        num_options = per_example if task.answer == "choice" else None
        logits = model(texts, questions, owners, num_options=num_options, ablate=how).logits
    else:
        logits = model(packed=questions, packed_b=texts, ablate=how).logits
    logits = logits.float() if task.answer == "values" else logits.float().softmax(-1)
    return logits.cpu().numpy()
