"""linear_cross_entropy against its float64 oracle and against torch, in every mode; interpreted without a GPU."""

import math

import pytest
import torch
import torch.nn.functional as F

from conceptron.kernels.linear_cross_entropy import eager as torch_backend
from conceptron.kernels.linear_cross_entropy import library, linear_cross_entropy
from conceptron.kernels.linear_cross_entropy.reference import linear_cross_entropy as reference

BUDGETS = {"torch": "0.01", "chunks": "0.01", "streamed": "0"}  # MB: small enough that every mode takes several chunks
MODES = tuple(BUDGETS)


@pytest.fixture(params=MODES)
def mode(request, monkeypatch):
    monkeypatch.setenv("CONCEPTRON_LCE_CHUNK_MB", BUDGETS[request.param])
    return request.param


@pytest.fixture
def poisoned():
    """Every torch.empty holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def backend(mode):
    return "torch" if mode == "torch" else "triton"


def problem(device, num_hidden, num_rows, width, num_words, dtype=torch.float32, *, index=False, bias=True, spread=1.0):
    """hidden, weight, bias or None, targets with ignored rows, index with repeats or None, token weights with zeros."""
    g = torch.Generator().manual_seed(num_rows * 1000 + num_words)
    hidden = torch.randn(num_hidden, width, generator=g)
    weight = torch.randn(num_words, width, generator=g) * spread / width**0.5
    offsets = torch.randn(num_words, generator=g)
    targets = torch.randint(num_words, (num_rows,), generator=g)
    targets[:1], targets[-1:] = num_words - 1, 0
    targets[3::5] = -100
    shares = torch.rand(num_rows, generator=g) * 10
    shares[4::7] = 0
    chosen = torch.randint(num_hidden, (num_rows,), generator=g) if index and num_hidden else None
    leaves = [t.to(device, dtype).requires_grad_() for t in (hidden, weight, offsets)]
    rest = [None if t is None else t.to(device) for t in (targets, chosen, shares)]
    return leaves[0], leaves[1], leaves[2] if bias else None, *rest


def differentiate(operator, leaves, targets, upstream=None, **options):
    """The loss and its gradients with respect to hidden, weight and bias (None where absent or constant)."""
    hidden, weight, bias = leaves
    loss = operator(hidden, weight, targets, bias=bias, **options)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    grads = iter(torch.autograd.grad(loss, wanted, upstream))
    return loss.detach(), *(next(grads) if leaf is not None and leaf.requires_grad else None for leaf in leaves)


def doubled(leaves):
    return [None if leaf is None else leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]


def agree(no_worse, ours, eager, truth, slack=4.0):
    for name, a, b, c in zip(("loss", "dhidden", "dweight", "dbias"), ours, eager, truth, strict=True):
        if c is None:
            assert a is None, name
        else:
            no_worse(name, a, b, c, slack)


SHAPES = [  # T, M, d, V, index, bias, smoothing
    (1, 1, 32, 50, False, True, 0.1),
    (33, 33, 48, 129, False, False, 0.0),
    (20, 33, 48, 257, True, True, 0.1),
    (150, 140, 32, 129, True, False, 0.1),
    (33, 33, 17, 50, False, True, 0.0),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
def test_matches_the_oracle(mode, shape, device, no_worse, poisoned):
    """Each shape and each mode meet every reduction, and each other in one of them."""
    *sizes, index, bias, smoothing = shape
    reduction = ("mean", "sum", "none")[(SHAPES.index(shape) + MODES.index(mode)) % 3]
    *leaves, targets, chosen, shares = problem(device, *sizes, index=index, bias=bias)
    options = {"index": chosen, "token_weight": shares, "label_smoothing": smoothing, "reduction": reduction}
    upstream = (
        torch.linspace(0.5, 2, sizes[1], device=device) if reduction == "none" else torch.tensor(3.0, device=device)
    )
    ours = differentiate(linear_cross_entropy, leaves, targets, upstream, backend=backend(mode), **options)
    eager = differentiate(reference, leaves, targets, upstream, **options)
    truth = differentiate(reference, doubled(leaves), targets, upstream, **options)
    agree(no_worse, ours, eager, truth)
    assert float((ours[0].double() - truth[0]).abs().max()) <= 1e-6 * float(truth[0].abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_other_dtypes(mode, dtype, device, no_worse, poisoned):
    if dtype == torch.float64 and mode != "torch":
        pytest.skip("the Triton backend refuses float64: test_linear_cross_entropy_door.py")
    *leaves, targets, chosen, shares = problem(device, 20, 33, 48, 257, dtype, index=True)
    options = {"index": chosen, "token_weight": shares, "label_smoothing": 0.1}
    ours = differentiate(linear_cross_entropy, leaves, targets, backend=backend(mode), **options)
    eager = differentiate(reference, leaves, targets, **options)
    truth = differentiate(reference, doubled(leaves), targets, **options)
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # float64: eager is the truth. chunks stores bfloat16 for float16, which the interpreter moreover truncates.
    slack = {torch.float16: 16.0 if mode == "chunks" else 4.0, torch.bfloat16: 4.0, torch.float64: 64.0}[dtype]
    agree(no_worse, ours, eager, truth, slack)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_matches_torch_itself(mode, reduction, device):
    """Not our oracle: the composition that a user would write."""
    *leaves, targets, chosen, _ = problem(device, 20, 40, 32, 70, index=True)
    targets[::3] = 7  # and 7 is to be ignored

    def composed(hidden, weight, targets, bias, index, **options):
        return F.cross_entropy(F.linear(hidden[index], weight, bias), targets.clamp(min=0), **options)

    targets = targets.clamp(min=0)
    options = {"index": chosen, "label_smoothing": 0.2, "reduction": reduction, "ignore_index": 7}
    ours = differentiate(linear_cross_entropy, leaves, targets, backend=backend(mode), **options)
    for a, b in zip(ours, differentiate(composed, leaves, targets, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_divisor(mode, device):
    *leaves, targets, _, shares = problem(device, 33, 33, 16, 50)
    common = {"token_weight": shares, "reduction": "sum", "backend": backend(mode)}
    plain = differentiate(linear_cross_entropy, leaves, targets, **common)
    for divisor in (40.0, torch.tensor(40.0, device=device), torch.tensor(40.0, dtype=torch.float64)):
        divided = differentiate(linear_cross_entropy, leaves, targets, divisor=divisor, **common)
        for a, b in zip(divided, plain, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a * 40, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", ["none at all", "all ignored"])
def test_nothing_to_predict(mode, rows, reduction, device, poisoned):
    count = 0 if rows == "none at all" else 5
    *leaves, targets, _, shares = problem(device, count, count, 16, 50)
    targets[:] = -100
    divisor = torch.tensor(0.0, device=device) if reduction == "sum" else None  # of a view without targets
    options = {"reduction": reduction, "divisor": divisor, "label_smoothing": 0.1, "token_weight": shares}
    loss, *grads = differentiate(linear_cross_entropy, leaves, targets, backend=backend(mode), **options)
    assert loss.shape == ((count,) if reduction == "none" else ())
    assert not loss.any()
    for leaf, grad in zip(leaves, grads, strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


def test_ignored_rows_may_hold_nan(mode, device, poisoned):
    *leaves, targets, _, shares = problem(device, 33, 33, 16, 50)
    targets[0] = -100  # row 0 is what kernels read where there is nothing to read
    options = {"token_weight": shares, "label_smoothing": 0.1, "backend": backend(mode)}
    clean = differentiate(linear_cross_entropy, leaves, targets, **options)
    with torch.no_grad():
        leaves[0][targets == -100] = float("nan")
    for a, b in zip(differentiate(linear_cross_entropy, leaves, targets, **options), clean, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter, where a kernel overflows knowingly
@pytest.mark.parametrize("spread", [20.0, 60.0, 600.0])
def test_targets_of_no_probability(mode, spread, device, no_worse):
    """Losses of hundreds and thousands of nats in some rows, where exponentials at the target's logit overflow."""
    *leaves, targets, _, shares = problem(device, 33, 33, 32, 129, spread=spread)
    with torch.no_grad():
        leaves[0][::2] /= spread
    options = {"token_weight": shares, "label_smoothing": 0.1}
    truth = differentiate(reference, doubled(leaves), targets, **options)
    nll = reference(*leaves[:2], targets, bias=leaves[2], reduction="none")
    assert nll.max() > 2 * spread and (nll < 10).sum() > 8
    ours = differentiate(linear_cross_entropy, leaves, targets, backend=backend(mode), **options)
    # streamed computes its logits twice, and may so be off by a rounding of the largest in a probability of one
    largest = (doubled(leaves)[0] @ doubled(leaves)[1].t()).detach().abs().max()
    slack = float(largest) if mode == "streamed" else 4.0
    agree(no_worse, ours, differentiate(reference, leaves, targets, **options), truth, slack)


def test_targets_of_no_doubt(mode, device):
    """Losses far below one rounding unit keep their relative accuracy in the kernels, which sum all but the target."""
    if mode == "torch":
        pytest.skip("as accurate as torch's cross_entropy, no more")
    targets = torch.arange(20, device=device)
    weight = torch.eye(20, device=device)
    hidden = torch.eye(20, device=device) * torch.linspace(1, 40, 20, device=device)[:, None]
    loss = linear_cross_entropy(hidden, weight, targets, reduction="none", backend="triton")
    exact = torch.log1p(19 * torch.exp(-hidden.diagonal().double()))
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)


def test_forbidden_words(mode, device):
    """A bias of -inf takes a word out, as with torch; a target that is one costs inf."""
    *leaves, targets, _, _ = problem(device, 33, 33, 16, 50)
    with torch.no_grad():
        leaves[2][20:] = float("-inf")
    targets %= 20
    ours = differentiate(linear_cross_entropy, leaves, targets, backend=backend(mode))
    for a, b in zip(ours, differentiate(reference, leaves, targets), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)
    targets[2] = 30
    loss = linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], reduction="none", backend=backend(mode))
    assert loss[2] == math.inf and torch.isfinite(loss[[0, 1, 4]]).all()


def test_out_of_range_without_checks_is_nan(device, monkeypatch):
    """What a GPU does unless CONCEPTRON_CHECK=1: nothing is read out of bounds and the loss tells."""
    monkeypatch.setattr(library, "_check_values", lambda *_: None)
    for megabytes in ("256", "0"):
        monkeypatch.setenv("CONCEPTRON_LCE_CHUNK_MB", megabytes)
        for name, value in (("targets", 50), ("targets", -1), ("targets", 2**40), ("index", 20), ("index", -1)):
            *leaves, targets, chosen, _ = problem(device, 20, 33, 16, 50, index=True)
            {"targets": targets, "index": chosen}[name][7] = value
            for reduction in ("none", "mean"):
                loss = linear_cross_entropy(*leaves[:2], targets, index=chosen, reduction=reduction, backend="triton")
                others = loss[torch.arange(33, device=device) != 7] if reduction == "none" else loss.new_zeros(())
                assert torch.isfinite(others).all()
                assert loss.flatten()[-26 if reduction == "none" else 0].isnan(), (name, value)


def test_strides_and_offsets(mode, device):
    """Transposed, sliced, expanded and misaligned inputs give the very bits of contiguous ones."""
    *leaves, targets, _, shares = problem(device, 33, 33, 32, 64)
    plain = [leaf.detach() for leaf in leaves]
    options = {"label_smoothing": 0.1, "reduction": "none", "backend": backend(mode)}
    expected = differentiate(linear_cross_entropy, leaves, targets, token_weight=shares, **options)

    def transposed(t):
        return t.t().contiguous().t()

    def odd(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    def strided(t):
        return torch.stack([t, t.new_full(t.shape, float("nan"))], dim=-1)[..., 0]

    for change in (transposed, odd, strided):
        inputs = [change(t).requires_grad_() if t.ndim == 2 else odd(t).requires_grad_() for t in plain]
        twice = torch.stack([targets, targets], 1)[:, 0], torch.stack([shares, shares], 1)[:, 0]
        found = differentiate(linear_cross_entropy, inputs, twice[0], token_weight=twice[1], **options)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    summed = linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], token_weight=shares, **options).sum()
    for a, b in zip(torch.autograd.grad(summed, leaves), expected[1:], strict=True):  # the upstream has stride 0
        assert torch.equal(a, b)


def test_same_bits_every_time(mode, device):
    *leaves, targets, chosen, shares = problem(device, 20, 140, 32, 129, index=True)
    options = {"index": chosen, "token_weight": shares, "label_smoothing": 0.1, "backend": backend(mode)}
    first = differentiate(linear_cross_entropy, leaves, targets, **options)
    for a, b in zip(differentiate(linear_cross_entropy, leaves, targets, **options), first, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_partial_gradients(mode, reduction, device):
    *leaves, targets, _, _ = problem(device, 33, 33, 16, 50)
    options = {"label_smoothing": 0.1, "reduction": reduction, "backend": backend(mode)}
    expected = differentiate(linear_cross_entropy, leaves, targets, **options)
    for trained in ("100", "010", "001", "110"):
        for leaf, flag in zip(leaves, trained, strict=True):
            leaf.requires_grad_(flag == "1")
        found = differentiate(linear_cross_entropy, leaves, targets, **options)
        for a, b, flag in zip(found, expected, "1" + trained, strict=True):
            assert (a is None) == (flag == "0"), trained
            assert a is None or torch.equal(a, b), trained


def test_tied_weight(mode, device):
    *leaves, targets, chosen, _ = problem(device, 50, 33, 16, 50, index=True)
    table = leaves[1]

    def loss(operator, table, **options):
        return operator(table * 2, table, targets, index=chosen, label_smoothing=0.1, **options)

    (ours,) = torch.autograd.grad(loss(linear_cross_entropy, table, backend=backend(mode)), table)
    (theirs,) = torch.autograd.grad(loss(reference, table), table)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_budget_only_changes_rounding(device, monkeypatch):
    *leaves, targets, chosen, shares = problem(device, 300, 300, 32, 129, index=True)
    for which in ("torch", "triton"):
        results = []
        for megabytes in ("0.001", "0.02", "8"):
            monkeypatch.setenv("CONCEPTRON_LCE_CHUNK_MB", megabytes)
            options = {"index": chosen, "token_weight": shares, "label_smoothing": 0.1, "backend": which}
            results.append(differentiate(linear_cross_entropy, leaves, targets, **options))
        for other in results[1:]:
            for a, b in zip(other, results[0], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_no_gradient_where_none_can_be_wanted(device, monkeypatch):
    asked = []
    forward = torch_backend.forward

    def spy(*arguments):
        asked.append(arguments[-1])
        return forward(*arguments)

    monkeypatch.setattr(torch_backend, "forward", spy)
    *leaves, targets, _, _ = problem(device, 5, 5, 16, 50)
    with torch.no_grad():
        linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], backend="torch")
    linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], reduction="none", backend="torch")
    linear_cross_entropy(*leaves[:2], targets, backend="torch")
    assert asked == [(False, False, False), (False, False, False), (True, True, False)]


GPU = pytest.mark.gpu


@GPU
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("sizes", [(4096, 4099, 512, 50368), (1024, 1000, 768, 151936), (513, 700, 2048, 50257)])
@pytest.mark.parametrize("megabytes", ["256", "64", "0"])
def test_bfloat16_at_real_sizes(megabytes, sizes, smoothing, no_worse, monkeypatch):
    monkeypatch.setenv("CONCEPTRON_LCE_CHUNK_MB", megabytes)
    *leaves, targets, chosen, shares = problem(torch.device("cuda"), *sizes, torch.bfloat16, index=True, spread=4.0)
    options = {"index": chosen, "token_weight": shares, "label_smoothing": smoothing}
    ours = differentiate(linear_cross_entropy, leaves, targets, backend="triton", **options)
    eager = differentiate(reference, leaves, targets, **options)
    truth = differentiate(reference, doubled(leaves), targets, **options)
    agree(no_worse, ours, eager, truth)
    assert abs(float(ours[0]) - float(truth[0])) <= 1e-6 * float(truth[0])
    for a, b in zip(
        differentiate(linear_cross_entropy, leaves, targets, backend="triton", **options), ours, strict=True
    ):
        assert torch.equal(a, b)


@GPU
def test_memory_on_a_gpu():
    *leaves, targets, _, shares = problem(torch.device("cuda"), 8192, 8192, 512, 50368, torch.bfloat16, bias=False)
    leaves[1].detach()[:64] @ leaves[1].detach()[:64].t()  # cuBLAS takes its workspace, once for the process
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(*leaves[:2], targets, token_weight=shares, label_smoothing=0.1).backward()
    assert torch.cuda.max_memory_allocated() - before <= 400e6


@GPU
@pytest.mark.parametrize("megabytes", ["256", "0"])
def test_graph_capture(megabytes, monkeypatch):
    monkeypatch.setenv("CONCEPTRON_LCE_CHUNK_MB", megabytes)
    *leaves, targets, chosen, shares = problem(torch.device("cuda"), 500, 700, 256, 5000, torch.bfloat16, index=True)

    def step():
        return differentiate(
            linear_cross_entropy, leaves, targets, index=chosen, token_weight=shares, label_smoothing=0.1
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[0].mul_(0.5)
        targets.copy_(targets.roll(1))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)
