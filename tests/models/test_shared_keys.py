"""Keys and values that are made once: by a tied layer for all iterations, by one layer for the next."""

from itertools import pairwise

import pytest
import torch

from conceptron.bench.measure.parameters import parameters
from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.packing import pack

SMALL = dict(
    vocab_size=60, hidden_size=32, num_concepts=6, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, num_decoder_layers=1, mask_token_id=3,
)  # fmt: skip
BATCH = pack([list(range(4, 15)), [], [5, 9, 7]])


def encoder(**options) -> ConceptEncoder:
    torch.manual_seed(0)
    return ConceptEncoder(ConceptConfig(**{**SMALL, **options})).double()


@pytest.mark.parametrize("kind", ["cross", "slot", "hybrid"])
def test_a_tied_layer_makes_them_once_and_nothing_changes(kind):
    model, counts = encoder(layer_kind=kind, tie_layers=True, num_iterations=4), []
    model.layers[0].read.value.register_forward_hook(lambda *args: counts.append(1))
    states = model(packed=BATCH, output_hidden_states=True).hidden_states
    assert len(counts) == 1
    alone = model.read_tokens(BATCH)
    angles = model.concept_angles(model.anchors(BATCH))
    for before, after in pairwise(states[:4]):  # the last of them is normalised
        again, _ = model.layers[0](before, angles, alone)
        assert torch.equal(again, after)


def test_iterations_without_gradient_do_not_take_it_from_the_rest():
    gradients = []
    for frozen in (0, 2):
        model = encoder(tie_layers=True, num_iterations=4, backprop_iterations=4 - frozen)
        model(packed=BATCH).last_hidden_state.square().sum().backward()
        gradients.append(model.layers[0].read.value.weight.grad)
    assert gradients[1].abs().max() > 0 and not torch.allclose(*gradients)


@pytest.mark.parametrize("kind", ["cross", "slot", "hybrid"])
@pytest.mark.parametrize("share_kv", [2, 3, 4])
def test_layers_share_and_every_parameter_is_trained(kind, share_kv):
    model = encoder(layer_kind=kind, share_kv=share_kv)
    assert [hasattr(layer.read, "key") for layer in model.layers] == [i % share_kv == 0 for i in range(4)]
    out = model(packed=BATCH).last_hidden_state
    (out * torch.randn_like(out)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert all(layer.read.query.project.weight.grad.abs().max() > 0 for layer in model.layers)


def test_sharing_equals_layers_with_equal_projections():
    shared, full = encoder(share_kv=4), encoder()
    state = shared.state_dict()
    for i in range(1, 4):
        for name in ("key.project.weight", "key.bias.bias", "key.norm.weight", "value.weight"):
            state[f"layers.{i}.read.{name}"] = state[f"layers.0.read.{name}"]
    full.load_state_dict(state)
    with torch.no_grad():
        assert torch.allclose(shared(packed=BATCH)[0], full(packed=BATCH)[0], atol=1e-12)


@pytest.mark.parametrize("kind", ["cross", "slot", "hybrid"])
@pytest.mark.parametrize("share_kv", [1, 2, 3, 4])
def test_parameters_are_those_of_the_closed_form(kind, share_kv):
    config = ConceptConfig(**SMALL, layer_kind=kind, share_kv=share_kv)
    assert sum(parameters(config).values()) == ConceptForMaskedLM(config).num_parameters()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layer_kind": "bixt", "share_kv": 2}, "share_kv: expected 1 with layer_kind = bixt"),
        ({"tie_layers": True, "share_kv": 2}, "share_kv: expected 1 with tie_layers = true"),
        ({"share_kv": 5}, "share_kv: expected at most num_hidden_layers = 4, got 5"),
        ({"share_kv": 0}, "share_kv: expected a whole number from 1, got 0"),
    ],
)
def test_what_cannot_share_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ConceptConfig(**{**SMALL, **options})
