"""Concepts among themselves: contextual positions against a loop over concepts."""

import math

import pytest
import torch

from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.mixing import ConceptMixing, CopeMixing, contextual_positions, interpolate
from conceptron.models.packing import pack

SMALL = dict(
    vocab_size=60, hidden_size=32, num_concepts=7, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, num_decoder_layers=1, concept_positions="cope",
)  # fmt: skip


def mixing(seed: int = 0, **options) -> CopeMixing:
    torch.manual_seed(seed)
    part = ConceptEncoder(ConceptConfig(**{**SMALL, **options})).double().layers[0].mix
    with torch.no_grad():
        part.places.normal_(std=1.0)
    return part


def by_hand(part: CopeMixing, c_Cd: torch.Tensor, gate=None) -> torch.Tensor:
    """One text, concept by concept; ``gate`` replaces the sigmoid."""
    C, D, P = len(c_Cd), part.head_dim, part.MAX_PLACES
    q, k, v = part.query(c_Cd, None), part.key(c_Cd, None), part.values(c_Cd)
    gate = gate or (lambda score: 1 / (1 + math.exp(-score)))
    rows = []
    for i in range(C):
        heads = []
        for h in range(4):
            scores = [float(q[i, h] @ k[j, h // 2]) / math.sqrt(D) for j in range(C)]
            for_softmax = []
            for j in range(C):
                between = range(i + 1, j + 1) if j > i else range(j, i)
                p = math.copysign(1, j - i) * sum(gate(scores[m]) for m in between)
                p = max(-P, min(P, p))
                low, high = math.floor(p), math.ceil(p)
                bias = [float(q[i, h] @ part.places[P + place]) / math.sqrt(D) for place in (low, high)]
                for_softmax.append(scores[j] + bias[0] + (p - low) * (bias[1] - bias[0]))
            weights = torch.tensor(for_softmax, dtype=torch.float64).softmax(0)
            heads.append(sum(weights[j] * v[j, h // 2] for j in range(C)))
        rows.append(torch.cat(heads))
    return part.out(torch.stack(rows))


@torch.no_grad()
def test_contextual_positions_against_a_loop():
    part = mixing()
    c_BCd = torch.randn(2, 7, 32, dtype=torch.float64)
    ours = part(c_BCd)
    for b in range(2):
        assert torch.allclose(ours[b], by_hand(part, c_BCd[b]), atol=1e-10)
    part.MAX_PLACES, part.places = 2, torch.nn.Parameter(part.places[62:67].clone())  # positions beyond the last place
    assert torch.allclose(part(c_BCd[:1])[0], by_hand(part, c_BCd[0]), atol=1e-10)


@torch.no_grad()
def test_gates_of_one_are_relative_positions(monkeypatch):
    """Attention with a key e[j - i] for every distance, Shaw et al. 2018, written with explicit indices."""
    steps = torch.arange(7)
    assert torch.equal(contextual_positions(torch.ones(3, 7, 7)), (steps - steps[:, None]).float().expand(3, 7, 7))
    part, c_BCd = mixing(), torch.randn(1, 7, 32, dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "sigmoid", lambda x: torch.ones_like(x))
    ours = part(c_BCd)[0]
    q, k, v = (
        part.per_head(x)[0] for x in (part.query(c_BCd, None), part.key(c_BCd, None), part.values(c_BCd))
    )  # [H, C, D]
    relative = part.places[64 + steps - steps[:, None]]  # [C, C, D]
    scores = (torch.einsum("hid,hjd->hij", q, k) + torch.einsum("hid,ijd->hij", q, relative)) / math.sqrt(8)
    expected = part.out((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    assert torch.allclose(ours, expected, atol=1e-12)
    assert torch.allclose(ours, by_hand(part, c_BCd[0], gate=lambda score: 1.0), atol=1e-10)


def test_gates_of_zero_are_no_positions():
    zero = contextual_positions(torch.zeros(2, 5, 5))
    assert (zero == 0).all()
    bias = torch.randn(2, 5, 9)
    assert torch.equal(interpolate(bias, zero), bias[..., 4:5].expand(2, 5, 5))


def test_gradients_against_finite_differences():
    torch.manual_seed(0)
    bias = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    gates = (0.1 + 0.6 * torch.rand(2, 4, 4, dtype=torch.float64)).requires_grad_()  # some beyond the last place
    assert torch.autograd.gradcheck(lambda b, g: interpolate(b, contextual_positions(g)), (bias, gates))


@torch.no_grad()
def test_a_new_model_with_contextual_positions_is_one_without():
    """The table starts at zero, so that they agree to rounding with ``concept_attention`` and no positions."""
    torch.manual_seed(0)
    cope, none = (ConceptEncoder(ConceptConfig(**{**SMALL, "concept_positions": p})).double() for p in ("cope", "none"))
    assert (cope.layers[0].mix.places == 0).all() and isinstance(none.layers[0].mix, ConceptMixing)
    none.load_state_dict({name: x for name, x in cope.state_dict().items() if "places" not in name})
    batch = pack([range(4, 30), [], range(9, 12)])
    expected = none(packed=batch).last_hidden_state
    assert torch.allclose(cope(packed=batch).last_hidden_state, expected, atol=1e-12)
    for layer in cope.layers:
        layer.mix.places.normal_()
    assert (cope(packed=batch).last_hidden_state - expected).abs().max() > 1e-2


def test_parameters_equal_their_closed_form():
    d, H, Hkv, D = 32, 4, 2, 8
    attention = d * H * D + 2 * d * Hkv * D + H * D * d + 2 * (D + D)
    assert sum(p.numel() for p in mixing().parameters()) == attention + (2 * 64 + 1) * D
    assert sum(p.numel() for p in mixing(num_concepts=40).parameters()) == attention + (2 * 64 + 1) * D


@pytest.mark.parametrize("positions", ["cope", "rope"])
def test_mixing_compiles_in_one_graph(positions):
    part = ConceptEncoder(ConceptConfig(**{**SMALL, "concept_positions": positions})).layers[0].mix
    c_BCd = torch.randn(2, 7, 32)
    angles = None if positions == "cope" else (torch.ones(2, 7, 1, 4), torch.zeros(2, 7, 1, 4))
    compiled = torch.compile(part, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(c_BCd, angles), part(c_BCd, angles), atol=1e-6)
