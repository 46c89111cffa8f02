"""``conceptron score TASK --predictions P.json --references R.json``: anybody's predictions by the official metric."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..engine.errors import InputError
from ..engine.labelled.task import expand, load_task
from .downstream.metrics import scrolls
from .downstream.scoring import read_json, score
from .measure.results import finite


def main(options: argparse.Namespace) -> int:
    """Prints one JSON object with the official keys.

    Args:
        options: ``task``, and the files ``predictions`` and ``references``: {id: prediction} and {id: reference or
            [references]}. For the folder ``scrolls`` both are {task: such an object}, and the benchmark's own score is
            added.

    Raises:
        InputError: a file cannot be read, or ids or values do not fit.
    """
    predictions, references = read_json(Path(options.predictions)), read_json(Path(options.references))
    if not isinstance(references, dict) or not references:
        raise InputError(f"{options.references}: expected a JSON object with references by id, got none")
    if options.task == "scrolls":
        print(json.dumps(finite(benchmark(predictions, references, str(options.predictions))), allow_nan=False))
        return 0
    found = score(load_task(options.task), predictions, references, str(options.predictions)).score
    print(json.dumps(finite(found), allow_nan=False))
    return 0


def benchmark(predictions: Any, references: Any, what: str) -> dict[str, Any]:
    """Every task of the folder that has references, and the mean of SCROLLS' seven."""
    if not isinstance(predictions, dict):
        raise InputError(f"{what}: expected a JSON object {{task: {{id: prediction}}}}")
    scores = {}
    for name in expand("scrolls"):
        task = load_task(name)
        if task.short in references:
            scores[task.short] = score(task, predictions.get(task.short), references[task.short], what).score
    return {**scores, "scrolls_score": scrolls.benchmark(scores)}
