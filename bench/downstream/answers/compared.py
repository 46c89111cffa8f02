"""Labels of a few questions that are asked of many documents: of each question its own small machine, which compares
what documents say to it. A model read once, never trained.

n, m documents, k parts of evidence, e width of a vector, L labels.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from ....engine.labelled.examples import Example
from ....engine.labelled.task import Task
from ...analysis.embedding import directions
from ..readers import Reader
from .similarity import Space

EVIDENCE = 8  # parts of a document that are nearest to the question
SHARPNESS = 10.0  # of the softmax over their cosines
AROUND = 1  # parts on either side that a part of a document is averaged with
PENALTIES = (0.2, 0.35, 0.5, 0.7, 1.0, 1.5, 2.5, 5.0)  # of the ridge; chosen on held-out training
TENTHS = 10
NUM_STATISTICS = 65536  # vectors, at most, that the middle of all is measured on
Evidence = tuple[np.ndarray, np.ndarray]  # [k, e] directions, [k] weights


def averaged(parts: np.ndarray) -> np.ndarray:
    """[P, e] each with its neighbours."""
    wide = np.pad(parts, ((AROUND, AROUND), (0, 0)), mode="edge")
    return np.mean([wide[i : i + len(parts)] for i in range(2 * AROUND + 1)], axis=0)


def evidence(parts: np.ndarray, query: np.ndarray) -> Evidence:
    """The parts that are nearest to a question, and how much each counts; of fewer parts the nearest again, which then
    counts for nothing. Of directions."""
    near = parts @ query
    best = np.argsort(-near)[:EVIDENCE]
    weights = np.exp(SHARPNESS * (near[best] - near[best[0]]))
    missing = EVIDENCE - len(best)
    return parts[np.pad(best, (0, missing), mode="edge")], np.pad(weights / weights.sum(), (0, missing))


def kernel(first: Sequence[Evidence], second: Sequence[Evidence]) -> np.ndarray:
    """[n, m]  k(a, b) / sqrt(k(a, a) k(b, b)),  k(a, b) = sum_ij w_i v_j exp(-|a_i - b_j|^2): how alike two weighted
    sets of parts are. Source: Smola et al. 2007 (kernel mean embeddings)."""

    (a, w), (b, v) = ([np.stack(each) for each in zip(*many, strict=True)] for many in (first, second))
    of_both = of_sets(a, w, b, v)
    own = [np.sqrt([of_sets(x[i : i + 1], y[i : i + 1], x[i : i + 1], y[i : i + 1])[0, 0] for i in range(len(x))])
           for x, y in ((a, w), (b, v))]  # fmt: skip
    return of_both / (own[0][:, None] * own[1])


def of_sets(a: np.ndarray, w: np.ndarray, b: np.ndarray, v: np.ndarray) -> np.ndarray:
    """[n, m] of a [n, k, e], w [n, k], b [m, k, e], v [m, k]."""
    (n, k, e), m = a.shape, len(b)
    lengths = (a**2).sum(2).reshape(n * k, 1) + (b**2).sum(2).reshape(m * k)
    alike = np.exp(2 * a.reshape(-1, e) @ b.reshape(-1, e).T - lengths).reshape(n, k, m, k)
    return np.einsum("nimj,ni,mj->nm", alike, w, v, optimize=True)


class Compared:
    """Of every question  prior + K (K + penalty)^-1 (Y - prior):  kernel ridge regression on labels, over the prior of
    the question. The penalty is that of the least squared error on documents of the training split, a tenth of which
    is held out in turn; a seed draws the tenths."""

    def __init__(self, task: Task, train: Sequence[Example], reader: Reader, seeds: int) -> None:
        self.task = task
        documents = list(dict.fromkeys(each.document for each in train))
        vectors = np.concatenate([read.vectors for read in reader.parts(documents)])
        self.space = Space(vectors[:NUM_STATISTICS])
        self.given = looked_up(train, reader, reader, self.space)
        self.members = {question: [i for i, each in enumerate(train) if each.question == question]
                        for question in dict.fromkeys(each.question for each in train)}  # fmt: skip
        truth = np.eye(len(task.labels))[[each.truth for each in train]]
        self.prior = truth.mean(0)
        self.truth, errors = truth, np.zeros((seeds, len(PENALTIES)))
        number = {document: i for i, document in enumerate(documents)}
        tenths = [np.random.default_rng(seed).permutation(len(documents)) % TENTHS for seed in range(seeds)]
        for members in self.members.values():
            said = [self.given[i] for i in members]
            whole, labels = kernel(said, said), truth[members]
            for seed, part in itertools.product(range(seeds), range(TENTHS)):
                is_held = tenths[seed][[number[train[i].document] for i in members]] == part
                if is_held.all() or not is_held.any():
                    continue
                known, asked = whole[~is_held][:, ~is_held], whole[is_held][:, ~is_held]
                for j, penalty in enumerate(PENALTIES):
                    found = self.ridge(known, asked, labels[~is_held], penalty)
                    errors[seed, j] += ((found - labels[is_held]) ** 2).sum()
        self.penalties = [PENALTIES[i] for i in errors.argmin(1)]

    def ridge(self, known: np.ndarray, asked: np.ndarray, labels: np.ndarray, penalty: float) -> np.ndarray:
        """[m, L] of asked [m, n], from labels [n, L] of known [n, n]; one document's worth of the prior of all."""
        prior = (labels.sum(0) + self.prior) / (len(labels) + 1)
        return prior + asked @ np.linalg.solve(known + penalty * np.eye(len(known)), labels - prior)

    def found(self, given: Sequence[Example], reader: Reader, asks: Reader) -> np.ndarray:
        """[seeds, n, L]; of a question that training never asked the prior of all."""
        said = looked_up(given, reader, asks, self.space)
        made = np.tile(self.prior, (len(self.penalties), len(given), 1))
        for question, members in self.members.items():
            mine = [i for i, each in enumerate(given) if each.question == question]
            if not mine:
                continue
            learned = [self.given[i] for i in members]
            known, asked = kernel(learned, learned), kernel([said[i] for i in mine], learned)
            for seed, penalty in enumerate(self.penalties):
                made[seed, mine] = self.ridge(known, asked, self.truth[members], penalty)
        return made


def looked_up(given: Sequence[Example], reader: Reader, asks: Reader, space: Space) -> list[Evidence]:
    """Of every example what its document says to its question."""
    documents = list(dict.fromkeys(each.document for each in given))
    reads = dict(zip(documents, reader.parts(documents), strict=True))
    parts = {text: directions(averaged(space.place(read.vectors, "centred"))) for text, read in reads.items()}
    queries = directions(space.place(asks.whole([each.question for each in given]), "centred"))
    return [evidence(parts[each.document], query) for each, query in zip(given, queries, strict=True)]
