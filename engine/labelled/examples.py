"""What a model is asked: the rows of every form of task as examples of one kind."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from . import synthetic
from .rows import Row, read_split
from .task import Task

OPTION = re.compile(r"\s*\(([A-Z])\) ")
HIDDEN = -1  # a label that the hub keeps to itself
HELD_OUT = 0.15  # of the documents of the training split, at least 1


@dataclass(frozen=True)
class Example:
    """One question about one document; of a pair of texts the question is the first, or there is none."""

    id: str
    question: str
    document: str
    reference: Any  # as ``scoring.score`` takes it
    options: tuple[str, ...] = ()
    truth: float | int | None = None  # the label's number, the value, or the number of the right option
    spans: tuple[tuple[int, int], ...] = ()  # characters of a synthetic document that answer
    about: dict[str, Any] = field(default_factory=dict)  # what results are broken down by


def examples(task: Task, split: str, data: Path | None, limit: int | None = None, seed: int = 0) -> list[Example]:
    """Of a split, the first ``limit`` of them (of a task with several questions a document: of its documents).

    Raises:
        InputError: see ``rows.read_split``; or a column or a label is not as the task says.
    """
    if task.form == "synthetic":
        return [Example(**each) for each in synthetic.make(task.generator, task.lengths, split, limit, seed)]
    rows = read_split(task, split, data)
    made = {"pair": pairs, "passage": pairs, "scrolls": scrolls, "longbench": longbench}[task.form](task, split, rows)
    if limit is None:
        return made
    kept = list(dict.fromkeys(each.document for each in made))[:limit] if task.form != "pair" else None
    return made[:limit] if kept is None else [each for each in made if each.document in set(kept)]


def several(task: Task, splits: Sequence[str], data: Path | None, limit: int | None = None) -> list[Example]:
    """Of several splits, whose names then stand before the ids.

    Raises:
        InputError: an id occurs twice.
    """
    made = [each if len(splits) == 1 else replace(each, id=f"{split}/{each.id}")
            for split in splits for each in examples(task, split, data, limit)]  # fmt: skip
    if len({each.id for each in made}) < len(made):
        raise InputError(f"{task.name}: an id occurs twice in split {', '.join(splits)}")
    return made


def pairs(task: Task, split: str, rows: Sequence[Row]) -> list[Example]:
    names = {name: task.columns.get(name, name) for name in ("first", "second", "label")}
    identity, made = task.columns.get("id"), []
    for number, row in enumerate(rows):
        for column in names.values():
            if column not in row:
                raise InputError(f"{task.name}: no column {column!r} in split {split!r}, only {', '.join(row)}")
        truth = row[names["label"]]
        name = str(row[identity]) if identity in row else str(number)
        if task.answer == "labels":
            truth = label_number(task, truth, split, name)
        elif not isinstance(truth, int | float | str) or truth in (HIDDEN, None):
            raise hidden(task, split)
        else:
            truth = float(truth)
        made.append(Example(name, row[names["first"]], row[names["second"]], truth, truth=truth))
    return made


def label_number(task: Task, label: Any, split: str, name: str) -> int:
    if label == HIDDEN or label is None:
        raise hidden(task, split)
    if isinstance(label, str):
        if label not in task.labels:
            where, expected = f"of {name!r} in split {split!r}", ", ".join(task.labels)
            raise InputError(f"{task.name}: unknown label {label!r} {where}; expected {expected}")
        return task.labels.index(label)
    if not 0 <= int(label) < len(task.labels):
        raise InputError(
            f"{task.name}: unknown label {label!r} of {name!r} in split {split!r}; expected 0 to {len(task.labels) - 1}"
        )
    return int(label)


def hidden(task: Task, split: str) -> InputError:
    return InputError(f"{task.name}: the labels of split {split!r} are hidden; use --split validation, or data=DIR")


def merged(rows: Sequence[Row]) -> list[Row]:
    """Rows of one id as one, in the order in which ids come first, their outputs as a list; duplicates are kept."""
    found: dict[str, Row] = {}
    for row in rows:
        if row["id"] not in found:
            found[row["id"]] = {key: value for key, value in row.items() if key != "output"} | {"outputs": []}
        found[row["id"]]["outputs"].append(row["output"])
    return list(found.values())


def scrolls(task: Task, split: str, rows: Sequence[Row]) -> list[Example]:
    """Columns id, input and output, as SCROLLS has them: the question, a blank line, the document."""
    for column in ("id", "input", "output"):
        if column not in rows[0]:
            raise InputError(f"{task.name}: no column {column!r} in split {split!r}, only {', '.join(rows[0])}")
    made, whole = [], task.short in ("gov_report", "summ_screen_fd")  # the input is the document, nothing is asked
    for row in merged(rows):
        name, given, outputs = row["id"], row["input"], row["outputs"]
        if None in outputs:
            raise hidden(task, split)
        question, _, document = ("", "", given) if whole else given.partition("\n\n")
        options: tuple[str, ...] = ()
        truth: Any = None
        if task.answer == "choice":
            listed, _, document = document.partition("\n\n")
            options = tuple(part.strip() for part in OPTION.split(listed)[2::2])
            truth = options.index(outputs[0].strip()) if outputs[0].strip() in options else None
            if len(options) < 2 or truth is None:
                raise InputError(f"{task.name}: {name!r} in split {split!r}: its answer is none of its options")
        elif task.answer == "labels":
            truth = label_number(task, outputs[0], split, name)
        if task.columns.get("query") == "output":
            question = outputs[0]
        made.append(Example(name, question, document, outputs, options, truth))
    return made


def longbench(task: Task, split: str, rows: Sequence[Row]) -> list[Example]:
    made = []
    for row in rows:
        for column in ("_id", "input", "context", "answers"):
            if column not in row:
                raise InputError(f"{task.name}: no column {column!r} in split {split!r}, only {', '.join(row)}")
        reference = {name: row[name] for name in ("answers", "all_classes", "length") if row.get(name) is not None}
        classes = row.get("all_classes") or ()
        truth = classes.index(row["answers"][0]) if task.answer == "labels" and row["answers"][0] in classes else None
        made.append(Example(row["_id"], row["input"], row["context"], reference, tuple(classes), truth))
    return made


def hold_out(train: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """(to learn from, to choose by): whole documents of the training split where several questions share one."""
    shared = len({each.document for each in train}) < len(train) * 0.9
    keys = [each.document if shared else each.id for each in train]
    order = list(dict.fromkeys(keys))
    count = max(1, round(HELD_OUT * len(order)))
    if len(order) < 2:
        raise InputError("the training split: expected at least two documents, one of them to choose by, got one")
    held = {order[i] for i in np.random.default_rng(seed).permutation(len(order))[:count]}
    return ([each for each, key in zip(train, keys, strict=True) if key not in held],
            [each for each, key in zip(train, keys, strict=True) if key in held])  # fmt: skip
