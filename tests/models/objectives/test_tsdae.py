"""TSDAE: what is deleted, what is asked, with which weight."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from conceptron.models.config import ConceptConfig
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.objectives import OBJECTIVES, TSDAE, SampleKey, SpecialTokens, View
from conceptron.models.objectives.view import OPENS_WORD
from conceptron.models.packing import pack

# 0 to 3 special; 4 to 19 open a word; 20 to 39 go on with it
VOCAB = 40
TOKENS = SpecialTokens(3, frozenset({0, 1, 2, 3}), VOCAB, bytes([OPENS_WORD] * 20 + [0] * 20))
EVERY = [TSDAE(), TSDAE(units="word"), TSDAE(positions="restart"), TSDAE(0.9, "word", "restart", 1.0)]


def keys(count: int, epoch: int = 0) -> list[SampleKey]:
    return [SampleKey(3, epoch, i) for i in range(count)]


def texts(lengths=(30, 0, 1, 60, 4), seed=0) -> list[np.ndarray]:
    g = np.random.default_rng(seed)
    sequences = [g.integers(4, VOCAB, size=n) for n in lengths]
    for ids in sequences:
        if len(ids) > 3:
            ids[0], ids[-1] = 1, 2
    return sequences


def parts(view: View, b: int) -> dict[str, list]:
    reads = slice(*view.encoder.cu_seqlens[b : b + 2].tolist())
    asks = slice(*view.decoder_cu_seqlens[b : b + 2].tolist())
    return {
        "read": view.encoder.input_ids[reads].tolist(), "read_at": view.encoder.position_ids[reads].tolist(),
        "asked_at": view.decoder_position_ids[asks].tolist(), "targets": view.targets[asks].tolist(),
        "weights": view.weights[asks].tolist(), "seen": view.seen[asks].tolist(),
    }  # fmt: skip


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_every_token_is_asked_for_and_those_that_survive_are_read(objective):
    sequences = texts()
    view = objective.view(pack(sequences), keys(5), TOKENS)
    for b, ids in enumerate(sequences):
        part = parts(view, b)
        ordinary = [i for i, token in enumerate(ids.tolist()) if token > 3]
        assert part["asked_at"] == ordinary and part["targets"] == ids[ordinary].tolist()
        deleted = {i for i, seen in zip(ordinary, part["seen"], strict=True) if not seen}
        kept = [i for i in range(len(ids)) if i not in deleted]
        assert part["read"] == ids[kept].tolist()
        assert part["read_at"] == (kept if objective.positions == "kept" else list(range(len(kept))))
        assert not ordinary or any(part["seen"])
        assert part["weights"] == [objective.kept_weight if seen else 1.0 for seen in part["seen"]]
    assert (view.decoder_input_ids == TOKENS.mask_id).all() and view.timesteps is None
    assert view.divisor == pytest.approx(float(view.weights.sum()))
    lengths = [len(ids) for ids in sequences]
    extents = lengths if objective.positions == "kept" else view.encoder.cu_seqlens.diff().tolist()
    assert view.encoder.num_positions().tolist() == extents


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_deletion_depends_on_its_own_key_and_text_only(objective):
    sequences, names = texts(), keys(5)
    whole = objective.view(pack(sequences), names, TOKENS)
    order = [3, 0, 2]
    part = objective.view(pack([sequences[i] for i in order]), [names[i] for i in order], TOKENS)
    assert [parts(part, b) for b in range(3)] == [parts(whole, i) for i in order]
    other = objective.view(pack(sequences), keys(5, epoch=1), TOKENS)
    assert parts(other, 3) != parts(whole, 3)


@pytest.mark.parametrize("units", ["token", "word"])
def test_the_deletion_rate(units):
    sequences = [ids[1:-1] for ids in texts((402,) * 100)]
    for probability in (0.6, 0.1):
        view = TSDAE(probability, units).view(pack(sequences), keys(100), TOKENS)
        deleted = (~view.seen).double().view(100, 400).mean(1)
        assert abs(float(deleted.mean()) - probability) < 4 * float(deleted.std()) / 10
        independent = math.sqrt(probability * (1 - probability) / 400)
        if units == "token":
            assert abs(float(deleted.mean()) - probability) < 4 * independent / 10
            assert float(deleted.std()) == pytest.approx(independent, rel=0.3)
        else:
            assert float(deleted.std()) > 1.1 * independent  # whole words go together


def test_words_are_deleted_as_wholes():
    view = TSDAE(units="word").view(pack(texts((500,))), keys(1), TOKENS)
    seen = view.seen.tolist()
    for i, token in enumerate(view.targets.tolist()):
        if token >= 20 and i > 0:
            assert seen[i] == seen[i - 1]
    assert 0.2 < np.mean(seen) < 0.6


def test_one_survives_whatever_the_rate_and_any_may_be_it():
    view = TSDAE(probability=1.0).view(pack([[4, 5, 6, 7, 8]] * 4000), keys(4000), TOKENS)
    assert (view.encoder.cu_seqlens.diff() == 1).all()
    share = torch.bincount(view.encoder.position_ids, minlength=5) / 4000
    assert (share - 0.2).abs().max() < 4.5 * math.sqrt(0.16 / 4000)
    words = TSDAE(probability=1.0, units="word").view(pack([[4, 20, 21, 5, 22, 6]] * 50), keys(50), TOKENS)
    assert {tuple(parts(words, b)["read"]) for b in range(50)} == {(4, 20, 21), (5, 22), (6,)}
    assert TSDAE(probability=1.0).view(pack([[1, 2], []]), keys(2), TOKENS).num_targets == 0


def test_evaluation_deletes_nested_sets_at_fixed_rates():
    views = TSDAE(probability=0.5).evaluation_views(pack(texts((300,))), keys(1), TOKENS)
    assert list(views) == ["delete=0.30", "delete=0.50", "delete=0.60", "delete=0.90"]
    deleted = [~view.seen for view in views.values()]
    assert all((a <= b).all() and a.sum() < b.sum() for a, b in pairwise(deleted))


def test_a_model_learns_to_copy_and_the_two_kinds_of_targets_are_told_apart():
    torch.manual_seed(0)
    config = ConceptConfig(
        vocab_size=VOCAB, hidden_size=32, num_concepts=8, num_attention_heads=2, intermediate_size=48, mask_token_id=3,
        num_hidden_layers=1, num_decoder_layers=1, timestep_conditioning=False,
    )  # fmt: skip
    model, objective = ConceptForMaskedLM(config), OBJECTIVES["tsdae"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(80):
        sequences = texts((8,) * 32, seed=step)
        loss = model(view=objective.view(pack(sequences), keys(32, epoch=step), TOKENS)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    view = TSDAE(0.5).view(pack(texts((8,) * 64, seed=1000)), keys(64, epoch=1000), TOKENS)
    nll = model(view=view, return_nll=True).nll.detach()
    assert nll[view.seen].mean() < nll[~view.seen].mean() - 0.3  # random tokens can be copied, but not guessed


@pytest.mark.parametrize(
    "options, message",
    [
        ({"probability": 0.0}, "probability: expected a number in [1e-30, 1], got 0.0"),
        ({"units": "words"}, "units: expected one of token, word, got 'words'"),
        ({"positions": "gaps"}, "positions: expected one of kept, restart, got 'gaps'"),
        ({"kept_weight": 1.5}, "kept_weight: expected a number in [0, 1], got 1.5"),
    ],
)
def test_wrong_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError) as error:
        TSDAE(**options)
    assert str(error.value) == message
