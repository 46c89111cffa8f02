"""Phrases: counted by hand, found against a plain search, joined longest first, saved and read back."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from conceptron.models.objectives import MaskedLM, SampleKey, SpecialTokens, pmi
from conceptron.models.objectives.view import OPENS_WORD
from conceptron.models.packing import pack

# 0 is special; 1 to 29 open a word, 30 to 39 go on with it
TOKENS = SpecialTokens(0, frozenset({0}), 40, bytes([OPENS_WORD] * 30 + [0] * 10))
NEW, YORK, CITY, THE, OF, A = 1, 2, 3, 4, 5, 6
TOY = [
    [NEW, YORK, THE, A, OF, NEW, YORK], [THE, OF, A, NEW, YORK, CITY], [OF, THE, 0, NEW, YORK, CITY],
    [NEW, A, THE, CITY, OF], [A, OF, THE, YORK],
]  # fmt: skip


def arrays(sequences: list[list[int]]) -> list[np.ndarray]:
    return [np.array(ids, dtype=np.int64) for ids in sequences]


def build(sequences, **options) -> dict[tuple, float]:
    phrases = pmi.build(arrays(sequences), TOKENS, **options)
    assert len(phrases.ids) == len(set(map(tuple, phrases.ids)))
    return dict(zip(map(tuple, phrases.ids), phrases.pmi, strict=True))


def test_a_corpus_counted_by_hand():
    """27 words: new 5, york 5, city 3. 21 pairs: new york 4, york city 2. 15 triples: new york city 2."""
    found = build(TOY, min_count=2)
    assert found[NEW, YORK] == pytest.approx(math.log((4 / 21) / (5 / 27 * 5 / 27)))
    assert found[YORK, CITY] == pytest.approx(math.log((2 / 21) / (5 / 27 * 3 / 27)))
    # of the three segmentations, new york | city explains most
    assert found[NEW, YORK, CITY] == pytest.approx(math.log((2 / 15) / (4 / 21 * 3 / 27)))
    assert (THE, NEW) not in found  # a special token is between them
    assert (OF, THE) in found and (A, OF) in found and (THE, OF) not in found  # twice, twice, once


def brute_force(sequences: list[list[int]], min_count: int) -> dict[tuple, float]:
    """Counts and minima over all segmentations, straight from the definition."""
    runs = []
    for ids in sequences:
        words: list[tuple] = []
        for token in ids:
            if token == 0:
                runs.append(words)
                words = []
            elif token >= 30 and words:
                words[-1] += (token,)
            else:
                words.append((token,))
        runs.append(words)
    counts = {n: Counter(tuple(run[i : i + n]) for run in runs for i in range(len(run) - n + 1)) for n in range(1, 6)}
    log_p = {gram: math.log(c / counts[n].total()) for n in counts for gram, c in counts[n].items()}
    result = {}
    for n in range(2, 6):
        for gram, count in counts[n].items():
            if count < min_count:
                continue
            values = []
            for k in range(1, n):
                for cuts in itertools.combinations(range(1, n), k):
                    parts = itertools.pairwise((0, *cuts, n))
                    values.append(log_p[gram] - sum(log_p[gram[a:b]] for a, b in parts))
            if min(values) > 0:
                result[sum(gram, ())] = min(values)
    return result


def made_up(num_texts=60, seed=0) -> list[list[int]]:
    """Random words, with some phrases of up to five words strewn in, some words of several tokens."""
    g = np.random.default_rng(seed)
    phrases = [[1, 2], [3, 4, 30], [5, 31, 32, 6, 7], [8, 9, 10, 33, 11], [12, 13, 14, 15, 16]]
    texts = []
    for _ in range(num_texts):
        text = []
        for _ in range(g.integers(0, 25)):
            text += phrases[g.integers(5)] if g.random() < 0.3 else [int(g.integers(0, 40))]
            if text[-1] >= 30 and (len(text) < 2 or text[-2] == 0):  # no word begins so
                text.pop()
        texts.append(text)
    return texts


@pytest.mark.parametrize("min_count", [1, 3])
def test_building_against_brute_force(min_count):
    texts = [[i for i in text if i] if n % 3 else text for n, text in enumerate(made_up())]
    expected = brute_force(texts, min_count)
    found = build(texts, min_count=min_count)
    assert len(expected) > 30 and (12, 13, 14, 15, 16) in expected
    assert set(found) == set(expected)
    for phrase, value in expected.items():
        assert found[phrase] == pytest.approx(value, abs=1e-9), phrase


def test_a_short_list_holds_the_best_of_each_length():
    texts = made_up(300)
    everything, few = build(texts, min_count=2), build(texts, min_count=2, size=16)

    def by_length(found):
        lengths = {phrase: sum(token < 30 for token in phrase) for phrase in found}
        return {n: sorted((v for p, v in found.items() if lengths[p] == n), reverse=True) for n in range(2, 6)}

    for n, size in {2: 8, 3: 4, 4: 2, 5: 2}.items():
        assert by_length(few)[n] == pytest.approx(by_length(everything)[n][:size])


@pytest.mark.parametrize("texts", [[], [[]], [[1]], [[1, 2]], [[1, 2, 3], [0, 0]]])
def test_corpora_with_next_to_nothing(texts):
    phrases = pmi.build(arrays(texts), TOKENS)
    assert phrases.ids == []
    ids = np.array([1, 2, 3])
    assert phrases.join(ids, np.ones(3, dtype=bool), np.random.default_rng(0)).all()


def test_finding_against_a_plain_search():
    g = np.random.default_rng(0)
    texts = made_up(200)
    phrases = pmi.build(arrays(texts), TOKENS, min_count=3)
    known = set(map(tuple, phrases.ids))
    for ids in arrays(texts[:40]):
        starts = (ids < 30) | (g.random(len(ids)) < 0.1)  # and now and then a word begins where none did
        starts[:1] = True
        bounds = [*np.flatnonzero(starts).tolist(), len(ids)]
        expected = {(a, b) for a, b in itertools.combinations(bounds, 2) if tuple(ids[a:b].tolist()) in known}
        assert set(zip(*(x.tolist() for x in phrases.find(ids, starts)), strict=True)) == expected


def test_the_longest_phrase_wins_and_equals_are_drawn():
    phrases = pmi.Phrases(40, [[1, 2], [2, 3], [1, 2, 3], [4, 5], [5, 6]], [1.0] * 5)
    ids, starts = np.array([1, 2, 3, 4, 5, 6, 2]), np.ones(7, dtype=bool)
    outcomes = {
        tuple(np.flatnonzero(phrases.join(ids, starts, np.random.default_rng(seed))).tolist()) for seed in range(30)
    }
    assert outcomes == {(0, 3, 5, 6), (0, 3, 4, 6)}
    assert starts.all()


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "phrases.json"
    pmi.save(pmi.build(arrays(made_up(200)), TOKENS, min_count=3), path)
    return str(path)


def test_phrases_are_asked_for_together(saved):
    phrases, texts = pmi.load(saved), arrays(made_up(200, seed=1))
    keys = [SampleKey(0, 0, i) for i in range(len(texts))]
    objective = MaskedLM(masking="pmi", phrases=saved, probability=0.3)
    view = objective.view(pack(texts), keys, TOKENS)
    maskable = sum(int((ids != 0).sum()) for ids in texts)
    assert abs(view.num_targets / maskable - 0.3) < 0.03
    num_whole = 0
    for b, ids in enumerate(texts):
        rows = set(view.decoder_position_ids[slice(*view.decoder_cu_seqlens[b : b + 2].tolist())].tolist())
        starts = (ids < 30) | (np.roll(ids, 1) == 0)
        starts[:1] = True
        found = sorted(zip(*(x.tolist() for x in phrases.find(ids, starts)), strict=True))
        alone = [span for span in found if all(o is span or o[1] <= span[0] or span[1] <= o[0] for o in found)]
        for first, behind in alone:  # an occurrence that no other overlaps is hidden as a whole or not at all
            inside = [row in rows for row in range(first, behind)]
            assert all(inside) or not any(inside)
            num_whole += all(inside)
    assert num_whole > 20
    again = objective.view(pack(texts[3:5]), keys[3:5], TOKENS)
    assert again.targets.tolist() == view.targets[view.decoder_cu_seqlens[3] : view.decoder_cu_seqlens[5]].tolist()
    assert list(objective.evaluation_views(pack(texts), keys, TOKENS)) == ["mask=0.15", "mask=0.30", "mask=0.50"]


def test_a_saved_list_reads_back(saved):
    phrases, tree = pmi.load(saved), json.loads(Path(saved).read_text())
    assert phrases.ids == tree["phrases"] and phrases.vocab_size == 40 and len(phrases.pmi) == len(phrases.ids) > 5


def test_refusals(saved, tmp_path):
    with pytest.raises(ValueError, match=r"^phrases: expected a file made by pmi.save, .*absent.json cannot be read"):
        MaskedLM(masking="pmi", phrases=str(tmp_path / "absent.json"))
    (tmp_path / "text.json").write_text("no JSON")
    with pytest.raises(ValueError, match=r"^phrases: .*text.json is not JSON"):
        MaskedLM(masking="pmi", phrases=str(tmp_path / "text.json"))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^phrases: .*format 1, .*other.json is another"):
        MaskedLM(masking="pmi", phrases=str(tmp_path / "other.json"))
    objective = MaskedLM(masking="pmi", phrases=saved)
    wider = TOKENS._replace(vocab_size=41, word_edges=TOKENS.word_edges + b"\0")
    with pytest.raises(ValueError, match=r"^phrases: expected a list made for the tokenizer of this run, 41 .* 40; "):
        objective.view(pack([[1]]), [SampleKey(0, 0, 0)], wider)
    with pytest.raises(ValueError, match="does not tell where words begin"):
        pmi.build(arrays(TOY), TOKENS._replace(word_edges=None))
