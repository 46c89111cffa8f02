"""One task under one protocol: the score of a model, its interval, and beside it from the same run what a reader needs
to know what it is worth.

    majority           the commonest label or the mean value of the training split (of the same question, where several
                       documents are asked it); of options the first one, of summaries the first words
    BM25               words alone, where something is searched
    bag of embeddings  the means of the backbone's bare token embeddings, in place of concepts
    untrained encoder  the same architecture with weights as they are drawn
    concepts zeroed, concepts shuffled   the model itself without what it read, and with what it read elsewhere
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...engine.errors import InputError
from ...engine.labelled.examples import Example, examples, several
from ...engine.labelled.task import Task
from .answers import choice, extract, head, labels, place, retrieval, shots, similarity, write
from .intervals import interval
from .metrics.scrolls import DISPLAYED
from .readers import Ablated, Reader
from .scoring import Scored, main_figure, score

MODEL = "concepts"
ABLATIONS = ("zeroed", "shuffled")


@dataclass(frozen=True)
class Settings:
    """What a run of tasks has in common."""

    data: Path | None = None  # None: the hub
    limit: int | None = None  # examples of a pair task, documents of another
    train: tuple[str, ...] = ()  # splits in place of the task's
    report: tuple[str, ...] = ()
    seeds: int = 3
    written: bool = False  # answers and summaries are written by the model's decoder, not taken from the document
    with_floors: bool = True


@dataclass
class Outcome:
    """What a task gave."""

    task: Task
    predictions: dict[str, Any]
    references: dict[str, Any]
    score: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)  # of the table
    places: list[dict[str, Any]] = field(default_factory=list)  # of a synthetic task: length, depth, score
    median_tokens: int = 0  # of a document


def run(
    task: Task, settings: Settings, reader: Reader, floors: Mapping[str, Callable[[], Reader]],
    seeds: Sequence[Reader] = (),
) -> Outcome:  # fmt: skip
    """
    Args:
        seeds: further models, of other seeds, that only say how far the score is spread.

    Raises:
        InputError: the task needs what this model or this folder does not have.
    """
    is_written = settings.written or task.answer == "written"
    if is_written:
        write.check(task, reader)
    started = time.perf_counter()
    report = settings.report or tuple(task.splits.report)
    given = several(task, report, settings.data, settings.limit)
    asked = Asked(task, given, learned_from(task, settings), is_written)
    fitted = asked.fit(reader, settings.seeds)
    predictions = asked.predict(reader, reader, fitted)
    scored = score(task, predictions, asked.references)
    outcome = Outcome(task, predictions, asked.references, scored.score)
    documents = list(dict.fromkeys(each.document for each in given))
    seen, total = head.count(task, given, reader)
    middle = sorted(documents, key=len)[len(documents) // 2]
    outcome.median_tokens = reader.count([middle])[1]
    if is_written:
        seen, total = write.count(given, reader)
    add = asked.row
    outcome.rows.append(add(MODEL if reader.name == MODEL else "encoder", scored, predictions) | {
        "tokens seen": seen, "tokens given": total, "seconds": round(time.perf_counter() - started, 1),
        "spread over seeds": asked.spread(reader, fitted, seeds),
    })  # fmt: skip
    beside = [f"reported on {' and '.join(settings.report)}"] if settings.report else []
    beside += [f"learned from {' and '.join(settings.train)}"] if settings.train and asked.train else []
    outcome.rows[0]["beside it"] = "; ".join(each for each in (*beside, outcome.rows[0]["beside it"]) if each)
    for name, other in asked.variants(reader, fitted).items():
        outcome.rows.append(add(f"{MODEL}, {name}", score(task, other, asked.references), other))
    if settings.with_floors:
        for name, other in asked.simple(reader).items():
            found = score(task, other, asked.references)
            outcome.rows.append(add(name, found, other))
            outcome.rows[0] |= asked.above(name, (scored, predictions), (found, other), outcome.rows[0])
        for name, open_floor in ({} if is_written else floors).items():
            floor = open_floor()
            other = asked.predict(floor, floor, asked.fit(floor, 1))
            outcome.rows.append(add(name, score(task, other, asked.references), other))
        is_one = len({each.document for each in given}) == 1  # which there is no other to put in its place of
        for how in ABLATIONS[: 1 if is_one else 2] if reader.name == MODEL else ():
            other = asked.predict(Ablated(reader, how), reader, fitted)
            outcome.rows.append(add(f"concepts {how}", score(task, other, asked.references), other))
    for name, figures in task.published.items():
        outcome.rows.append(quoted(task, name, figures))
    if task.form == "synthetic":
        outcome.places = by_place(given, scored)
    return outcome


def learned_from(task: Task, settings: Settings) -> list[Example]:
    """The training split of a task that learns, or that centres; none of the others."""
    splits = settings.train or tuple(task.splits.train)
    if task.answer not in ("labels", "values", "similarity") or task.form == "longbench":  # examples are in the prompt
        return []
    if not splits:
        raise InputError(f"{task.name}: has no training split; name one with train=SPLIT")
    if set(splits) & set(settings.report or task.splits.report):
        raise InputError(f"train={','.join(splits)}: expected splits that are not reported")
    limit = None if settings.limit is None else max(settings.limit, 16)
    return [each for split in splits for each in examples(task, split, settings.data, limit)]


class Asked:
    """A task's questions, and what answers them: one branch a kind of answer."""

    def __init__(
        self, task: Task, given: Sequence[Example], train: Sequence[Example], is_written: bool = False
    ) -> None:
        self.task, self.given, self.train, self.is_written = task, list(given), list(train), is_written
        self.references = {each.id: each.reference for each in given}
        if task.answer == "retrieval":
            self.references = retrieval.references(given)
        shared = len({each.document for each in given}) < len(given)
        self.groups = [each.document if shared and task.form != "pair" else each.id for each in given]

    def fit(self, reader: Reader, seeds: int) -> Any:
        kind = self.task.answer
        if head.has_head(reader, self.task):
            return None
        if kind == "similarity":
            return similarity.space_of(self.train, reader)
        if kind in ("labels", "values") and self.train:
            return labels.fit(self.task, self.train, reader, seeds)
        return None

    def predict(self, reader: Reader, asks: Reader, fitted: Any) -> dict[str, Any]:
        task, given = self.task, self.given
        if self.is_written:
            return write.predict(task, given, reader)
        if head.has_head(asks, task):
            return head.predict(task, given, reader)
        match task.answer:
            case "similarity":
                return similarity.predict(given, reader, asks)
            case "retrieval":
                return retrieval.predict(given, reader, asks)
            case "place":
                return place.predict(task, given, reader, asks)
            case "choice":
                return choice.predict(given, reader, asks)
            case "span":
                return extract.spans(task, given, reader, asks)
            case "summary":
                return extract.summaries(task, given, reader, asks)
            case _:
                if fitted is None:
                    return shots.predict(given, reader)
                return fitted.predict(given, reader, asks)

    def variants(self, reader: Reader, fitted: Any) -> dict[str, dict[str, Any]]:
        """The model answering in other ways, which are shown and not chosen from."""
        if self.task.answer == "similarity":
            return {way: similarity.predict(self.given, reader, reader, fitted, way)
                    for way in similarity.WAYS if way != "raw"}  # fmt: skip
        if self.task.answer == "retrieval" and reader.name == MODEL:
            return retrieval.variants(self.given, reader, reader)
        return {}

    def simple(self, reader: Reader) -> dict[str, dict[str, Any]]:
        """Answers without a model."""
        task, given = self.task, self.given
        match task.answer:
            case "retrieval":
                return {"BM25": retrieval.bm25(given)}
            case "place" if task.generator != "duplicate" and task.short != "passage_count":
                return {"BM25": place.bm25(task, given, max(1, len(reader.parts([given[0].document])[0].vectors)))}
            case "choice":
                return {"BM25": choice.bm25(given), "first option": {each.id: each.options[0] for each in given}}
            case "span":
                return {"BM25": extract.bm25_spans(given, task.words)}
            case "summary":
                return {"first words": extract.leads(task, given)}
            case "labels" | "values" if self.train:
                return {"majority": labels.majority(task, self.train, given)}
        return {}

    def spread(self, reader: Reader, fitted: Any, seeds: Sequence[Reader]) -> float | None:
        """Standard deviation of the main figure over seeds, in percent; None of one seed."""
        if seeds:
            answers = [self.predict(each, each, None) for each in (reader, *seeds)]
        else:
            answers = fitted.of_seeds(self.given, reader, reader) if isinstance(fitted, labels.Fitted) else []
        figures = [main_figure(score(self.task, each, self.references).score)[1] for each in answers]
        return float(np.std(figures, ddof=1)) if len(figures) > 1 else None

    def row(self, name: str, scored: Scored, predictions: Mapping[str, Any]) -> dict[str, Any]:
        """Of the table: the main figure in percent with its interval."""
        key, figure = main_figure(scored.score)
        low, high = interval(*self.drawn_from(scored, predictions), self.groups)
        return {"task": self.task.name, "row": name, "metric": key, "score": figure, "low": low, "high": high,
                "examples": len(self.given), "documents": len(set(self.groups)), **others(scored.score)}  # fmt: skip

    def above(
        self, name: str, mine: tuple[Scored, Mapping[str, Any]], floor: tuple[Scored, Mapping[str, Any]],
        row: Mapping[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        """By how much the model is above a floor, with the interval of the difference: both answer the same draws."""
        (a, kind), (b, _) = self.drawn_from(*mine), self.drawn_from(*floor)
        if kind != "mean":
            return {}
        low, high = interval(a - b, "mean", self.groups)
        words = f"{(a - b).mean():+.2f} ({low:.2f} to {high:.2f}) over {name}"
        return {"beside it": "; ".join(each for each in (row.get("beside it"), words) if each)}

    def drawn_from(self, scored: Scored, predictions: Mapping[str, Any]) -> tuple[np.ndarray, str]:
        """Of every example what the main figure is made of, in percent, and how it is made."""
        key, _ = main_figure(scored.score)
        if key in ("pearson", "matthews_correlation"):  # of two classes the one is the other
            both = [(predictions[each.id], each.truth) for each in self.given]
            return np.array(both, dtype=np.float64), "pearson"
        if "rouge/geometric_mean" in scored.score:
            kinds = [f"rouge/{kind}" for kind in DISPLAYED]
            return np.array([[row[kind] for kind in kinds] for row in scored.rows]), "geometric"
        key = key if key in scored.rows[0] else "score"  # buckets of length
        scale = 100 if key in ("accuracy", "ndcg@10") else 1
        return scale * np.array([[row[key]] for row in scored.rows]), "mean"


SHOWN = ("f1", "spearmanr", "spearman", "average_precision", "rouge/rouge1", "rouge/rouge2", "rouge/rougeL", "recall@1")


def others(found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures beside the main one, in words."""
    key, figure = main_figure(found)
    if not np.isfinite(figure):
        return {"beside it": "all answers alike: no correlation"}
    return {"beside it": ", ".join(f"{each} {found[each]:.4g}" for each in SHOWN if each in found and each != key)}


def quoted(task: Task, name: str, figures: Mapping[str, float]) -> dict[str, Any]:
    """A published figure, as others reported it on other data."""
    known = dict(figures)
    if "rouge/rouge1" in known:
        product = known["rouge/rouge1"] * known["rouge/rouge2"] * known["rouge/rougeL"]
        known = {"scrolls_score": product ** (1 / 3), **known}
    names = {"f1": "scrolls_score", "exact_match": "scrolls_score"} if task.family == "scrolls" else {}
    known = {names.get(key, key): value for key, value in known.items()}
    if "spearmanr" in known and "pearson" not in known:
        return {"task": task.name, "row": f"{name} (quoted)", "metric": "spearmanr", "score": 100 * known["spearmanr"],
                "beside it": task.published_by}  # fmt: skip
    key, figure = main_figure(known)
    return {"task": task.name, "row": f"{name} (quoted)", "metric": key, "score": figure,
            "beside it": "; ".join(each for each in (others(known)["beside it"], task.published_by) if each)}


def by_place(given: Sequence[Example], scored: Scored) -> list[dict[str, Any]]:
    """The score of a synthetic task by length, and by depth where it has one."""
    cells: dict[tuple[int, str], list[float]] = {}
    for each, row in zip(given, scored.rows, strict=True):
        for depth in ("all", *([each.about["depth"]] if "depth" in each.about else [])):
            cells.setdefault((each.about["length"], depth), []).append(100 * row["accuracy"])
    return [{"length": length, "depth": depth, "accuracy": float(np.mean(values)), "examples": len(values)}
            for (length, depth), values in sorted(cells.items())]  # fmt: skip
