"""Which tokens are targets: words and spans as wholes, budgets, rates, lengths, placement."""

import math

import numpy as np
import pytest

from conceptron.models.objectives import MaskedLM, SampleKey, SpecialTokens, View
from conceptron.models.objectives.masking import SPANS, Masking, take
from conceptron.models.objectives.view import ENDS_WORD, OPENS_WORD, Text, clean_text
from conceptron.models.objectives.words import word_starts
from conceptron.models.packing import pack

# 0 to 3 special; 4 to 19 open a word; 20 to 39 go on with it; 40 to 49 stand alone, as punctuation does
VOCAB = 50
EDGES = bytes([OPENS_WORD | ENDS_WORD] * 4 + [OPENS_WORD] * 16 + [0] * 20 + [OPENS_WORD | ENDS_WORD] * 10)
TOKENS = SpecialTokens(mask_id=3, special_ids=frozenset({0, 1, 2, 3}), vocab_size=VOCAB, word_edges=EDGES)
EVERY = [
    MaskedLM(masking="whole_word", random=0.1, unchanged=0.1), MaskedLM(masking="span"),
    MaskedLM(masking="span", span="geometric", random=0.1, unchanged=0.1, probability=0.15),
    MaskedLM(masking="span", span="poisson", hidden="mask"),
]  # fmt: skip


def keys(count: int) -> list[SampleKey]:
    return [SampleKey(5, 0, i) for i in range(count)]


def written(lengths=(37, 0, 1, 80, 6), seed=0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(4, VOCAB, size=n) for n in lengths]
    for ids in sequences:
        if len(ids) > 5:
            ids[0], ids[4], ids[-1] = 1, 2, 2
    return sequences


def words_by_hand(ids: np.ndarray) -> list[list[int]]:
    """Rows of each word, one token at a time."""
    words: list[list[int]] = []
    for row, token in enumerate(ids.tolist()):
        goes_on = 20 <= token < 40 and row > 0 and 4 <= ids[row - 1] < 40
        if goes_on:
            words[-1].append(row)
        else:
            words.append([row])
    return [word for word in words if ids[word[0]] > 3]


def rows_of(view: View, b: int) -> list[int]:
    return view.decoder_position_ids[slice(*view.decoder_cu_seqlens[b : b + 2].tolist())].tolist()


def read(sequences: list[np.ndarray]) -> Text:
    return clean_text(pack(sequences), keys(len(sequences)), TOKENS)


@pytest.mark.parametrize("objective", EVERY, ids=lambda o: f"{o.masking}-{o.span}")
def test_a_choice_depends_on_key_and_text_of_its_own_sequence_only(objective):
    sequences, names = written(), keys(5)
    whole, again = (objective.view(pack(sequences), names, TOKENS) for _ in range(2))
    order = [3, 0, 4]
    part = objective.view(pack([sequences[i] for i in order]), [names[i] for i in order], TOKENS)
    for place, i in enumerate(order):
        asked, asked_alone = (
            slice(*view.decoder_cu_seqlens[b : b + 2].tolist()) for view, b in ((whole, i), (part, place))
        )
        assert asked.stop > asked.start or len(sequences[i]) < 10
        for field in ("decoder_position_ids", "decoder_input_ids", "targets", "seen"):
            of_whole, of_again, of_part = (getattr(view, field) for view in (whole, again, part))
            assert of_whole[asked].tolist() == of_again[asked].tolist() == of_part[asked_alone].tolist()
    others = [name._replace(epoch=1) for name in names]
    other = objective.view(pack(sequences), others, TOKENS)
    assert rows_of(other, 3) != rows_of(whole, 3)
    assert not set(whole.targets.tolist()) & TOKENS.special_ids


def test_words_against_a_reading_token_by_token():
    sequences = written((200, 0, 1, 50))
    starts = word_starts(read(sequences), TOKENS)
    first = 0
    for ids in sequences:
        found = np.flatnonzero(starts[first : first + len(ids)])
        by_hand = {word[0] for word in words_by_hand(ids)} | set(np.flatnonzero(ids <= 3).tolist())
        assert set(found.tolist()) == by_hand
        first += len(ids)


def test_words_are_hidden_replaced_or_kept_as_wholes():
    sequences = written((300,) * 40)
    objective = MaskedLM(probability=0.4, masking="whole_word", random=0.3, unchanged=0.3)
    view = objective.view(pack(sequences), keys(40), TOKENS)
    fates, longest = np.zeros(3), 0
    for b, ids in enumerate(sequences):
        asked = slice(*view.decoder_cu_seqlens[b : b + 2].tolist())
        given = dict(zip(rows_of(view, b), view.decoder_input_ids[asked].tolist(), strict=True))
        seen = dict(zip(rows_of(view, b), view.seen[asked].tolist(), strict=True))
        for word in words_by_hand(ids):
            inside = [row in given for row in word]
            assert all(inside) or not any(inside)
            if all(inside):
                kinds = {0 if given[row] == TOKENS.mask_id else 2 if seen[row] else 1 for row in word}
                assert len(kinds) == 1
                fates[kinds.pop()] += 1
                longest = max(longest, len(word))
    assert longest >= 5
    n = fates.sum()
    assert np.abs(fates / n - [0.4, 0.3, 0.3]).max() < 4 * math.sqrt(0.25 / n)


def test_each_unit_is_taken_with_the_same_chance_and_the_budget_is_met():
    """However long it is: also one that is longer than the whole budget."""
    g, sizes = np.random.default_rng(0), np.array([1, 1, 9, 2, 1, 3, 1, 6])
    for probability in (0.15, 0.7):
        taken = np.stack([take(sizes, probability, g) >= 0 for _ in range(10000)])
        error = 4.5 * math.sqrt(probability * (1 - probability) / 10000)
        assert np.abs(taken.mean(0) - probability).max() < error
        assert np.abs(taken @ sizes - probability * sizes.sum()).max() < 9 + 6
    assert (take(sizes, 1.0, g) >= 0).all()


@pytest.mark.parametrize("masking", ["whole_word", "span"])
def test_rates(masking):
    sequences = written((400,) * 100)
    text = read(sequences)
    for probability in (0.15, 0.3, 1.0):
        chosen = Masking(masking).choose(probability, text, keys(100), TOKENS, 0).is_target
        per_text = chosen.reshape(100, 400).sum(1)
        expected = probability * 397
        assert abs(per_text.mean() - expected) < 4 * per_text.std() / 10 + 1e-9
        if masking == "span":
            assert set(per_text.tolist()) <= {math.floor(expected), math.ceil(expected)}


def layout(span: str, num_items: int, probability: float, repeats: int) -> list[np.ndarray]:
    g, masking = np.random.default_rng(1), Masking("span", span)
    return [masking.spans(num_items, probability, g) for _ in range(repeats)]


@pytest.mark.parametrize("span, mean, low, high", [("uniform", 6.5, 3, 10), ("geometric", 3.797, 1, 10)])
def test_span_lengths(span, mean, low, high):
    """Mean and range of the drawn lengths; the last span of each text is cut and not counted."""
    sizes = np.concatenate([np.bincount(x[x >= 0])[:-1] for x in layout(span, 20000, 0.15, 20)])
    assert abs(sizes.mean() - mean) < 4 * sizes.std() / math.sqrt(len(sizes))
    assert sizes.min() == low and sizes.max() == high
    if span == "geometric":  # P(1) : P(2) = 1 : 0.8
        ones, twos = np.count_nonzero(sizes == 1), np.count_nonzero(sizes == 2)
        assert abs(twos / (ones + twos) - 0.8 / 1.8) < 4 * math.sqrt(0.25 / (ones + twos))


def test_poisson_lengths_against_scipy():
    from scipy.stats import poisson

    sizes = np.concatenate([np.bincount(x[x >= 0])[:-1] for x in layout("poisson", 20000, 0.3, 20)])
    expected = poisson(3).pmf(np.arange(1, 11))
    expected /= expected.sum()
    observed = np.bincount(sizes, minlength=11)[1:] / len(sizes)
    assert np.abs(observed - expected).max() < 4 * math.sqrt(0.25 / len(sizes))
    assert SPANS["poisson"].argmax() in (1, 2)


@pytest.mark.parametrize("span", sorted(SPANS))
def test_spans_are_contiguous_on_a_circle_and_exactly_as_many_as_asked(span):
    for num_items, probability in ((50, 0.3), (7, 0.5), (1, 0.9), (0, 0.5), (30, 1.0)):
        for x in layout(span, num_items, probability, 50):
            assert len(x) == num_items
            budget = probability * num_items
            assert math.floor(budget) <= np.count_nonzero(x >= 0) <= math.ceil(budget)
            for name in set(x[x >= 0].tolist()):
                inside = x == name
                assert np.count_nonzero(inside & ~np.roll(inside, 1)) <= 1  # one beginning, or the whole circle


def test_every_place_is_hidden_equally_often():
    """At the ends too, where placement on a line would hide a fifth of what it hides in the middle."""
    covered = np.stack([x >= 0 for x in layout("uniform", 40, 0.3, 6000)]).mean(0)
    assert np.abs(covered - 0.3).max() < 4.5 * math.sqrt(0.21 / 6000)


def test_geometric_spans_are_made_of_whole_words():
    sequences = written((300,) * 10)
    view = MaskedLM(masking="span", span="geometric", probability=0.3).view(pack(sequences), keys(10), TOKENS)
    for b, ids in enumerate(sequences):
        rows, words = set(rows_of(view, b)), words_by_hand(ids)
        whole = [word for word in words if set(word) <= rows]
        assert sum(map(len, whole)) == len(rows)
        assert len(whole) in (math.floor(0.3 * len(words)), math.ceil(0.3 * len(words)))


def test_a_span_has_one_fate():
    """Neighbours that are both asked for belong to one span or to two; fates change only where a span ends."""
    sequences = written((2000,) * 5)
    text = read(sequences)
    targets = Masking("span").choose(0.3, text, keys(5), TOKENS, 0)
    sizes = np.bincount(targets.leader[targets.is_target])
    sizes = sizes[sizes > 0]
    assert sizes.max() <= 10 and 6 < sizes.mean() < 7
    assert (targets.leader[~targets.is_target] == np.flatnonzero(~targets.is_target)).all()
    view = MaskedLM(masking="span", random=0.5).view(pack(sequences), keys(5), TOKENS)
    hidden = np.zeros(len(text.ids), dtype=bool)
    hidden[targets.is_target] = view.decoder_input_ids.numpy() == TOKENS.mask_id
    assert (hidden == hidden[targets.leader])[targets.is_target].all()
    assert 0.4 < hidden[targets.is_target].mean() < 0.6


def test_refusals():
    with pytest.raises(ValueError, match=r"^masking: expected one of random, whole_word, span, pmi, got 'words'"):
        MaskedLM(masking="words")
    with pytest.raises(ValueError, match=r"^span: expected one of uniform, poisson, geometric, got 'long'"):
        MaskedLM(masking="span", span="long")
    with pytest.raises(ValueError, match=r"^phrases: expected a file of phrases with masking 'pmi'.* got None"):
        MaskedLM(masking="pmi")
    with pytest.raises(ValueError, match=r"^phrases: .* got 'list.json'"):
        MaskedLM(masking="random", phrases="list.json")
    with pytest.raises(ValueError, match=r"^word_edges: .*does not tell where words begin"):
        MaskedLM(masking="whole_word").view(pack([[4, 5]]), keys(1), TOKENS._replace(word_edges=None))
    MaskedLM(masking="span").view(pack([[4, 5]]), keys(1), TOKENS._replace(word_edges=None))  # needs no words
