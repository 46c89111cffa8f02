"""Windows, the deal, and the order of training: nothing lost, nothing twice, the same for every world."""

import numpy as np
import pytest

from conceptron.engine.data.loader import Loader
from conceptron.engine.data.mixture import Schedule
from conceptron.engine.data.order import Stream, deal, fewest_bins
from conceptron.engine.data.windows import Part, Windows, cut, unigram_entropy
from conceptron.engine.errors import InputError
from conceptron.models.objectives import OBJECTIVES
from conceptron.models.objectives.view import SpecialTokens

TOKENS = SpecialTokens(mask_id=1, special_ids=frozenset({0, 1}), vocab_size=65536)
LONGEST = 32


class Recorder:
    """An objective that hands back what it was given."""

    def view(self, batch, keys, tokens):
        assert batch.num_sequences == len(keys)
        return batch, keys

    def evaluation_views(self, batch, keys, tokens):
        return {"all": (batch, keys)}


def make_part(num_documents, *, longest=90, seed=0, weight=1.0, first_token=10):
    """Documents of random length whose tokens all differ."""
    lengths = np.random.default_rng(seed).integers(1, longest, num_documents)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = (first_token + np.arange(offsets[-1])).astype(np.uint16)
    return Part(tokens, *cut(offsets, np.arange(num_documents), LONGEST), weight)


def make_loader(windows, *, tokens_per_step=256, micro_tokens=64, **options):
    options = {"seed": 3, **options}
    return Loader(
        windows, options.pop("objective", Recorder()), TOKENS, tokens_per_step=tokens_per_step,
        micro_tokens=micro_tokens, **options,
    )  # fmt: skip


def contents(batch, keys):
    """{key: ids} of a packed batch."""
    parts = np.split(batch.input_ids.numpy(), batch.cu_seqlens.numpy()[1:-1])
    return dict(zip(keys, map(tuple, parts if keys else []), strict=True))


# --- windows


@pytest.mark.parametrize("window", [8, 9, 64, 1000])
def test_windows_are_the_documents_cut_without_a_gap(window):
    lengths = np.array([1, 64, 65, 63, 0, 700, 8])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(offsets[-1], dtype=np.uint32)
    chosen = np.array([5, 0, 2, 4])
    windows = Windows([Part(tokens, *cut(offsets, chosen, window))])
    read = np.concatenate([windows[i] for i in range(len(windows))])
    np.testing.assert_array_equal(read, np.concatenate([tokens[offsets[d] : offsets[d + 1]] for d in chosen]))
    expected = [n for d in chosen for n in [window] * (lengths[d] // window) + [lengths[d] % window] if n]
    assert windows.lengths.tolist() == expected
    assert windows.num_tokens == len(read) and read.dtype == np.int64


def test_windows_of_several_parts_are_numbered_through():
    parts = [make_part(3), make_part(1, seed=1, first_token=5000), make_part(4, seed=2, first_token=7000)]
    windows = Windows(parts)
    alone = [w[i] for w in (Windows([part]) for part in parts) for i in range(len(w))]
    assert len(windows) == len(alone)
    for i, ids in enumerate(alone):
        np.testing.assert_array_equal(windows[i], ids)
        assert windows.lengths[i] == len(ids)
    with pytest.raises(IndexError):
        windows[len(windows)]
    with pytest.raises(IndexError):
        windows[-1]


def test_unigram_entropy():
    tokens = np.array([5] * 4 + [6] * 2 + [7] * 2 + [1] * 100 + [9] * 50, dtype=np.uint16)
    windows = Windows([Part(tokens, np.array([0, 6, 8, 108]), np.array([6, 2, 100, 50], dtype=np.int32))])
    assert unigram_entropy(windows, np.array([0, 1]), TOKENS.special_ids) == pytest.approx(1.5 * np.log(2))
    # the 100 special tokens of window 2 change nothing
    assert unigram_entropy(windows, np.array([0, 1, 2]), TOKENS.special_ids) == pytest.approx(1.5 * np.log(2))
    assert unigram_entropy(windows, np.array([0, 1, 2])) != pytest.approx(1.5 * np.log(2))


# --- the deal


@pytest.mark.parametrize("num_bins", [1, 3, 16, 50])
@pytest.mark.parametrize("kind", ["equal", "ragged", "few_long"])
def test_deal_is_balanced(kind, num_bins):
    random = np.random.default_rng(1)
    lengths = {
        "equal": np.full(200, 32),
        "ragged": random.integers(1, 33, 500),
        "few_long": np.where(random.random(700) < 0.05, 4096, random.integers(1, 50, 700)),
    }[kind]
    for order in (None, random.permutation(len(lengths))):
        bins, loads = deal(lengths, num_bins, order)
        np.testing.assert_array_equal(loads, np.bincount(bins, lengths, num_bins))
        assert loads.max() <= lengths.sum() / num_bins + lengths.max()
    if kind == "ragged" and num_bins < 50:  # longest first, what is left over is a short window
        loads = deal(lengths, num_bins)[1]
        assert np.ptp(loads) <= 8


@pytest.mark.parametrize("capacity", [4096, 5000, 40960])
def test_fewest_bins_fit_and_are_few(capacity):
    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 1.5, 3000).astype(int) + 1, 4096)
    num_bins = fewest_bins(lengths, capacity)
    assert deal(lengths, num_bins)[1].max() <= capacity
    assert num_bins <= 1.05 * lengths.sum() / capacity + 1


# --- one epoch


def test_an_epoch_holds_every_window_once_within_the_budget():
    windows = Windows([make_part(400)])
    loader = make_loader(windows)
    for epoch in range(3):
        steps = range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch)
        samples = [loader.samples(step) for step in steps]
        assert sorted(np.concatenate([s.windows for s in samples]).tolist()) == list(range(len(windows)))
        assert np.concatenate([s.places for s in samples]).tolist() == list(range(len(windows)))
        assert all((s.epochs == epoch).all() for s in samples)
        tokens = [windows.lengths[s.windows].sum() for s in samples]
        assert max(tokens) <= loader.tokens_per_step
        assert min(tokens) >= 0.8 * loader.tokens_per_step
        assert np.mean(tokens) / loader.tokens_per_step == pytest.approx(loader.efficiency)
    assert loader.efficiency > 0.95


def test_epochs_and_seeds_differ_in_what_meets():
    windows = Windows([make_part(400)])
    loader, other = make_loader(windows), make_loader(windows, seed=4)
    first = set(loader.samples(0).windows)
    second = [set(loader.samples(loader.steps_per_epoch + step).windows) for step in range(loader.steps_per_epoch)]
    assert max(len(first & later) for later in second) < len(first) / 2
    assert set(other.samples(0).windows) != first
    assert loader.samples(0).windows.tolist() == make_loader(windows).samples(0).windows.tolist()


def test_a_step_does_not_depend_on_what_was_asked_before():
    windows = Windows([make_part(60)])
    straight = make_loader(windows)
    steps = range(5 * straight.steps_per_epoch)
    expected = [straight.samples(step) for step in steps]
    jumping = make_loader(windows)
    for step in np.random.default_rng(0).permutation(len(steps)):
        for got, want in zip(jumping.samples(int(step)), expected[step], strict=True):
            np.testing.assert_array_equal(got, want)


def test_order_is_pinned():
    # a change of these numbers breaks the resumption of every run that began before it
    lengths = np.array([5, 30, 12, 32, 32, 7, 19, 32, 1, 26, 32, 14], dtype=np.int32)
    part = Part(np.zeros(lengths.sum(), np.uint16), np.cumsum(lengths) - lengths, lengths)
    stream = Stream(Windows([part]), 0, capacity=64, seed=7)
    assert [stream.bin(number).windows.tolist() for number in range(2 * stream.num_bins)] == PINNED


PINNED = [
    [0, 4, 9], [3, 5, 6, 8], [2, 10, 11], [1, 7],
    [1, 3], [0, 5, 6, 7], [4, 9], [2, 8, 10, 11],
]  # fmt: skip


# --- ranks and micro-batches


@pytest.mark.parametrize(("world_size", "micro_tokens"), [(1, 256), (1, 64), (2, 64), (4, 32), (3, 100), (16, 32)])
def test_the_step_is_the_same_for_every_world(world_size, micro_tokens):
    windows = Windows([make_part(100)])
    whole = make_loader(windows, micro_tokens=256)
    ranks = [
        make_loader(windows, micro_tokens=micro_tokens, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for step in (0, 1, whole.steps_per_epoch, 3 * whole.steps_per_epoch - 1):
        expected = contents(*whole.step(step)[0])
        together, loads = {}, []
        for loader in ranks:
            views = loader.step(step)
            assert len(views) == loader.num_micro_batches == -(-256 // (world_size * micro_tokens))
            for batch, keys in views:
                found = contents(batch, keys)
                assert not found.keys() & together.keys()
                assert [key.index for key in keys] == sorted(key.index for key in keys)
                together |= found
                loads.append(batch.num_tokens)
        assert {key: together[key] for key in sorted(together)} == {key: expected[key] for key in sorted(expected)}
        assert max(loads) <= micro_tokens + LONGEST
        assert max(loads) - min(loads) <= LONGEST


def test_text_smaller_than_a_step_leaves_empty_micro_batches():
    windows = Windows([make_part(2, longest=12)])
    views = make_loader(windows, objective=OBJECTIVES["mlm"](), micro_tokens=32).step(0)
    assert len(views) == 8
    assert sorted(view.encoder.num_sequences for view in views) == [0] * 6 + [1] * 2


def test_prefetch_changes_nothing():
    windows = Windows([make_part(50)])
    loader = make_loader(windows)
    stop = 2 * loader.steps_per_epoch + 1
    ahead = list(make_loader(windows).prefetch(1, stop))
    assert len(ahead) == stop - 1
    for step, views in zip(range(1, stop), ahead, strict=True):
        assert [contents(*view) for view in views] == [contents(*view) for view in loader.step(step)]


def test_prefetch_passes_errors_on():
    class Broken(Recorder):
        def view(self, batch, keys, tokens):
            raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="broken on purpose"):
        list(make_loader(Windows([make_part(9)]), objective=Broken()).prefetch(0, 3))


@pytest.mark.parametrize("field", ["tokens_per_step", "micro_tokens"])
def test_a_budget_smaller_than_a_window_is_refused(field):
    name = {"tokens_per_step": "batch.tokens", "micro_tokens": "batch.micro_tokens"}[field]
    with pytest.raises(InputError, match=rf"{name}: .*longest window, 32 tokens, got 31; raise {name} or lower"):
        make_loader(Windows([make_part(50)]), **{field: 31})


# --- evaluation


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_reads_a_fixed_part_of_the_windows(world_size):
    windows = Windows([make_part(200)])
    together, counts = {}, []
    for rank in range(world_size):
        loader = make_loader(windows, rank=rank, world_size=world_size, seed=rank)
        views = list(loader.evaluation(1000))
        counts.append(len(views))
        for view in views:
            batch, keys = view["all"]
            assert batch.num_tokens <= loader.micro_tokens
            together |= contents(batch, keys)
    rows = make_loader(windows, seed=99).evaluation_rows(1000)
    assert len(set(counts)) == 1
    assert [together[key] for key in sorted(together)] == [tuple(windows[row]) for row in rows]
    assert 1000 - LONGEST < windows.lengths[rows].sum() <= 1000
    longer = make_loader(windows).evaluation_rows(2000)
    np.testing.assert_array_equal(longer[: len(rows)], rows)
    assert len(make_loader(windows).evaluation_rows(10**9)) == len(windows)


# --- mixtures


def test_schedule_keeps_the_weights_in_every_run_of_slots():
    schedule = Schedule([0.7, 0.2, 0.1], windows_per_step=40)
    assert schedule.slots_per_step == 10
    slots = [slot for step in range(350) for slot in schedule.slots(step)]
    sources = np.array([source for source, _ in slots])
    for source, share in enumerate((0.7, 0.2, 0.1)):
        numbers = [number for which, number in slots if which == source]
        assert numbers == list(range(len(numbers)))
        taken = np.cumsum(sources == source)
        assert np.abs(taken - share * np.arange(1, len(slots) + 1)).max() < 1.5
    assert schedule.slots(349) == slots[-10:]


def test_mixture_keeps_the_shares_and_the_epochs_of_each_source():
    big, small = make_part(900), make_part(60, seed=1, weight=3.0, first_token=50000)
    windows = Windows([big, small])
    loader = make_loader(windows, tokens_per_step=1024)
    tokens, seen = np.zeros(2), []
    for step in range(60):
        samples = loader.samples(step)
        from_small = samples.windows >= windows.bounds[1]
        tokens += [windows.lengths[samples.windows[mask]].sum() for mask in (~from_small, from_small)]
        assert windows.lengths[samples.windows].sum() <= 1024
        picked = samples.take(np.flatnonzero(from_small))
        seen += list(zip(picked.epochs, picked.windows, picked.places, strict=True))
    assert tokens[1] / tokens.sum() == pytest.approx(0.75, abs=0.03)
    assert len(set(seen)) == len(seen)
    last = max(epoch for epoch, _, _ in seen)
    assert last >= 3
    for epoch in range(last):
        assert sorted(window for e, window, _ in seen if e == epoch) == list(range(windows.bounds[1], len(windows)))
        assert [place for e, _, place in seen if e == epoch] == list(range(windows.bounds[1], len(windows)))
