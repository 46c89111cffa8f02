"""The metrics of LongBench's English tasks: of one prediction against one reference, 0 to 1.

Source: Bai et al. 2023, arXiv:2308.14508; metrics.py and eval.py of THUDM/LongBench at 2e00731.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from statistics import fmean
from typing import Any

from ....engine.errors import InputError
from . import words

FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # of whose predictions only the first line counts
EDGES = (("0-4k", 4000), ("4-8k", 8000))  # words of the context, below which an example of LongBench-E is in a bucket
NUMBER = re.compile(r"\d+")


def rouge(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """ROUGE-L of the library ``rouge``, which splits sentences at every full stop and minds the case. Whatever it
    cannot score (no word, a sentence of a thousand words) is 0, as there."""
    try:
        from rouge import Rouge
    except ImportError as error:
        raise InputError("rouge is not installed; pip install 'conceptron[downstream]'") from error
    try:
        return Rouge().get_scores([prediction], [reference], avg=True)["rouge-l"]["f"]
    except (ValueError, RecursionError, ZeroDivisionError):
        return 0.0


def answer_f1(prediction: str, reference: str, classes: Sequence[str]) -> float:
    return words.f1(prediction, reference)


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """Shared among the classes that the prediction names. A name that is a part of the answer's own is not counted;
    the list is shortened while it is walked through, which skips the next name: so does the original."""
    named = [name for name in classes if name in prediction]
    for name in named:
        if name in reference and name != reference:
            named.remove(name)
    return 1.0 / len(named) if reference in named else 0.0


def retrieval(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """The share of all numbers in the prediction that are the N of "Paragraph N"."""
    return share_of(prediction, re.findall(r"Paragraph (\d+)", reference)[0])


def count(prediction: str, reference: str, classes: Sequence[str]) -> float:
    return share_of(prediction, str(reference))


def share_of(prediction: str, wanted: str) -> float:
    numbers = NUMBER.findall(prediction)
    return sum(number == wanted for number in numbers) / len(numbers) if numbers else 0.0


def code_similarity(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """How alike two lines of code are, in whole percent by difflib: of the prediction the first line that is neither a
    comment nor a fence. The original asks fuzzywuzzy, which does just this where python-Levenshtein is not installed.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100


Metric = Callable[[str, str, Sequence[str]], float]
METRICS: dict[str, Metric] = {
    "rouge": rouge, "f1": answer_f1, "classification": classification, "retrieval": retrieval, "count": count,
    "code_similarity": code_similarity,
}  # fmt: skip


def score(
    metric: str, task: str, predictions: Sequence[str], references: Sequence[Mapping[str, Any]], by_length: bool
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The score of a task in percent with two digits, and of every example.

    Args:
        task: LongBench's own name, such as trec.
        references: ``answers``, of which the best counts, with ``all_classes`` of a classification and, for
            ``by_length``, ``length`` in words.
        by_length: in LongBench-E's three buckets instead.

    Raises:
        InputError: a field that is needed is missing.
    """
    values = []
    for prediction, reference in zip(predictions, references, strict=True):
        if task in FIRST_LINE:
            prediction = prediction.lstrip("\n").split("\n")[0]
        classes = reference.get("all_classes") or ()
        if metric == "classification" and not classes:
            raise InputError(f"longbench/{task}: a reference needs all_classes, the names of all classes")
        values.append(max((METRICS[metric](prediction, each, classes) for each in reference["answers"]), default=0.0))
    rows = [{"score": 100 * value} for value in values]
    if not by_length:
        return {"score": rounded(values)}, rows
    if any("length" not in reference for reference in references):
        raise InputError(f"longbench_e/{task}: a reference needs length, the words of its context")
    buckets: dict[str, list[float]] = {name: [] for name, _ in EDGES} | {"8k+": []}
    for value, reference in zip(values, references, strict=True):
        buckets[next((name for name, edge in EDGES if reference["length"] < edge), "8k+")].append(value)
    return {name: rounded(bucket) if bucket else None for name, bucket in buckets.items()}, rows


def rounded(values: Sequence[float]) -> float:
    return round(100 * fmean(values), 2)
