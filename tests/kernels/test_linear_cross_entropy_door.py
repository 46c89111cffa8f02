"""The door of linear_cross_entropy: what it refuses, holds in memory, and how it behaves under torch's machinery."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from conceptron.kernels.linear_cross_entropy import linear_cross_entropy
from conceptron.kernels.linear_cross_entropy.library import OPS


def inputs(num_rows=33, width=16, num_words=50, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, width, generator=g).to(device, dtype) for n in (num_rows, num_words))
    targets = torch.randint(num_words, (num_rows,), generator=g).to(device)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def refused(**changes):
    hidden, weight, targets = inputs(4, 8, 10)
    arguments = {"hidden": hidden, "weight": weight, "targets": targets} | changes
    linear_cross_entropy(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"), **arguments)


REFUSALS = [
    ({"hidden": [1.0]}, TypeError, r"hidden: expected a tensor \[T, d\], got list"),
    ({"hidden": torch.zeros(4, 2, 8)}, ValueError, r"hidden: expected shape \[T, d\], got \[4, 2, 8\]"),
    ({"hidden": torch.zeros(4, 8, dtype=torch.int64)}, TypeError, "hidden: expected float32.* got torch.int64"),
    ({"weight": torch.zeros(10, 8, dtype=torch.float16)}, TypeError, "weight: expected hidden's dtype torch.float32"),
    ({"weight": torch.zeros(10, 9)}, ValueError, r"weight: expected d = 8 \(hidden's width\), got 9"),
    ({"weight": torch.zeros(0, 8)}, ValueError, r"weight: .* at least 1, got \[0, 8\]"),
    ({"targets": torch.zeros(4)}, TypeError, "targets: expected int64 or int32, got torch.float32"),
    ({"targets": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"targets: expected shape \[M\]"),
    ({"targets": torch.zeros(5, dtype=torch.int64)}, ValueError, r"targets: expected M = 4 .*no index.*got 5"),
    ({"targets": torch.tensor([0, 1, 10, 2])}, ValueError, r"targets: .*\[0, V = 10\).*got 10 at entry 2"),
    ({"targets": torch.tensor([0, -1, 1, 2])}, ValueError, r"targets: .*ignore_index = -100, got -1 at entry 1"),
    ({"targets": torch.tensor([0, 2**62, 1, 2])}, ValueError, "targets: .*got 4611686018427387904"),
    ({"targets": torch.tensor([0, -(2**63), 1, 2])}, ValueError, "targets: .*got -9223372036854775808"),
    ({"index": torch.zeros(4)}, TypeError, "index: expected int64 or int32"),
    ({"index": torch.zeros(3, dtype=torch.int64)}, ValueError, "index: expected M = 4 .*got 3"),
    ({"index": torch.tensor([0, 1, 4, 0])}, ValueError, r"index: expected a row of hidden in \[0, T = 4\), got 4 at"),
    ({"index": torch.tensor([0, -1, 3, 0])}, ValueError, "index: .*got -1 at entry 1"),
    ({"token_weight": torch.ones(4, dtype=torch.int64)}, TypeError, "token_weight: expected float32"),
    ({"token_weight": torch.ones(3)}, ValueError, "token_weight: expected M = 4 .*got 3"),
    ({"token_weight": torch.ones(4, requires_grad=True)}, ValueError, "token_weight: expected a constant"),
    ({"bias": torch.zeros(9)}, ValueError, r"bias: expected V = 10 .*got 9"),
    ({"bias": torch.zeros(10, dtype=torch.float64)}, TypeError, "bias: expected hidden's dtype"),
    ({"label_smoothing": 1.0}, ValueError, r"label_smoothing: expected a number in \[0, 1\), got 1.0"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing: "),
    ({"label_smoothing": float("nan")}, ValueError, "label_smoothing: .*got nan"),
    ({"label_smoothing": "0.1"}, TypeError, "label_smoothing: expected a number, got str"),
    ({"ignore_index": 1.0}, TypeError, "ignore_index: expected an int, got float"),
    ({"reduction": "average"}, ValueError, "reduction: expected one of mean, sum, none, got 'average'"),
    ({"divisor": 2.0}, ValueError, "divisor: expected reduction='sum' with it, got reduction='mean'"),
    ({"divisor": 0.0, "reduction": "sum"}, ValueError, "divisor: expected a positive finite number, got 0.0"),
    ({"divisor": "2", "reduction": "sum"}, TypeError, "divisor: expected a number or a tensor"),
    ({"divisor": torch.ones(1), "reduction": "sum"}, ValueError, "divisor: expected shape"),
    ({"divisor": torch.tensor(-1.0), "reduction": "sum"}, ValueError, "divisor: .*got -1.0"),
    ({"divisor": torch.tensor(1), "reduction": "sum"}, TypeError, "divisor: expected float32"),
    ({"backend": "cuda"}, ValueError, "backend: expected one of auto, triton, torch, got 'cuda'"),
]


@pytest.mark.parametrize(
    "changes, error, message", REFUSALS, ids=[f"{i}-{next(iter(r[0]))}" for i, r in enumerate(REFUSALS)]
)
def test_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        refused(**changes)


def test_refuses_float64_on_triton(device):
    hidden, weight, targets = inputs(dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match="hidden: backend 'triton' takes float32, float16 or bfloat16, got float64"):
        linear_cross_entropy(hidden, weight, targets, backend="triton")


@pytest.mark.parametrize("value", ["many", "-1", "nan", "inf"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_refuses_a_wrong_budget(backend, value, device, monkeypatch):
    monkeypatch.setenv("CONCEPTRON_LCE_CHUNK_MB", value)
    with pytest.raises(ValueError, match=f"CONCEPTRON_LCE_CHUNK_MB: expected a number of megabytes.*got '{value}'"):
        linear_cross_entropy(*inputs(device=device), backend=backend)


def test_extreme_targets_are_words_or_ignored(device):
    hidden, weight, _ = inputs(4, 8, 10, device=device)
    least, most = -(2**63), 2**63 - 1
    for ignored in (least, most, -1, 0, 9):
        targets = torch.tensor([0, 9, 5, ignored], device=device)
        expected = F.cross_entropy(F.linear(hidden, weight)[targets != ignored], targets[targets != ignored])
        for backend in ("torch", "triton"):
            loss = linear_cross_entropy(hidden, weight, targets, ignore_index=ignored, backend=backend)
            torch.testing.assert_close(loss, expected)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operator returned."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = (t for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor))
        self.num_bytes = max(self.num_bytes, *(t.numel() * t.itemsize for t in made), 0)
        return out


@pytest.mark.parametrize("mode", ["torch", "chunks", "streamed"])
@pytest.mark.parametrize("wanted", [True, False])
def test_never_holds_the_logits(mode, wanted, device, monkeypatch):
    from conceptron.kernels.linear_cross_entropy import eager, modes

    num_rows, num_words, width = 300, 320, 16
    logits_bytes = num_rows * num_words * 4
    budget = 0 if mode == "streamed" else 0.17  # MB
    monkeypatch.setenv("CONCEPTRON_LCE_CHUNK_MB", str(budget))
    hidden, weight, targets = inputs(num_rows, width, num_words, device=device)
    ones = torch.ones(num_rows, device=device)
    forward = eager.forward if mode == "torch" else modes.forward
    with torch.no_grad(), Largest() as seen:
        forward(hidden, weight, targets, ones, None, weight[:, 0], 0.1, -100, (wanted,) * 3)
    few_splits = 2 * num_rows * width * 4
    assert seen.num_bytes <= max(budget * 2**20, num_words * width * 4, few_splits) < logits_bytes / 2


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_peak_memory_of_a_step(reduction, monkeypatch):
    """torch's own account of the CPU allocator, forward and backward."""
    monkeypatch.setenv("CONCEPTRON_LCE_CHUNK_MB", "0.5")
    hidden, weight, targets = inputs(1024, 16, 2048)
    logits_bytes = 1024 * 2048 * 4

    def largest(step):
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            step()
        held = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return peak

    ours = largest(lambda: linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum().backward())
    naive = largest(lambda: F.cross_entropy(F.linear(hidden, weight), targets, reduction=reduction).sum().backward())
    assert naive > logits_bytes  # the account sees logits
    assert ours < logits_bytes / 4


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("index", [False, True])
def test_opcheck(backend, index, device):
    hidden, weight, targets = inputs(9, 16, 50, device=device)
    chosen = torch.randint(9, (9,), device=device) if index else None
    bias = torch.randn(50, device=device) if index else None
    arguments = (hidden.detach(), weight.detach(), targets, torch.rand(9, device=device), chosen, bias, 0.1, -100)
    for grads in ((True, True, index), (False, False, False)):
        torch.library.opcheck(OPS.linear_cross_entropy, (*arguments, *grads, backend))
    rows = torch.randint(12, (9,), device=device)
    torch.library.opcheck(OPS.linear_cross_entropy_scatter, (hidden.detach(), rows, 12))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiles_once_for_every_length(backend, reduction, device):
    torch._dynamo.reset()

    def loss(hidden, weight, targets, index, divisor):
        options = {"divisor": divisor} if reduction == "sum" else {}
        out = linear_cross_entropy(
            hidden, weight, targets, index=index, label_smoothing=0.1, reduction=reduction, backend=backend, **options
        )
        return out * 2

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=None)
    _, weight, _ = inputs(device=device)
    for step, num_rows in enumerate((33, 40, 51, 7)):
        hidden, _, targets = inputs(num_rows, device=device)
        index = torch.arange(num_rows, device=device).flip(0)
        arguments = (hidden, weight, targets, index, torch.tensor(5.0))
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            ours, expected = compiled(*arguments), loss(*arguments)
        assert torch.equal(ours, expected)
        grads = torch.autograd.grad(ours.sum(), (hidden, weight))
        for a, b in zip(grads, torch.autograd.grad(expected.sum(), (hidden, weight)), strict=True):
            assert torch.equal(a, b)


def test_checks_values_when_compiled():
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    hidden, weight, targets = inputs()
    targets[5] = 50
    with pytest.raises(ValueError, match=r"targets: .*got 50 at entry 5"):
        compiled(hidden, weight, targets)


def test_autocast_rounds_the_inputs_and_not_the_gradients():
    hidden, weight, targets = inputs(33, 16, 50)
    bias = torch.zeros(50, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, bias=bias)
        assert F.linear(hidden, weight).dtype == torch.bfloat16
    leaves = (hidden, weight, bias)
    rounded = [leaf.detach().bfloat16().float().requires_grad_() for leaf in leaves]
    expected = F.cross_entropy(F.linear(*rounded), targets)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, rounded), strict=True):
        torch.testing.assert_close(a, b)
    double = inputs(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_cross_entropy(*double).dtype == torch.float64


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_second_derivative(reduction):
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: a second derivative was asked for"):
        (grad.square().sum() + hidden.sum()).backward()


def test_backward_twice_with_a_kept_graph():
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for a, b in zip(torch.autograd.grad(loss * 3, (hidden, weight)), first, strict=True):
        torch.testing.assert_close(a, 3 * b)


def test_every_build_is_complete():
    from conceptron.kernels.linear_cross_entropy import modes

    builds = modes.builds()
    names = [(build.name, build.archs) for build in builds]
    assert len(set(names)) == len(names)
    for build in builds:
        assert set(build.signature) == set(build.kernel.arg_names), build.name
        constants = {name for name, kind in build.signature.items() if kind == "constexpr"}
        assert constants == set(build.constants), build.name
