import math

import pytest

from conceptron.engine.optimizing.schedule import learning_rate
from conceptron.engine.recipe.schema import Optim

COSINE = Optim(lr=2.0, warmup_steps=4, min_lr_ratio=0.1)
WSD = Optim(lr=2.0, warmup_steps=4, min_lr_ratio=0.1, schedule="wsd", decay=0.25)


@pytest.mark.parametrize("optim", [COSINE, WSD])
def test_warms_up_in_a_line_to_the_peak(optim):
    assert [learning_rate(step, optim, 21) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]


def test_follows_a_cosine_to_the_last_step():
    assert learning_rate(4, COSINE, 21) == 2.0
    assert learning_rate(12, COSINE, 21) == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # half way down
    assert learning_rate(8, COSINE, 21) == pytest.approx(2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi / 4))))
    assert learning_rate(20, COSINE, 21) == pytest.approx(0.2)
    rates = [learning_rate(step, COSINE, 21) for step in range(4, 21)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == len(rates)


def test_stays_at_the_peak_and_falls_at_the_end():
    rates = [learning_rate(step, WSD, 40) for step in range(40)]
    assert rates[4:31] == [2.0] * 27 and rates[39] == pytest.approx(0.2)
    assert rates[33] == pytest.approx(2.0 * (0.1 + 0.9 * (1 - math.sqrt(1 / 3))))  # 3 of the 9 steps from 30 to 39
    longer = [learning_rate(step, WSD, 80) for step in range(60)]
    assert longer[:31] == rates[:31]  # a run may be made longer until it begins to fall


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup, total", [(0, 1), (1, 1), (5, 5), (9, 5), (0, 2)])
def test_degenerate_lengths_stay_in_bounds(warmup, total, schedule):
    optim = Optim(lr=1.0, warmup_steps=warmup, min_lr_ratio=0.0, schedule=schedule)
    for step in range(total):
        assert 0.0 <= learning_rate(step, optim, total) <= 1.0
