"""How far a score may be off: percentile intervals of the bootstrap, over documents where several questions share one.

n examples, G groups that are drawn together.

Source: Efron and Tibshirani 1993, chapter 13.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

DRAWS, LEVEL = 1000, 0.95


def interval(values: np.ndarray, kind: str, groups: Sequence[Any], seed: int = 0) -> tuple[float, float]:
    """(low, high) of a figure.

    Args:
        values: [n, k] of every example.
        kind: what the figure is: "mean" of the first column; "geometric": the geometric mean of the means of all
            columns; "pearson": the correlation of two columns, in percent.
        groups: of every example what is drawn together, such as its document.
    """
    number = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    of_group = np.array([number[name] for name in groups])
    terms = values
    if kind == "pearson":
        a, b = (values - values.mean(0)).T
        terms = np.stack([a, b, a * a, b * b, a * b], axis=1)
    sums_Gk = np.zeros((len(number), terms.shape[1] + 1))
    np.add.at(sums_Gk, of_group, np.concatenate([terms, np.ones((len(terms), 1))], axis=1))
    random = np.random.default_rng(seed)
    times_drawn = random.multinomial(len(number), np.full(len(number), 1 / len(number)), size=DRAWS)
    totals = times_drawn @ sums_Gk
    means = totals[:, :-1] / totals[:, -1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        if kind == "pearson":
            a, b, aa, bb, ab = means.T
            draws = 100 * (ab - a * b) / np.sqrt((aa - a * a) * (bb - b * b))
        else:
            draws = means[:, 0] if kind == "mean" else means.prod(1) ** (1 / means.shape[1])
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return float("nan"), float("nan")
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
