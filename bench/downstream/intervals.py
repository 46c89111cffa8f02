"""How far a score may be off: percentile intervals of the bootstrap, over documents where several questions share one.

Source: Efron and Tibshirani 1993, chapter 13.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .scoring import Scored, main_figure

DRAWS, LEVEL = 1000, 0.95


def interval(
    scored: Scored, again: Callable[[np.ndarray], float] | None, groups: Sequence[Any], seed: int = 0
) -> tuple[float, float]:
    """(low, high) of the main figure, in percent.

    Args:
        again: the main figure of examples by their numbers, where it is more than a mean over examples.
        groups: of every example what is drawn together, such as its document.
    """
    names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    of_group: list[list[int]] = [[] for _ in names]
    for i, group in enumerate(groups):
        of_group[names[group]].append(i)
    random, draws = np.random.default_rng(seed), []
    members = [np.array(each) for each in of_group]
    for _ in range(DRAWS):
        rows = np.concatenate([members[i] for i in random.integers(len(members), size=len(members))])
        draws.append(again(rows) if again is not None else mean_figure(scored, rows))
    known = np.array([each for each in draws if np.isfinite(each)])
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_figure(scored: Scored, rows: np.ndarray) -> float:
    """Of a metric that is a mean over examples, or the geometric mean of three of them."""
    key, _ = main_figure(scored.score)
    if "rouge/geometric_mean" in scored.score:
        means = [np.mean([scored.rows[i][f"rouge/{kind}"] for i in rows]) for kind in ("rouge1", "rouge2", "rougeL")]
        return float(np.prod(means) ** (1 / 3))
    scale = 100 if key in ("accuracy", "ndcg@10") else 1
    return scale * float(np.mean([scored.rows[i][key] for i in rows]))
