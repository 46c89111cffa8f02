"""Concept metrics on matrices whose values are known."""

import math

import pytest
import torch

from conceptron.bench.analysis import gates
from conceptron.bench.analysis.geometry import metrics


def equicosine(num_concepts: int, cosine: float, width: int) -> torch.Tensor:
    """[C, d] unit vectors whose pairwise cosines are all ``cosine``."""
    gram = torch.full((num_concepts, num_concepts), cosine, dtype=torch.float64).fill_diagonal_(1.0)
    vectors = torch.linalg.cholesky(gram)
    return torch.nn.functional.pad(vectors, (0, width - num_concepts))


def frozen(prototypes: torch.Tensor, noise: float, num_texts: int = 64, seed: int = 0) -> torch.Tensor:
    """[B, C, d] texts that move the prototypes by ``noise`` only."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_texts, *prototypes.shape)
    return prototypes + noise * torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("cosine", "rank"), [(0.45, 13), (0.30, 18), (0.19, 24), (0.10, 34), (0.05, 47), (0.0234, 64)])
def test_document_rank_of_equally_similar_prototypes(cosine, rank):
    # the table of the earlier documents' metric against the mean cosine, C = 128
    measured = metrics.document_rank(equicosine(128, cosine, 512))
    assert measured == pytest.approx(metrics.equicosine_rank(cosine, 128), rel=1e-6)
    assert round(measured) == rank


def test_rank_64_needs_a_cosine_of_0234():
    assert metrics.document_rank(equicosine(128, 0.0234, 200)) == pytest.approx(64.0, abs=0.05)
    assert gates.cosine_for_rank(64, 128) == pytest.approx(0.0234, abs=5e-5)
    assert metrics.equicosine_rank(gates.cosine_for_rank(20, 96), 96) == pytest.approx(20)


def test_orthogonal_and_identical_prototypes():
    orthogonal, identical = 3.0 * torch.eye(24, 40, dtype=torch.float64), torch.ones(24, 40, dtype=torch.float64)
    assert metrics.document_rank(orthogonal) == pytest.approx(24, rel=1e-6)
    assert float(metrics.entropy_rank(orthogonal)) == pytest.approx(24, rel=1e-4)
    assert metrics.document_rank(identical) == pytest.approx(1, abs=1e-6)
    assert float(metrics.entropy_rank(identical)) == pytest.approx(1, abs=1e-3)
    assert float(metrics.entropy_rank(torch.zeros(4, 6))) == 0.0
    alike = metrics.similarity(identical.expand(5, -1, -1))
    assert alike["duplicate_pairs"] == 24 * 23 // 2 == alike["duplicate_pairs_per_text"]
    assert alike["uniformity"] == pytest.approx(1)
    apart = metrics.similarity(orthogonal.expand(5, -1, -1))
    assert apart["duplicate_pairs"] == 0
    assert apart["similarity_mean"] == pytest.approx(0)
    assert apart["uniformity"] == pytest.approx(math.exp(-4))


def test_one_shared_direction_hides_the_rest():
    # the earlier metric is capped by a common vector that centring over the concepts removes
    prototypes = torch.eye(32, 64, dtype=torch.float64) + 3.0 * torch.ones(64, dtype=torch.float64) / 8
    out = metrics.geometry(frozen(prototypes, 0.01))
    assert out["effective_rank"] < 4
    assert out["rank_mean_centered"] > 30


def test_frozen_prototypes_are_diverse_but_empty():
    empty = metrics.geometry(frozen(torch.eye(32, 64, dtype=torch.float64), 0.01))
    assert empty["effective_rank"] > 31
    assert empty["static_fraction"] > 0.95
    verdict = next(v for v in gates.judge(empty, 32, gates.read_gates()) if v.gate.metric == "static_fraction")
    assert verdict.verdict == "FAIL"
    assert "no content" in verdict.source
    full = metrics.geometry(frozen(torch.eye(32, 64, dtype=torch.float64), 1.0))
    assert full["static_fraction"] < 0.1
    assert full["rank_dynamic"] > 25


def test_rounding_is_not_content():
    # the same concepts for every text, in float32: the input-dependent part must have rank 0, not that of the rounding
    prototypes = torch.nn.functional.normalize(torch.randn(16, 48, generator=torch.Generator().manual_seed(1)), dim=-1)
    texts = torch.stack([prototypes * (1 + 1e-7 * i) for i in range(30)])
    out = metrics.geometry(texts)
    assert out["rank_dynamic"] == 0.0
    assert out["dead_slots"] == 16
    assert out["static_fraction"] == pytest.approx(1)


def test_dead_slots_and_static_fraction_by_hand():
    z = torch.zeros(4, 3, 2, dtype=torch.float64)
    z[:, 0] = torch.tensor([1.0, 0.0])  # never moves
    z[:, 1, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    z[:, 2] = torch.tensor([[2.0, 0], [0, 2.0], [2.0, 0], [0, 2.0]])
    assert metrics.slot_variances(z).tolist() == pytest.approx([0, 1, 2])
    assert metrics.dead_slots(z) == 1
    assert metrics.static_fraction(z) == pytest.approx((1 + 0 + 2) / (1 + 1 + 4))


def test_spectrum_and_dimensions_by_hand():
    out = metrics.spectrum(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5])))
    total = 9 + 4 + 1 + 0.25
    assert out["dims_95"] == 3  # 9 + 4 is 91 % of it, 14 is 98 %
    assert out["top1_variance"] == pytest.approx(9 / total)
    assert out["dominance"] == pytest.approx(3 / 6.5)
    cloud = torch.zeros(6, 1, 3, dtype=torch.float64)
    cloud[:, 0, 0] = torch.tensor([1.0, -1, 1, -1, 0, 0])
    cloud[:, 0, 1] = torch.tensor([0.0, 0, 0, 0, 2**0.5, -(2**0.5)])
    out = metrics.dimensions(cloud)
    assert out["participation_ratio"] == pytest.approx(2)  # two equal axes of three
    assert out["collapsed_dimensions"] == 1


def test_isotropy_is_zero_after_a_layer_norm():
    z = torch.randn(64, 8, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert metrics.dimensions(z)["isotropy"] > 0.2
    normed = torch.nn.functional.layer_norm(z, (32,))
    out = metrics.geometry(normed)
    assert out["isotropy"] < 1e-7
    gate = next(gate for gate in gates.read_gates() if gate.metric == "isotropy")
    void = gates.judge_one(gate, out["isotropy"], 8)
    assert void.verdict == gates.UNKNOWN and "by construction" in void.reason
    assert gates.judge_one(gate, metrics.geometry(z)["isotropy"], 8).passed == (True, True)


@pytest.mark.parametrize("method", ["fit", "mle"])
@pytest.mark.parametrize("dimension", [5, 20])
def test_twonn_finds_the_dimension(dimension, method):
    generator = torch.Generator().manual_seed(dimension)
    flat = torch.randn(3000, dimension, generator=generator, dtype=torch.float64)
    frame = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64)).Q[:dimension]
    points = flat @ frame
    points = torch.cat([points, points[:200]])  # equal points must not count
    assert metrics.twonn(points, method=method) == pytest.approx(dimension, rel=0.15)


def test_twonn_of_too_few_points_is_not_a_number():
    assert math.isnan(metrics.twonn(torch.randn(12, 3)))
    assert math.isnan(metrics.twonn(torch.ones(500, 3)))
    with pytest.raises(ValueError, match="method: expected 'fit' or 'mle', got 'em'"):
        metrics.twonn(torch.randn(50, 3), method="em")


def test_bad_concepts_are_named():
    with pytest.raises(ValueError, match=r"expected shape \[B, C, d\].*got \[4, 8\]"):
        metrics.geometry(torch.zeros(4, 8))
    with pytest.raises(ValueError, match="at least 2 texts"):
        metrics.geometry(torch.randn(1, 4, 8))
    with pytest.raises(ValueError, match="finite"):
        metrics.geometry(torch.full((3, 4, 8), math.nan))


def test_twonn_unrolls_a_swiss_roll():
    """A sheet rolled up in three dimensions has two: distances along it, not through it, are what neighbours tell."""
    generator = torch.Generator().manual_seed(0)
    u, height = torch.rand(2, 4000, generator=generator, dtype=torch.float64)
    turn = 1.5 * math.pi * (1 + 2 * u)
    roll = torch.stack((turn * turn.cos(), 21 * height, turn * turn.sin()), dim=1)
    assert metrics.twonn(roll) == pytest.approx(2, abs=0.15)
    in_40 = torch.nn.functional.pad(roll, (0, 37)) @ torch.linalg.qr(
        torch.randn(40, 40, generator=generator, dtype=torch.float64)
    ).Q
    assert metrics.twonn(in_40) == pytest.approx(2, abs=0.15)


def test_low_rank_mixtures_have_the_rank_of_their_parts():
    """32 concepts that mix 4 directions, in other amounts for each text."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.linalg.qr(torch.randn(64, 4, generator=generator, dtype=torch.float64)).Q.T
    out = metrics.geometry(torch.randn(200, 32, 4, generator=generator, dtype=torch.float64) @ parts)
    assert 3 < out["rank_dynamic"] < 4.01
    assert 3 < out["rank_text"] < 4.01
    assert out["participation_ratio"] == pytest.approx(4, rel=0.05)
    assert out["static_fraction"] < 0.02
