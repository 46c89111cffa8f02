"""A fine-tuned encoder of transformers answers its own task, question and document together.

L labels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ....engine.errors import InputError
from ....engine.jobs.peer import scores
from ....engine.labelled.examples import Example
from ....engine.labelled.task import Task
from ..readers import PeerReader, batches
from .labels import as_predictions


@torch.inference_mode()
def predict(task: Task, given: Sequence[Example], reader: PeerReader) -> dict[str, Any]:
    """What ``scoring.score`` takes.

    Raises:
        InputError: the head is not one of this task.
    """
    joint, read = reader.joint(task, given)
    model, device = reader.head, next(reader.head.parameters()).device
    inputs = [one for each in read for one in each]
    order = sorted(range(len(inputs)), key=lambda i: len(inputs[i].ids))
    rows: list[Any] = [None] * len(inputs)
    for start, stop in batches([len(inputs[i].ids) for i in order]):
        padded = joint.pad([inputs[i] for i in order[start:stop]]).to(device)
        for i, row in zip(order[start:stop], scores(model, padded).double().cpu().numpy(), strict=True):
            rows[i] = row
    expected = len(task.labels) if task.answer == "labels" else 1
    if len(rows[0]) != expected:
        raise InputError(f"--model {reader.folder}: its config.json says that it has learned {task.name}: expected a "
                         f"head of {expected} outputs, got {len(rows[0])}")  # fmt: skip
    if task.answer == "choice":
        edges = np.cumsum([len(each) for each in read])[:-1]
        of_options = np.split(np.array(rows)[:, 0], edges)
        return {each.id: each.options[int(row.argmax())] for each, row in zip(given, of_options, strict=True)}
    found = np.array(rows)
    if task.answer == "values":
        return as_predictions(task, given, reader.note.label_offset + reader.note.label_scale * found[:, 0])
    found = np.exp(found - found.max(1, keepdims=True))
    return as_predictions(task, given, found / found.sum(1, keepdims=True))


def count(task: Task, given: Sequence[Example], reader: PeerReader) -> tuple[int, int]:
    """(tokens of the documents that are read, of each by the question that leaves least room for it; all of them)"""
    seen: dict[str, int] = {}
    whole: dict[str, int] = {}
    for each, inputs in zip(given, reader.joint(task, given)[1], strict=True):
        least = min(one.seen for one in inputs)
        seen[each.document] = min(least, seen.get(each.document, least))
        whole[each.document] = inputs[0].given
    return sum(seen.values()), sum(whole.values())
