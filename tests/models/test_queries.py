"""Concepts before they have read anything: how they start, how large, and that no two are alike."""

import math

import pytest
import torch

from conceptron.models.config import ConceptConfig
from conceptron.models.decisions import CHOICES
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.packing import pack
from conceptron.models.queries import ConceptQueries

OWN_QUERIES = [kind for kind in CHOICES["init_queries"] if kind != "state"]  # that needs a backbone

d, C, V = 64, 32, 60


def queries(init: str, places: str = "rope", num_concepts: int = C) -> ConceptQueries:
    torch.manual_seed(0)
    config = ConceptConfig(
        vocab_size=V, hidden_size=d, num_concepts=num_concepts, num_attention_heads=4, num_hidden_layers=1,
        intermediate_size=48, init_queries=init, concept_positions=places,
    )  # fmt: skip
    return ConceptEncoder(config).concepts


@torch.no_grad()
def start(part: ConceptQueries) -> torch.Tensor:
    """[C, d] of a text without tokens."""
    return part(torch.zeros(0, d), pack([[]]))[0]


@pytest.mark.parametrize("init", OWN_QUERIES)
@pytest.mark.parametrize("places", CHOICES["concept_positions"])
def test_size_at_the_start_is_as_designed(init, places):
    """Rows of mean square 1 (embedding: initializer_range^2), and a sinusoid as large as they are on top."""
    size = 0.02 if init == "embedding" else 1.0
    expected = size * math.sqrt(2) if places == "sinusoidal" else size
    if places == "learned":
        expected = math.sqrt(size**2 + 0.02**2)
    rows = start(queries(init, places))
    assert rows.square().mean().sqrt().item() == pytest.approx(expected, rel=0.1)
    if init in ("anchor", "orthogonal") and places == "rope":
        assert torch.allclose(rows.norm(dim=1), torch.full((C,), math.sqrt(d)), rtol=1e-4)


@pytest.mark.parametrize("init", OWN_QUERIES)
@pytest.mark.parametrize("num_concepts", [1, C, 8 * d])
def test_initial_concepts_are_distinct(init, num_concepts):
    """No two nearly alike, also where there are more than channels; as many as channels span most of them."""
    rows = torch.nn.functional.normalize(start(queries(init, num_concepts=num_concepts)), dim=1).double()
    cosines = rows @ rows.T - torch.eye(num_concepts)
    assert cosines.max() < 0.98
    if num_concepts == C:
        share = torch.linalg.svdvals(rows)
        share = share / share.sum()
        assert torch.exp(-(share * share.log()).sum()) > 0.85 * C


def test_anchor_features_fit_any_number_of_concepts():
    """No table: the network of 32 concepts also makes 33, and those that stand where others stood are the same."""
    few, many = queries("anchor"), queries("anchor", num_concepts=3 * C)
    many.load_state_dict(few.state_dict())
    assert all(name != "weight" and "places" not in name for name in few.state_dict())
    assert torch.allclose(start(many)[1::3], start(few), atol=1e-5)


def test_sinusoids_do_not_depend_on_the_number_of_concepts():
    """Places are shares of the text: concept i of C stands where concept 3i + 1 of 3C does."""
    few, many = queries("anchor", "sinusoidal"), queries("anchor", "sinusoidal", num_concepts=3 * C)
    many.load_state_dict(few.state_dict())
    assert torch.allclose(start(many)[1::3], start(few), atol=1e-3)
    shares = (torch.arange(C).double()[:, None] + 0.5) / C
    angles = 1000 * shares * 10000.0 ** (-torch.arange(d // 2) / (d // 2))
    expected = math.sqrt(2) * torch.cat((angles.sin(), angles.cos()), 1)
    assert torch.allclose((start(few) - start(queries("anchor"))).double(), expected, atol=1e-3)


def test_learned_places_are_added():
    part = queries("orthogonal", "learned")
    assert torch.equal(start(part), part.weight + part.places)
    assert start(part).std(0).min() > 0 and part.places.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("init", OWN_QUERIES)
@pytest.mark.parametrize("places", ["rope", "learned", "sinusoidal"])
def test_parameters_equal_their_closed_form(init, places):
    rows = 256 * d + d + d * d + d if init == "anchor" else C * d
    expected = rows + (C * d if places == "learned" else 0)
    assert sum(p.numel() for p in queries(init, places).parameters()) == expected


def test_rows_stay_wide_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(start(queries(init)).dtype == torch.float32 for init in OWN_QUERIES)
    assert start(queries("anchor", "sinusoidal").bfloat16()).dtype == torch.bfloat16
