"""Mixtures: shares, evenness, what a step is trained on; and no objective at all."""

import numpy as np
import pytest

from conceptron.models.objectives import TSDAE, Diffusion, MaskedLM, Mixed, NoTask, SampleKey, SpecialTokens
from conceptron.models.packing import pack

TOKENS = SpecialTokens(1, frozenset({0, 1}), 50)
PARTS = (MaskedLM(), TSDAE(), Diffusion())


def mixed(*weights: float) -> Mixed:
    return Mixed(PARTS[: len(weights)], weights, tuple("abc"[: len(weights)]))


@pytest.mark.parametrize("weights", [(1, 1), (0.5, 0.3, 0.2), (9, 1), (1, 2, 50)])
def test_every_run_of_steps_holds_each_part_in_proportion(weights):
    places = np.array([mixed(*weights).place(step) for step in range(3000)])
    taken = np.cumsum(places[:, None] == np.arange(len(weights)), axis=0)
    for start, stop in ((0, 50), (0, 3000), (137, 1137), (2950, 2999)):
        counts = taken[stop - 1] - (taken[start - 1] if start else 0)
        assert np.abs(counts - (stop - start) * np.array(weights) / sum(weights)).max() < 4, (start, stop)


def test_two_equal_parts_nearly_take_turns():
    places = "".join(str(mixed(1, 1).place(step)) for step in range(200))
    assert "000" not in places and "111" not in places


def test_a_step_is_independent_of_the_times_of_its_texts():
    """With one text a step, diffusion must not meet the same half of its times only."""
    times = []
    for step in range(2000):
        if mixed(1, 1).place(step) == 0:
            view = Diffusion().view(pack([[5, 6]]), [SampleKey(0, 0, step)], TOKENS)
            times.append(float(view.timesteps[0]))
    counts, _ = np.histogram(times, bins=10, range=(0, 1))
    assert counts.min() > 0.8 * len(times) / 10 and counts.max() < 1.2 * len(times) / 10


def test_it_is_one_part_at_a_time_and_evaluated_by_part():
    batch, keys = pack([list(range(5, 25))]), [SampleKey(0, 0, 0)]
    both = mixed(1, 1)
    assert {type(both.at(step)) for step in range(9)} == {MaskedLM, TSDAE}
    names = both.evaluation_views(batch, keys, TOKENS)
    assert next(iter(names)) == "a/mask=0.15" and "b/delete=0.60" in names
    alone = TSDAE().evaluation_views(batch, keys, TOKENS)["delete=0.60"]
    assert names["b/delete=0.60"].encoder.input_ids.tolist() == alone.encoder.input_ids.tolist()


@pytest.mark.parametrize("parts, weights, names, word", [
    ((MaskedLM(),), (1,), ("a",), "parts"), ((MaskedLM(), TSDAE()), (1, 0), ("a", "b"), "weights"),
    ((MaskedLM(), TSDAE()), (1,), ("a", "b"), "weights"), ((MaskedLM(), TSDAE()), (1, 1), ("a", "a"), "names"),
])  # fmt: skip
def test_wrong_mixtures_are_refused(parts, weights, names, word):
    with pytest.raises(ValueError, match=f"^{word}: expected"):
        Mixed(parts, weights, names)


def test_no_task_asks_for_nothing():
    batch = pack([[4, 5, 6], [7]])
    view = NoTask().view(batch, [SampleKey(0, 0, i) for i in range(2)], TOKENS)
    assert view.num_targets == 0 and float(view.divisor) == 0 and view.encoder is batch
    assert view.decoder_cu_seqlens.tolist() == [0, 0, 0]
    assert NoTask().evaluation_views(batch, [], TOKENS) == {}
