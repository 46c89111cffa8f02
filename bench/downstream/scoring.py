"""Predictions of a task against its references, by its official metric."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ...engine.errors import InputError
from ...engine.labelled.task import Task
from .metrics import labels, longbench, ranking, scrolls

NO_OBJECT = 'The predictions must be saved a JSON object: {"id1": "prediction1", "id2": "prediction2", ...}'
NO_TEXT = "All values of the predictions dictionary must be strings"
MISSING, REDUNDANT = "There are missing example IDs.", "There are redundant example IDs."
SCROLLS = {"rouge": scrolls.rouge, "f1": scrolls.f1, "exact_match": scrolls.exact_match}
OF_LABELS = {"accuracy": labels.accuracy, "accuracy_f1": labels.accuracy_f1, "accuracy_by_place": labels.accuracy,
             "matthews": labels.matthews}  # fmt: skip
OF_VALUES = {"correlation": labels.correlation, "relatedness": labels.relatedness, "paraphrase": labels.paraphrase}
MAIN = {  # the figure that stands for a task in a table; the first that its score has
    "scrolls_score": 1, "score": 1, "pearson": 100, "matthews_correlation": 100, "accuracy": 100, "ndcg@10": 100,
}  # fmt: skip


class Scored(NamedTuple):
    score: dict[str, Any]  # the official keys
    rows: list[dict[str, float]]  # of every example, in the order of the ids; empty where a metric is of all at once


def verify(predictions: Any, references: Mapping[str, Any], what: str) -> None:
    """Refuses other ids than the references have, in the words of SCROLLS' evaluator.

    Raises:
        InputError: no object, no prediction at all, missing or redundant ids.
    """
    if not isinstance(predictions, dict):
        raise InputError(f"{what}: {NO_OBJECT}")
    if not predictions:
        raise InputError(f"{what}: {MISSING} It is empty; expected {len(references)} predictions")
    for sentence, ids in (
        (MISSING, [each for each in references if each not in predictions]),
        (REDUNDANT, [each for each in predictions if each not in references]),
    ):
        if ids:
            raise InputError(f"{what}: {sentence} {len(ids)}, {ids[0]!r} first")


def score(task: Task, predictions: Any, references: Mapping[str, Any], what: str = "predictions") -> Scored:
    """
    Args:
        task: ``metric`` and ``labels`` are read.
        predictions: {id: prediction}, where a prediction is a text, a label (its number or its name), a value, or of a
            ranking the list of documents.
        references: {id: reference or [references]}; for LongBench also {id: {"answers": ...}}.

    Raises:
        InputError: see ``verify``; or a value is none that the metric takes.
    """
    verify(predictions, references, what)
    ids, (family, _, metric) = list(references), task.metric.rpartition("/")
    given = [predictions[each] for each in ids]
    if family in ("scrolls", "longbench"):
        if not all(isinstance(each, str) for each in given):
            raise InputError(f"{what}: {NO_TEXT}")
        if family == "longbench":
            wanted = [as_answers(references[each]) for each in ids]
            return Scored(*longbench.score(metric, task.short, given, wanted, task.family == "longbench_e"))
        several = [texts(references[each], each) for each in ids]
        found, rows = SCROLLS[metric](given, several)
        lengths = round(fmean(map(len, given)), 4)
        return Scored({"num_predicted": len(given), "mean_prediction_length_characters": lengths} | found, rows)
    if metric == "ranking":
        for each, documents in zip(ids, given, strict=True):
            if not isinstance(documents, list):
                raise InputError(f"{what}: {each!r}: expected a list of documents, best first, got {documents!r}")
        return Scored(*ranking.ranking(given, [texts(references[each], each) for each in ids]))
    if metric in OF_LABELS:
        got = [as_label(value, task.labels, what, each) for each, value in zip(ids, given, strict=True)]
        truth = [as_label(references[each], task.labels, "references", each) for each in ids]
        rows = [{"accuracy": float(a == b)} for a, b in zip(got, truth, strict=True)]
        return Scored(OF_LABELS[metric](got, truth), rows)
    got = [as_number(value, what, each) for each, value in zip(ids, given, strict=True)]
    truth = [as_number(references[each], "references", each) for each in ids]
    rows = [{"accuracy": float((a >= 0.5) == b)} for a, b in zip(got, truth, strict=True)]
    return Scored(OF_VALUES[metric](got, truth), rows if metric == "paraphrase" else [])


def main_figure(score: Mapping[str, Any]) -> tuple[str, float]:
    """(its key, the figure in percent) of a task."""
    key = next((key for key in MAIN if key in score), None)
    if key is None:  # LongBench-E
        return "mean of buckets", fmean(value for value in score.values() if value is not None)
    return key, MAIN[key] * score[key]


def texts(reference: Any, name: str) -> list[str]:
    several = reference if isinstance(reference, list) else [reference]
    if not several or not all(isinstance(each, str) for each in several):
        raise InputError(f"references: {name!r}: expected a text or a list of texts, got {reference!r}")
    return several


def as_answers(reference: Any) -> dict[str, Any]:
    return reference if isinstance(reference, dict) else {"answers": texts(reference, "answers")}


def as_label(value: Any, names: Sequence[str], what: str, name: str) -> int:
    """The number of a label that is given by number or by name."""
    if isinstance(value, str) and value in names:
        return names.index(value)
    number = int(value) if isinstance(value, bool | int) or (isinstance(value, str) and value.isdecimal()) else None
    if number is None or not (0 <= number < len(names) if names else number >= 0):
        expected = f"{', '.join(names)} or its number" if names else "a whole number"
        raise InputError(f"{what}: {name!r}: unknown label {value!r}; expected {expected}")
    return number


def as_number(value: Any, what: str, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise InputError(f"{what}: {name!r}: expected a number, got {value!r}")
    return number


def read_json(path: Path) -> Any:
    """
    Raises:
        InputError: there is no such file, or no JSON in it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON ({error})") from error
