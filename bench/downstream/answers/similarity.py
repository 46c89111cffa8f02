"""Two sentences compared by the cosine of their vectors. Nothing is trained, no label is read.

n pairs, e width of a vector.
"""

from collections.abc import Sequence

import numpy as np

from ....engine.labelled.examples import Example
from ..readers import Reader

MEASURED = 2048  # pairs
LEAST_VARIANCE = 1e-4  # of the largest direction: what lies lower is noise that whitening would blow up


class Space:
    """Where the vectors of a reader lie, measured on texts without labels: their mean, and what whitens them.

    ``centred`` takes the mean away, ``whitened`` also makes all directions alike long (Su et al. 2021,
    arXiv:2103.15316).
    """

    def __init__(self, vectors: np.ndarray) -> None:
        self.mean = vectors.mean(0, dtype=np.float64)
        rest = vectors.astype(np.float64) - self.mean
        values, directions = np.linalg.eigh(rest.T @ rest / len(rest))
        is_kept = values > LEAST_VARIANCE * values[-1]
        self.whitening = directions[:, is_kept] / np.sqrt(values[is_kept])

    def place(self, vectors: np.ndarray, how: str) -> np.ndarray:
        if how == "raw":
            return vectors
        return vectors - self.mean if how == "centred" else (vectors - self.mean) @ self.whitening


def space_of(train: Sequence[Example], reader: Reader) -> Space:
    """Of the sentences of the first MEASURED pairs."""
    some = train[:MEASURED]
    sides = [[each.question for each in some], [each.document for each in some]]
    return Space(np.concatenate([reader.whole(side) for side in sides]))


WAYS = ("raw", "centred", "whitened")


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n]; 0 where a vector is 0."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.where(norms > 0, norms, 1)


def predict(
    given: Sequence[Example], reader: Reader, asks: Reader, space: Space | None = None, way: str = "raw"
) -> dict[str, float]:
    """The cosine of every pair. ``asks`` reads the first texts, ``reader`` the second."""
    first, second = asks.whole([each.question for each in given]), reader.whole([each.document for each in given])
    if space is not None:
        first, second = space.place(first, way), space.place(second, way)
    return {each.id: float(value) for each, value in zip(given, cosines(first, second), strict=True)}
