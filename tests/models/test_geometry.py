"""The early signs of a collapse, on concepts of which it is known."""

import pytest
import torch

from conceptron.models import geometry


def texts(num_texts=32, num_concepts=32, width=64):
    shape = num_texts, num_concepts, width
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def reason(z):
    return geometry.collapse(geometry.health(z), z.shape[1])


def test_orthogonal_prototypes_without_content():
    """The best spread there is, and no word of any text."""
    z = torch.eye(32, 64, dtype=torch.float64) + 0.005 * texts()
    assert geometry.health(z)["effective_rank"] > 31
    assert "100 % of the concepts' energy is the same for every text" in reason(z)


def test_identical_slots():
    z = texts(num_concepts=1).expand(32, 32, 64)
    health = geometry.health(z)
    assert health["duplicate_pairs"] == 32 * 31 // 2
    assert health["rank_dynamic"] == pytest.approx(1, abs=1e-3)
    assert "spans 1.0 directions for 32 concepts" in reason(z)
    noisy = z + 0.2 * texts()  # enough for the rank, and copies still
    assert "496 of 496 pairs of concepts are copies" in reason(noisy)


def test_mixtures_of_one_direction():
    z = texts(width=1) * texts(num_texts=1, num_concepts=1)
    assert "spans 1.0 directions" in reason(z)


def test_concepts_with_content_have_not_collapsed():
    assert reason(texts()) == ""
    assert reason(texts() + 2 * torch.eye(32, 64, dtype=torch.float64)) == ""
    assert reason(texts(num_concepts=1)) == ""  # a single concept is no copy of another


def test_few_texts_say_nothing():
    assert reason(texts(num_texts=geometry.MIN_TEXTS - 1).mean(0, keepdim=True).expand(7, -1, -1)) == ""
    with pytest.raises(ValueError, match="finite"):
        geometry.health(texts() / 0)
