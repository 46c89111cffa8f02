"""Stages of length, and what a loader adds to the views of a step."""

import numpy as np
import pytest

from conceptron.engine.data.loader import Loader
from conceptron.engine.data.stages import Stages
from conceptron.engine.data.windows import Part, Windows, cut
from conceptron.models.objectives import TSDAE, Contrastive, MaskedLM, Mixed, SpecialTokens

TOKENS = SpecialTokens(1, frozenset({0, 1}), 5000)
OFFSETS = np.array([0, 30, 30, 100, 160, 163, 240])
TEXT = np.arange(5, 245).astype(np.uint16)  # all tokens differ


def windows(longest: int, weight: float = 1.0) -> Part:
    starts, lengths = cut(OFFSETS, np.arange(6), longest)
    return Part(TEXT, starts, lengths, weight, np.searchsorted(OFFSETS, starts, side="right") - 1)


def loader(longest: int, first_step: int = 0, **options) -> Loader:
    fields = dict(objective=MaskedLM(), tokens=TOKENS, seed=4, tokens_per_step=80, micro_tokens=40) | options
    return Loader(Windows([windows(longest)]), first_step=first_step, **fields)


def test_each_stage_reads_its_windows_from_the_beginning_of_their_order():
    stages = Stages([loader(8), loader(16, 5), loader(40, 9)])
    alone = {0: loader(8), 5: loader(16), 9: loader(40)}
    for step in range(14):
        first = max(start for start in alone if start <= step)
        assert stages.at(step).first_step == first
        expected = alone[first].samples(step - first).windows
        assert stages.windows(step) == expected.tolist()
        assert stages.num_tokens(step) == alone[first].windows.lengths[expected].sum()
        ours, theirs = stages.step(step), alone[first].step(step - first)
        assert all(a.encoder.input_ids.equal(b.encoder.input_ids) for a, b in zip(ours, theirs, strict=True))
    ahead = list(stages.prefetch(3, 11))
    assert len(ahead) == 8
    for step, views in zip(range(3, 11), ahead, strict=True):
        assert views[0].targets.equal(stages.step(step)[0].targets)


def test_windows_know_their_document():
    both = Windows([windows(16), windows(40)])
    documents = both.documents(np.arange(len(both)))
    for row, document in enumerate(documents):
        part, number = document >> 40, document & (1 << 40) - 1
        assert part == (row >= both.bounds[1])
        assert OFFSETS[number] <= both[row][0] - 5 < OFFSETS[number + 1]
    assert len(set(documents)) == 2 * 5  # one of the six is empty
    assert Windows([Part(TEXT, *cut(OFFSETS, np.arange(6), 16))]).documents(np.arange(3)) is None


def test_windows_come_together_as_they_come_one_by_one():
    both = Windows([windows(16), windows(40)])
    for rows in ([7, 0, len(both) - 1, 3, 3], [2], []):
        ids, lengths = both.ids(np.array(rows, dtype=np.int64))
        assert np.split(ids, np.cumsum(lengths)[:-1])[0].tolist() == (both[rows[0]].tolist() if rows else [])
        assert ids.tolist() == [token for row in rows for token in both[row].tolist()] and ids.dtype == np.int64
        assert lengths.tolist() == [len(both[row]) for row in rows]


def test_pairs_come_with_their_step_and_windows_of_a_document_are_no_negatives():
    term = Contrastive("deletion")
    mixed = Mixed((TSDAE(), MaskedLM()), (1, 1), ("a", "b"))
    made = loader(16, objective=mixed, contrastive=term, contrastive_from=3, tokens_per_step=240, micro_tokens=240)
    for step in range(8):
        (view,) = made.step(step)
        assert (view.pair is None) == (step < 3)
        if view.pair:
            assert view.pair.shares_encoder == (mixed.place(step) == 0)
            rows = made.samples(step).windows
            assert view.pair.texts.num_sequences == len(rows) * (1 if view.pair.shares_encoder else 2)
            assert sorted(view.pair.ids.tolist()) == sorted(made.windows.documents(rows))


@pytest.mark.parametrize("pairs", ["dropout", "overlapping"])
def test_held_out_pairs_are_never_two_equal_texts(pairs):
    made = loader(40, contrastive=Contrastive(pairs))
    for pair, _ in made.evaluation_pairs(200):
        bounds, count = pair.texts.cu_seqlens.tolist(), len(pair.ids)
        for i in range(count):
            a, b = (pair.texts.input_ids[bounds[j] : bounds[j + 1]].tolist() for j in (i, i + count))
            assert a != b or len(a) < 3
    assert sum(len(pair.ids) for pair, _ in made.evaluation_pairs(200)) == len(made.evaluation_rows(200))
