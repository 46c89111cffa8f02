"""The learning rate at the points that define it."""

import math

import pytest

from conceptron.engine.schedule import learning_rate

SHAPE = {"lr": 2.0, "warmup_steps": 4, "total_steps": 21, "min_lr_ratio": 0.1}


def test_warms_up_in_a_line_to_the_peak():
    assert [learning_rate(step, **SHAPE) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]


def test_follows_a_cosine_to_the_last_step():
    assert learning_rate(4, **SHAPE) == 2.0
    assert learning_rate(12, **SHAPE) == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # half way down
    assert learning_rate(8, **SHAPE) == pytest.approx(2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi / 4))))
    assert learning_rate(20, **SHAPE) == pytest.approx(0.2)
    rates = [learning_rate(step, **SHAPE) for step in range(4, 21)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == len(rates)


@pytest.mark.parametrize("warmup, total", [(0, 1), (1, 1), (5, 5), (9, 5), (0, 2)])
def test_degenerate_lengths_stay_in_bounds(warmup, total):
    for step in range(total):
        rate = learning_rate(step, lr=1.0, warmup_steps=warmup, total_steps=total, min_lr_ratio=0.0)
        assert 0.0 <= rate <= 1.0
