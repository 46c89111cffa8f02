"""Labels and values by a linear head on vectors that nothing has changed: a model read once, never trained.

n examples, P parts of a document, e width of a vector, F features, L labels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ....engine.labelled.examples import Example, hold_out
from ....engine.labelled.task import Task
from ...analysis.embedding import directions
from ..readers import Reader
from .compared import Compared, averaged
from .similarity import Space, cosines, space_of

STRENGTHS = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)  # of the head, inverse to its penalty; chosen on held-out training
EVIDENCE = 4  # parts of a document that are nearest to the question
SHARPNESS = 20.0  # of the softmax over their cosines
FEW = 64  # questions, so few that each can have weights of its own
DIRECTIONS, WHOLE_DIRECTIONS = 32, 8  # principal ones of evidence, and of documents, that such weights see
NUM_STATISTICS = 65536  # vectors, at most, that where vectors lie is measured on


def pair_features(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[n, 3e + 1] of two texts: where they differ, what both say, both together, and their cosine. Symmetric.

    Source: the features of InferSent (Conneau et al. 2017, arXiv:1705.02364), with a + b in place of a and b.
    """
    a, b = directions(first), directions(second)
    return np.concatenate([np.abs(a - b), a * b, a + b, 10 * cosines(a, b)[:, None]], axis=1)


def evidence(parts: np.ndarray, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([e] what the document says that is near to the question, [EVIDENCE] how near). Of directions."""
    near = parts @ query
    best = np.argsort(-near)[:EVIDENCE]
    weights = np.exp(SHARPNESS * (near[best] - near[best[0]]))
    closest = np.zeros(EVIDENCE)
    closest[: len(best)] = near[best]
    return (weights / weights.sum()) @ parts[best], closest


class Features:
    """[n, F] of examples, measured on those of training.

    Of a pair ``pair_features``. Of a question about a document: the question, what of the document is near to it, their
    product, and how near. Where few questions are asked of many documents, each instead has weights of its own, for
    how near the evidence is and for the principal directions of evidence and document.
    """

    def __init__(self, task: Task, train: Sequence[Example], reader: Reader) -> None:
        self.is_pair = task.form == "pair"
        self.questions = list(dict.fromkeys(each.question for each in train))
        self.is_few = not self.is_pair and len(self.questions) <= min(FEW, len(train) // 4)
        documents = list(dict.fromkeys(each.document for each in train))
        if self.is_pair:
            self.space = space_of(train, reader)
            return
        reads = reader.parts(documents)
        self.space = Space(np.concatenate([read.vectors for read in reads])[:NUM_STATISTICS])
        self.middle = np.mean([read.whole for read in reads], axis=0)
        found, near, _ = self.looked_up(train, reader, reader)
        self.mean, self.nearness = found.mean(0), near.mean()
        self.axes = np.linalg.svd(found - self.mean, full_matrices=False)[2][:DIRECTIONS].T
        wholes = directions(np.stack([read.whole for read in reads]) - self.middle)
        self.whole_axes = np.linalg.svd(wholes, full_matrices=False)[2][:WHOLE_DIRECTIONS].T

    def rows(self, given: Sequence[Example], reader: Reader, asks: Reader) -> np.ndarray:
        if self.is_pair:
            first = self.space.place(asks.whole([each.question for each in given]), "centred")
            return pair_features(first, self.space.place(reader.whole([each.document for each in given]), "centred"))
        found, near, whole = self.looked_up(given, reader, asks)
        if not self.is_few:
            queries = directions(self.space.place(asks.whole([each.question for each in given]), "centred"))
            return np.concatenate([queries, found, queries * found, 10 * near], axis=1)
        own = np.concatenate(
            [10 * (near - self.nearness), 10 * (found - self.mean) @ self.axes, 5 * whole @ self.whole_axes], axis=1
        )
        number = {question: i for i, question in enumerate(self.questions)}
        is_asked = np.zeros((len(given), len(self.questions)))
        for row, each in zip(is_asked, given, strict=True):
            if each.question in number:  # a new one is told by nothing: all weights see zeros
                row[number[each.question]] = 1
        crossed = (0.3 * is_asked[:, :, None] * own[:, None, :]).reshape(len(given), -1)
        return np.concatenate([3 * is_asked, crossed], axis=1)

    def looked_up(
        self, given: Sequence[Example], reader: Reader, asks: Reader
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[n, e] evidence, [n, EVIDENCE] how near it is, [n, e] the directions of the documents."""
        documents = list(dict.fromkeys(each.document for each in given))
        reads = dict(zip(documents, reader.parts([each for each in documents]), strict=True))
        parts = {text: directions(averaged(self.space.place(read.vectors, "centred"))) for text, read in reads.items()}
        queries = directions(self.space.place(asks.whole([each.question for each in given]), "centred"))
        found = [evidence(parts[each.document], query) for each, query in zip(given, queries, strict=True)]
        middle = getattr(self, "middle", 0.0)
        wholes = directions(np.stack([reads[each.document].whole for each in given]) - middle)
        return np.stack([vector for vector, _ in found]), np.stack([near for _, near in found]), wholes


class Fitted:
    """A head for each seed, which draws the part of training that the penalty is chosen by. What is answered is the
    mean of all, and where few questions are asked of many documents of this and ``Compared``, half each."""

    def __init__(
        self, task: Task, features: Features, heads: Sequence[Any], scaling: tuple[float, float],
        compared: Compared | None,
    ) -> None:  # fmt: skip
        self.task, self.features, self.heads, self.scaling = task, features, heads, scaling
        self.compared = compared

    def predict(self, given: Sequence[Example], reader: Reader, asks: Reader) -> dict[str, Any]:
        return as_predictions(self.task, given, np.mean(self.found(given, reader, asks), axis=0))

    def of_seeds(self, given: Sequence[Example], reader: Reader, asks: Reader) -> list[dict[str, Any]]:
        return [as_predictions(self.task, given, each) for each in self.found(given, reader, asks)]

    def found(self, given: Sequence[Example], reader: Reader, asks: Reader) -> list[np.ndarray]:
        """[n] or [n, L] of each seed."""
        rows = self.features.rows(given, reader, asks)
        made = [outputs(self.task, head, rows) * self.scaling[1] + self.scaling[0] for head in self.heads]
        if self.compared is None:
            return made
        return [(a + b) / 2 for a, b in zip(made, self.compared.found(given, reader, asks), strict=True)]


def outputs(task: Task, head: Any, rows: np.ndarray) -> np.ndarray:
    """[n] values, or of labels [n, L] probabilities, 0 for one that training never showed."""
    if task.answer == "values":
        return head.predict(rows)
    found = np.zeros((len(rows), len(task.labels)))
    found[:, head[-1].classes_] = head.predict_proba(rows)
    return found


def as_predictions(task: Task, given: Sequence[Example], found: np.ndarray) -> dict[str, Any]:
    """What ``scoring.score`` takes: a value, the probability of label 1, a label's number, or of SCROLLS its name."""
    if task.answer == "values":
        return {each.id: float(value) for each, value in zip(given, found, strict=True)}
    if task.metric == "paraphrase":
        return {each.id: float(row[1]) for each, row in zip(given, found, strict=True)}
    best = found.argmax(1)
    as_text = task.metric.startswith("scrolls/")
    return {each.id: task.labels[i] if as_text else int(i) for each, i in zip(given, best, strict=True)}


def fit(task: Task, train: Sequence[Example], reader: Reader, seeds: int) -> Fitted:
    """The penalty is chosen on documents held out of the training split, then all of it is learned from."""
    features = Features(task, train, reader)
    rows = features.rows(train, reader, reader)
    truth = np.array([each.truth for each in train], dtype=np.float64)
    middle, spread = (truth.mean(), truth.std() or 1.0) if task.answer == "values" else (0.0, 1.0)
    truth = (truth - middle) / spread if task.answer == "values" else truth.astype(np.int64)
    place = {each.id: i for i, each in enumerate(train)}
    heads = []
    for seed in range(seeds):
        learned, held = ([place[each.id] for each in part] for part in hold_out(train, seed))
        scores = []
        for strength in STRENGTHS:
            head = new_head(task, strength, features.is_few).fit(rows[learned], truth[learned])
            scores.append(quality(task, outputs(task, head, rows[held]), truth[held]))
        heads.append(new_head(task, STRENGTHS[int(np.argmax(scores))], features.is_few).fit(rows, truth))
    compared = Compared(task, train, reader, seeds) if features.is_few and task.answer == "labels" else None
    return Fitted(task, features, heads, (middle, spread), compared)


def new_head(task: Task, strength: float, is_scaled: bool) -> Any:
    """``is_scaled``: the features have the sizes that the penalty is meant for."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    head = Ridge(alpha=1 / strength) if task.answer == "values" else LogisticRegression(C=strength, max_iter=200)
    return make_pipeline(head) if is_scaled else make_pipeline(StandardScaler(), head)


def quality(task: Task, found: np.ndarray, truth: np.ndarray) -> float:
    """Of held-out examples: the correlation, or the mean log probability of the right label."""
    if task.answer == "values":
        return float(np.corrcoef(found, truth)[0, 1])
    return float(np.log(found[np.arange(len(truth)), truth].clip(1e-6)).mean())


def majority(task: Task, train: Sequence[Example], given: Sequence[Example]) -> dict[str, Any]:
    """The mean value; or the commonest label, of the same question where the training split asks it of several
    documents."""
    if task.answer == "values":
        mean = float(np.mean([each.truth for each in train]))
        return {each.id: mean for each in given}
    counts: dict[str | None, np.ndarray] = {None: np.zeros(len(task.labels))}
    repeated = len({each.question for each in train}) < len(train) / 4
    for each in train:
        for key in (None, each.question) if repeated else (None,):
            counts.setdefault(key, np.zeros(len(task.labels)))[each.truth] += 1
    found = np.stack([counts.get(each.question, counts[None]) for each in given])
    return as_predictions(task, given, found / found.sum(1, keepdims=True))
