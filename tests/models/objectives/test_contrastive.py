"""Contrast: pairs of views, the loss against a loop, what is found, negatives of two ranks."""

import math
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from conceptron.models.objectives import TSDAE, Contrastive, SampleKey, SpecialTokens
from conceptron.models.objectives.contrastive import Temperature
from conceptron.models.packing import Packed, pack

VOCAB = 60
TOKENS = SpecialTokens(3, frozenset({0, 1, 2, 3}), VOCAB)
PAIRS = ["adjacent", "overlapping", "deletion", "dropout"]


def keys(count: int, epoch: int = 0) -> list[SampleKey]:
    return [SampleKey(3, epoch, i) for i in range(count)]


def texts(lengths=(40, 0, 1, 97, 2, 3, 10), seed=0) -> list[np.ndarray]:
    g = np.random.default_rng(seed)
    return [g.integers(4, VOCAB, size=n) for n in lengths]


def rows(packed: Packed) -> list[tuple[list, list]]:
    """Tokens and positions of each sequence."""
    bounds = packed.cu_seqlens.tolist()
    parts = [slice(*bounds[i : i + 2]) for i in range(packed.num_sequences)]
    return [(packed.input_ids[part].tolist(), packed.position_ids[part].tolist()) for part in parts]


def concepts(B=6, C=3, d=8, seed=0) -> Tensor:
    return torch.randn(B, C, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(a: Tensor, b: Tensor, ids: list[int], similarity: str, temperature: float) -> float:
    """One text, one candidate at a time."""

    def score(x: Tensor, y: Tensor) -> float:
        if similarity == "pooled":
            return float(F.cosine_similarity(x.mean(0), y.mean(0), dim=0))
        return float(np.mean([float(F.cosine_similarity(x[c], y[c], dim=0)) for c in range(len(x))]))

    texts, losses = [i for i, name in enumerate(ids) if name >= 0], []
    for one, other in ((a, b), (b, a)):
        for i in texts:
            candidates = [j for j in texts if j == i or ids[j] != ids[i]]
            total = sum(math.exp(score(one[i], other[j]) / temperature) for j in candidates)
            losses.append(-math.log(math.exp(score(one[i], other[i]) / temperature) / total))
    return float(np.mean(losses)) if losses else 0.0


@pytest.mark.parametrize("pairs", PAIRS)
def test_pairs_depend_on_their_own_key_only(pairs):
    sequences, names, objective = texts(), keys(7), Contrastive(pairs)
    a, b, ids = objective.views(pack(sequences), names, TOKENS)
    order = [3, 6, 0]
    part_a, part_b, part_ids = objective.views(pack([sequences[i] for i in order]), [names[i] for i in order], TOKENS)
    assert rows(part_a) == [rows(a)[i] for i in order] and rows(part_b) == [rows(b)[i] for i in order]
    assert part_ids.tolist() == ids[order].tolist()
    other, _, _ = objective.views(pack(sequences), keys(7, epoch=1), TOKENS)
    assert (rows(other) == rows(a)) == (pairs == "dropout")


def test_adjacent_spans_are_cut_once():
    sequences = texts((40, 97, 2, 3, 10, 5) * 20)
    a, b, ids = Contrastive("adjacent").views(pack(sequences), keys(120), TOKENS)
    cuts = []
    for text, (left, left_at), (right, right_at) in zip(sequences, rows(a), rows(b), strict=True):
        assert left + right == text.tolist() and left and right
        assert left_at == list(range(len(left))) and right_at == list(range(len(right)))
        assert len(text) / 3 <= len(left) <= 2 * len(text) / 3
        cuts.append(len(left))
    assert len(set(cuts[1::6])) > 10 and (ids >= 0).all()
    assert a.num_positions().tolist() == cuts


def test_overlapping_spans_share_tokens():
    sequences = [np.arange(4, 4 + n) for n in (40, 56, 2, 3, 10, 5) * 20]
    a, b, _ = Contrastive("overlapping").views(pack(sequences), keys(120), TOKENS)
    lengths = []
    for text, (one, one_at), (other, _) in zip(sequences, rows(a), rows(b), strict=True):
        for span in (one, other):
            assert span == list(range(span[0], span[0] + len(span))) and set(span) <= set(text.tolist())
            assert len(text) / 2 < len(span) <= max(3 * len(text) / 4, len(text) // 2 + 1)
        assert set(one) & set(other) and one_at == list(range(len(one)))
        lengths.append(len(one))
    assert len(set(lengths[::6])) > 5
    assert {rows(a)[i][0][-1] for i in range(0, 120, 6)} >= {43}  # the end of a text is reached too


def test_two_deletions_differ_and_the_first_is_that_of_tsdae():
    sequences, names = texts((200, 1, 50)), keys(3)
    a, b, ids = Contrastive("deletion", deletion=0.5).views(pack(sequences), names, TOKENS)
    assert rows(a) == rows(TSDAE(probability=0.5).view(pack(sequences), names, TOKENS).encoder)
    assert rows(a)[0] != rows(b)[0] and rows(a)[1] == rows(b)[1]
    kept = set(rows(a)[0][1]), set(rows(b)[0][1])
    both = len(kept[0] & kept[1]) / 200
    assert abs(both - 0.25) < 4 * math.sqrt(0.19 / 200)  # independent of each other
    assert a.num_positions().tolist() == [200, 1, 50] and (ids >= 0).all()


def test_ids_tell_equal_texts_and_those_without_two_views():
    sequences = [[4, 5, 6], [7], [], [4, 5, 6], [6, 5, 4]]
    for pairs, without in (("adjacent", [1, 2]), ("dropout", [2])):
        _, _, ids = Contrastive(pairs).views(pack(sequences), keys(5), TOKENS)
        assert (ids < 0).nonzero()[:, 0].tolist() == without
        assert ids[0] == ids[3] != ids[4] and ids.dtype == torch.int64
    _, _, ids = Contrastive().views(pack(sequences), keys(5), TOKENS, documents=[9, 8, 7, 6, 9])
    assert ids.tolist() == [9, -1, -1, 6, 9]


@pytest.mark.parametrize("similarity", ["pooled", "slots"])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [7, 7, 2, 7, 4, 2], [-1, 1, 1, -1, 4, 5], [-1] * 6, [3] * 6])
def test_the_loss_against_a_loop(similarity, ids):
    a, b = concepts(), concepts(seed=1) + 0.5 * concepts()
    objective = Contrastive(similarity=similarity, temperature=0.2)
    loss = objective.loss(a, b, torch.tensor(ids))
    assert float(loss) == pytest.approx(naive(a, b, ids, similarity, 0.2), rel=1e-5, abs=1e-9)
    assert float(objective.loss(a, b, torch.tensor(ids), temperature=0.7)) == pytest.approx(
        naive(a, b, ids, similarity, 0.7), rel=1e-5, abs=1e-9
    )


@pytest.mark.parametrize("similarity", ["pooled", "slots"])
def test_gradients_and_extremes(similarity):
    objective, ids = Contrastive(similarity=similarity, temperature=0.5), torch.tensor([0, 1, 1, -1])
    a, b = (concepts(4, seed=seed).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda a, b: objective.loss(a, b, ids), (a, b))
    (of_the_one_left_out,) = torch.autograd.grad(objective.loss(a, b, ids), a)
    assert (of_the_one_left_out[3] == 0).all() and (of_the_one_left_out[:3] != 0).any()
    for B in (0, 1):
        a = torch.zeros(B, 3, 8, requires_grad=True)
        loss = objective.loss(a, a.clone(), torch.zeros(B, dtype=torch.int64))
        loss.backward()
        assert loss == 0 and torch.count_nonzero(a.grad) == 0
    far = torch.eye(8)[:6, None]  # every text unlike all others, both views alike
    assert Contrastive(similarity=similarity).loss(far, far, torch.arange(6)) < 1e-7
    with pytest.raises(ValueError, match=r"concepts_b: expected the shape of concepts_a, \[6, 1, 8\], got \[5, 1, 8\]"):
        objective.loss(far, far[1:], torch.arange(6))


def test_slots_are_compared_one_by_one_and_means_are_not():
    """The same concepts in another order have the same mean."""
    a = concepts()
    ids = torch.arange(6)
    turned = a.roll(1, dims=1)
    pooled, slots = (Contrastive(similarity=s) for s in ("pooled", "slots"))
    assert torch.allclose(pooled.loss(a, turned, ids), pooled.loss(a, a, ids))
    assert slots.loss(a, turned, ids) > slots.loss(a, a, ids) + 1


def test_the_loss_is_computed_in_float32():
    a, b, ids = concepts().bfloat16(), concepts(seed=1).bfloat16(), torch.arange(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = Contrastive().loss(a, b, ids)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(Contrastive().loss(a.double(), b.double(), ids)), rel=1e-4)


@pytest.mark.parametrize("similarity", ["pooled", "slots"])
def test_what_is_found_against_a_loop(similarity):
    a, ids = concepts(7), torch.tensor([0, 1, 2, 2, 4, -1, 6])
    b = a + 1.8 * concepts(7, seed=1)
    objective = Contrastive(similarity=similarity)
    found = 0.0
    for one, other in ((a, b), (b, a)):
        u, v = objective.embed(one), objective.embed(other)
        for i in range(7):
            candidates = [j for j in range(7) if ids[j] >= 0 and (j == i or ids[j] != ids[i])]
            found += 0.5 * (ids[i] >= 0) * (max(candidates, key=lambda j, q=u[i], v=v: float(q @ v[j])) == i)
    count, ours = objective.num_found(objective.embed(a), objective.embed(b), ids).tolist()
    assert count == 6 and ours == float(found) and 0 < ours < 6


def test_a_learnable_temperature_keeps_its_floor():
    temperature = Temperature(initial=0.05, floor=0.02)
    assert float(temperature().detach()) == pytest.approx(0.05)
    a, ids = concepts(), torch.arange(6)
    optimizer = torch.optim.SGD(temperature.parameters(), lr=100.0)
    for _ in range(20):  # identical views: the colder the better
        optimizer.zero_grad()
        (Contrastive().loss(a, a, ids, temperature()) * 1e3).backward()
        optimizer.step()
    assert 0.02 - 1e-8 < float(temperature().detach()) < 0.04
    with pytest.raises(ValueError, match=r"initial: expected a number above floor = 0.1, got 0.05"):
        Temperature(floor=0.1)


SHARES = [[4, 2], [6, 0], [3, 3]]  # texts of each of two ranks
ALL_IDS = [5, 6, 7, 5, -1, 9]


def of_rank(rank: int, share: list[int], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    mine = slice(0, share[0]) if rank == 0 else slice(share[0], 6)
    weight, ids = torch.eye(8, dtype=torch.float64).requires_grad_(), torch.tensor(ALL_IDS)[mine]
    a, b = (concepts(seed=seed)[mine] @ weight for seed in (0, 1))
    results = {}
    for similarity in ("pooled", "slots"):
        loss = Contrastive(similarity=similarity, temperature=0.3).loss(a, b, ids)
        (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
        both = torch.stack([loss.detach(), gradient.norm()])
        dist.all_reduce(both)
        dist.all_reduce(gradient)
        results[similarity] = float(both[0] / 2), gradient / 2  # as engines average over ranks
    alone = Contrastive(temperature=0.3, across_ranks=False).loss(a, b, ids)
    torch.save((results, float(alone.detach())), folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("share", SHARES)
def test_negatives_of_two_ranks_equal_one_process(share, tmp_path):
    """Loss and gradient, also where ranks have different numbers of texts or none at all."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=of_rank, args=(rank, share, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
    assert [process.exitcode for process in ranks] == [0, 0]
    (results, alone), (others, _) = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    weight = torch.eye(8, dtype=torch.float64).requires_grad_()
    a, b = (concepts(seed=seed) @ weight for seed in (0, 1))
    for similarity in ("pooled", "slots"):
        loss = Contrastive(similarity=similarity, temperature=0.3).loss(a, b, torch.tensor(ALL_IDS))
        (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
        for value, found in (results[similarity], others[similarity]):
            assert value == pytest.approx(float(loss.detach()), rel=1e-9)
            assert torch.allclose(found, gradient, rtol=1e-7, atol=1e-9) and gradient.abs().max() > 1e-3
    first = slice(0, share[0])
    expected = naive(a[first].detach(), b[first].detach(), ALL_IDS[first], "pooled", 0.3)
    assert alone == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"pairs": "halves"}, ["pairs: ", "adjacent, overlapping, deletion, dropout", "halves"]),
        ({"similarity": "mean"}, ["similarity: ", "pooled, slots", "mean"]),
        ({"temperature": 0.0}, ["temperature: ", "[1e-30, 1e+30]", "0.0"]),
        ({"deletion": 0.0}, ["deletion: ", "[1e-30, 1]", "0.0"]),
        ({"across_ranks": "no"}, ["across_ranks: ", "true or false", "no"]),
    ],
)
def test_wrong_options_are_refused_by_name(options, words):
    with pytest.raises(ValueError) as error:
        Contrastive(**options)
    assert str(error.value).startswith(words[0]) and all(word in str(error.value) for word in words)
