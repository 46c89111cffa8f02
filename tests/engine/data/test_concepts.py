"""How many concepts the texts of a micro-batch are read into: by its longest text, a ratio of the step, or a stage."""

from itertools import chain

import numpy as np
import pytest

from conceptron.engine.data.concepts import Drawn, Fixed, fitting, largest
from conceptron.engine.data.loader import Loader
from conceptron.engine.data.order import deal_by_length
from conceptron.engine.data.windows import Part, Windows, cut
from conceptron.models.objectives import TSDAE, SpecialTokens

TOKENS = SpecialTokens(1, frozenset({0, 1}), 5000)


def loader(**options) -> Loader:
    lengths = np.random.default_rng(0).integers(3, 65, size=60)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    text = np.arange(5, 5 + offsets[-1]).astype(np.uint16)
    windows = Windows([Part(text, *cut(offsets, np.arange(60), 64))])
    fields = dict(seed=3, tokens_per_step=500, micro_tokens=150, by_length=True) | options
    return Loader(windows, TSDAE(), TOKENS, **fields)


def test_one_concept_for_so_many_tokens():
    assert [fitting(n, 4, 8) for n in (0, 1, 4, 5, 31, 33, 1000)] == [1, 1, 1, 2, 8, 8, 8]
    assert fitting(10, 2.5, 8) == 4 and largest([16, 64], [8, 3]) == 22


def test_every_ratio_is_drawn_about_as_often_and_each_is_a_function_of_seed_and_step():
    drawn = Drawn((2, 4, 8), 99, seed=5)
    found = [drawn.ratio(step) for step in range(600)]
    assert found == [Drawn((2, 4, 8), 99, seed=5).ratio(step) for step in range(600)]
    assert found != [Drawn((2, 4, 8), 99, seed=6).ratio(step) for step in range(600)]
    assert all(170 < found.count(ratio) < 230 for ratio in (2, 4, 8))
    assert drawn.at(7, 64) == 64 / found[7] and Drawn((16,), 99, 0).ratio(3) == 16 and Fixed(5).at(3, 999) == 5


def test_ranks_have_the_ratio_of_the_step_and_their_own_longest_text():
    drawn = Drawn((2, 8), 32, seed=1)
    ratios = {2: 0, 8: 0}
    for step in range(6):
        ratio = drawn.ratio(step)
        ratios[ratio] += 1
        for rank in range(2):
            for view in loader(rank=rank, world_size=2, concepts=drawn).step(step):
                longest = int(view.encoder.num_positions().max()) if view.encoder.num_sequences else 0
                assert view.num_concepts == fitting(longest, ratio, 32)  # of the text before any of it was deleted
    assert min(ratios.values()) > 0
    assert all(view.num_concepts is None for views in loader().evaluation(500) for view in views.values())


def test_micro_batches_of_similar_lengths_hold_the_same_step():
    plain, sorted_ = loader(by_length=False), loader()
    for step in range(5):
        texts = [[view.encoder.num_positions().tolist() for view in made.step(step)] for made in (plain, sorted_)]
        assert sorted(chain(*texts[0])) == sorted(chain(*texts[1]))
        assert all(min(a) >= max(b) for a, b in zip(texts[1], texts[1][1:], strict=False) if a and b)
        spread = [max(max(each) - min(each) for each in found if each) for found in texts]
        assert spread[1] < spread[0]


@pytest.mark.parametrize("num_bins", [1, 3, 7])
def test_no_micro_batch_by_length_is_longer_than_its_share_and_a_window(num_bins):
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(1, 100, size=40).astype(np.int32)
        bins, loads = deal_by_length(lengths, num_bins)
        assert loads.tolist() == [int(lengths[bins == i].sum()) for i in range(num_bins)]
        assert loads.max() <= lengths.sum() / num_bins + lengths.max()
    assert deal_by_length(np.zeros(0, dtype=np.int32), num_bins)[1].tolist() == [0] * num_bins
