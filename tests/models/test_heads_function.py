"""Heads as one function: what the modules compute, forward and backward."""

import pytest
import torch

from conceptron.models import heads_function
from conceptron.models.config import ConceptConfig
from conceptron.models.layers import Heads
from conceptron.models.positions import rotary_angles, rotate


def make(num_heads: int = 3, dtype: torch.dtype = torch.float64) -> Heads:
    torch.manual_seed(0)
    part = Heads(ConceptConfig(vocab_size=8, hidden_size=24, num_attention_heads=6, num_concepts=2), num_heads)
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter)
    return part.to(dtype)


def by_modules(part: Heads, x: torch.Tensor, angles) -> torch.Tensor:
    heads = part.project(x).unflatten(-1, (part.num_heads, part.head_dim))
    return rotate(part.norm(part.bias(heads)), angles)


@pytest.mark.parametrize("shape, where", [((7,), (7,)), ((2, 5), (2, 5)), ((2, 5), (5,)), ((2, 5), None), ((0,), (0,))])
def test_equals_the_modules_forward_and_backward(shape, where):
    part, x = make(), torch.randn(*shape, 24, dtype=torch.float64, requires_grad=True)
    angles = None if where is None else rotary_angles(torch.rand(*where) * 50, 4, 100.0)
    slope = torch.randn(*shape, 3, 4, dtype=torch.float64)
    inputs, results = [x, *part.parameters()], []
    for call in (part, lambda x, angles: by_modules(part, x, angles)):
        out = call(x, angles)
        results.append([out, *torch.autograd.grad((out * slope).sum(), inputs)])
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got, expected, atol=1e-12)


def test_the_module_takes_it(monkeypatch):
    calls, function = [], heads_function.heads
    monkeypatch.setattr(heads_function, "heads", lambda *args: calls.append(1) or function(*args))
    make()(torch.randn(3, 24, dtype=torch.float64), None)
    assert calls


def test_its_gradient_is_right():
    part, angles = make(2), rotary_angles(torch.arange(4), 4, 100.0)
    x = torch.randn(4, 24, dtype=torch.float64, requires_grad=True)
    parameters = part.project.weight, part.bias.bias, part.norm.weight
    inputs = (x, *(parameter.detach().requires_grad_() for parameter in parameters))
    assert torch.autograd.gradcheck(lambda *a: heads_function.heads(*a, 1e-6, angles), inputs)


def test_a_wrapped_or_hooked_projection_is_called(monkeypatch):
    """An adapter in place of the projection, a hook on it, parameters that ZeRO-3 has cut."""
    monkeypatch.setattr(heads_function, "heads", lambda *args: pytest.fail("passed by"))
    x, calls = torch.randn(3, 24, dtype=torch.float64), []
    part = make()
    part.project.register_forward_hook(lambda *args: calls.append("hook"))
    part(x, None)
    part = make()
    part.project.weight.ds_id = 0
    part(x, None)
    part = make()
    part.norm.forward = part.norm.forward  # offloading
    part(x, None)
    part = make()
    state = {name: parameter.detach() for name, parameter in part.named_parameters()}
    torch.func.functional_call(part, state, (x, None))
    part = make()
    part.project = torch.nn.Sequential(part.project)
    part(x, None)
    assert calls == ["hook"]


def test_autocast_and_compile_take_the_modules():
    part, x = make(dtype=torch.float32), torch.randn(3, 24)
    assert heads_function.serves(x, part.project.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not heads_function.serves(x, part.project.weight) and part(x, None).dtype == torch.bfloat16
    assert not heads_function.serves(x.bfloat16(), part.project.weight)
    compiled = torch.compile(part, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x, None), part(x, None), atol=1e-5)
