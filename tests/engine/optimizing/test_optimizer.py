"""Which parameters decay."""

import torch

from conceptron.engine.optimizing.optimizer import build_optimizer, parameter_groups
from conceptron.engine.recipe.schema import Optim
from conceptron.models.config import ConceptConfig
from conceptron.models.masked_lm import ConceptForMaskedLM


def model(**fields) -> ConceptForMaskedLM:
    shape = dict(vocab_size=50, hidden_size=16, num_concepts=3, num_attention_heads=2, intermediate_size=8)
    return ConceptForMaskedLM(ConceptConfig(**shape, mask_token_id=1, **fields))


def test_every_parameter_is_in_exactly_one_group():
    net = model()
    groups = parameter_groups(net, 0.1)
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in net.parameters())
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_only_matrices_of_linear_layers_decay():
    net = model()
    decayed = {id(parameter) for parameter in parameter_groups(net, 0.1)[0]["params"]}
    linear = {id(m.weight): name for name, m in net.named_modules() if isinstance(m, torch.nn.Linear)}
    linear.pop(id(net.encoder.embed_tokens.weight), None)  # the head's weight, when it is tied
    assert decayed == set(linear)
    assert id(net.encoder.concepts.weight) not in decayed
    assert id(net.encoder.embed_tokens.weight) not in decayed


def test_frozen_parameters_are_left_out():
    net = model()
    net.encoder.embed_tokens.weight.requires_grad_(False)
    members = {id(parameter) for group in parameter_groups(net, 0.1) for parameter in group["params"]}
    assert id(net.encoder.embed_tokens.weight) not in members
    assert not parameter_groups(net.encoder.embed_tokens, 0.1)


def test_one_step_moves_decayed_and_kept_parameters_as_adamw_should():
    """With a zero gradient AdamW only decays: w <- w * (1 - lr * weight_decay)."""
    net = model()
    optimizer = build_optimizer(net, Optim(lr=0.5, weight_decay=0.2))
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    feed = "encoder.layers.0.feed"
    name = next(n for n, p in net.named_parameters() if n.startswith(feed) and p.ndim == 2)
    torch.testing.assert_close(dict(net.named_parameters())[name], before[name] * 0.9)
    assert torch.equal(net.encoder.concepts.weight, before["encoder.concepts.weight"])
