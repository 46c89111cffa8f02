"""Intervals by the bootstrap."""

import numpy as np
import pytest

from conceptron.bench.downstream.intervals import interval


def test_intervals_draw_documents():
    """Twenty questions about each of ten documents, all right or all wrong: the interval is that of ten, not of 200."""
    values = 100 * np.repeat([1.0, 0.0] * 5, 20)[:, None]
    low, high = interval(values, "mean", np.repeat(np.arange(10), 20).tolist())
    assert low < 25 and high > 75
    low, high = interval(values, "mean", list(range(200)))
    assert 42 < low < 50 < high < 58


def test_intervals_of_correlations_and_geometric_means():
    """Against drawing examples one by one."""
    random = np.random.default_rng(0)
    values = random.random((40, 2)) + np.linspace(0, 1, 40)[:, None]
    for kind, figure in (
        ("pearson", lambda some: 100 * np.corrcoef(some.T)[0, 1]),
        ("geometric", lambda some: float(np.sqrt(some.mean(0).prod()))),
    ):
        drawn = [figure(values[random.integers(40, size=40)]) for _ in range(2000)]
        low, high = interval(values, kind, list(range(40)))
        assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), rel=0.06)
    assert all(np.isnan(interval(np.ones((5, 2)), "pearson", list(range(5)))))
