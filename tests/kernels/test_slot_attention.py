"""Slot attention: both backends against the float64 oracle, and the oracle against a double loop."""

import math
from itertools import pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from conceptron.kernels.bixt_attention import eager as layouts
from conceptron.kernels.slot_attention import backward, forward, library, slot_attention
from conceptron.kernels.slot_attention.reference import reference_slot_attention

NAMES = "out", "mass", "dq", "dk", "dv"
LENGTHS = {
    "ragged": [33, 0, 17], "long": [97], "even": [16, 16], "pair": [12, 0, 9], "short": [1, 2, 0, 15],
    "none": [], "empty": [0, 0],
}  # fmt: skip
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def poison():
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def boundaries(lengths, device):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def draw(*shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def make(lengths, C, heads, D, dtype, device):
    """q, k, v; ``heads`` is (H, Hkv)."""
    shapes = [(len(lengths), C, heads[0], D)] + [(sum(lengths), heads[1], D)] * 2
    return [draw(*shape, dtype=dtype, device=device, seed=i) for i, shape in enumerate(shapes)]


def upstream(q):
    """Gradients of out and mass."""
    B, C, H, _ = q.shape
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    return [
        draw(*q.shape, dtype=q.dtype, device=q.device, seed=8),
        draw(B, H, C, dtype=exact, device=q.device, seed=9),
    ]


def through_autograd(function, inputs, upstream, dtype=None):
    """Both outputs, mass in at least float32, and the three gradients of ``function``."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    gradients = torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)])
    out, mass = (x.detach() for x in outputs)
    return [out, mass if mass.dtype == torch.float64 else mass.float(), *gradients]


def oracle(inputs, cu_seqlens, options, upstream, dtype=None):
    return through_autograd(lambda *x: reference_slot_attention(*x, cu_seqlens, *options), inputs, upstream, dtype)


def launch(inputs, cu_seqlens, max_seqlen, options, upstream, chunk=None, max_tile=None):
    """The kernels without the door, so that a test chooses chunks and tiles."""
    out, mass = forward.forward(*inputs, cu_seqlens, max_seqlen, *options, chunk, max_tile)
    return [out, mass, *backward.backward(
        *upstream, *inputs, out, mass, cu_seqlens, max_seqlen, *options, chunk, max_tile
    )]  # fmt: skip


def compare(no_worse, ours, inputs, cu_seqlens, options, gradients, slack=None):
    dtype = inputs[0].dtype
    plain = oracle(inputs, cu_seqlens, options, gradients)
    truth = oracle(inputs, cu_seqlens, options, gradients, torch.float64)
    slack = slack or (4.0 if dtype == torch.float32 else 1.0)  # the exponent is rounded once more, in base 2
    for name, *three in zip(NAMES, ours, plain, truth, strict=True):
        no_worse(name, *three, slack=slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("lengths", "C", "heads", "D", "chunk", "max_tile", "of_float32"),  # how that is normalised; others the other way
    [
        ("ragged", 7, (2, 2), 32, None, None, "mean"),  # masks in both directions, an empty sequence between two others
        ("pair", 7, (4, 2), 32, 8, None, "sum"),  # several chunks, partly filled; query heads that share a key head
        ("long", 33, (1, 1), 64, 32, 16, "mean"),  # three tiles of concepts, the last with one
        ("even", 32, (2, 1), 20, None, 16, "sum"),  # two full tiles; a width that is no power of two
        ("short", 1, (1, 1), 16, 8, None, "mean"),
        ("ragged", 16, (1, 1), 100, 24, None, "sum"),  # a wide head, a full tile; a chunk that is no multiple of a tile
    ],
)
def test_triton(lengths, C, heads, D, chunk, max_tile, of_float32, dtype, device, no_worse):
    lengths, normalize = LENGTHS[lengths], of_float32
    if dtype != torch.float32:
        normalize = "sum" if of_float32 == "mean" else "mean"
    inputs, cu_seqlens = make(lengths, C, heads, D, dtype, device), boundaries(lengths, device)
    options = 1.3 / math.sqrt(D), normalize, 1e-8
    gradients = upstream(inputs[0])
    ours = launch(inputs, cu_seqlens, max(lengths), options, gradients, chunk, max_tile)
    compare(no_worse, ours, inputs, cu_seqlens, options, gradients)


@pytest.mark.parametrize("normalize", ["mean", "sum"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_torch_backend(lengths, dtype, normalize, device, no_worse):
    lengths = LENGTHS[lengths]
    inputs, cu_seqlens = make(lengths, 5, (6, 2), 12, dtype, device), boundaries(lengths, device)
    gradients = upstream(inputs[0])
    longest = max(lengths, default=0) + 3
    options = {"scale": 0.4, "normalize": normalize, "eps": 1e-3, "backend": "torch"}
    ours = through_autograd(lambda *x: slot_attention(*x, cu_seqlens, longest, **options), inputs, gradients)
    if lengths:
        # sums in another order, and products scaled before instead of after
        slack = 16.0 if dtype == torch.float64 else 8.0  # float64 is its own truth: plain torch has no error there
        compare(no_worse, ours, inputs, cu_seqlens, (0.4, normalize, 1e-3), gradients, slack)
    else:
        assert [list(x.shape) for x in ours[:2]] == [[0, 5, 6, 12], [0, 6, 5]]


def test_layouts_of_the_torch_backend_agree(device, monkeypatch):
    lengths = LENGTHS["ragged"]
    inputs, cu_seqlens = make(lengths, 5, (2, 1), 8, torch.float64, device), boundaries(lengths, device)
    results = []
    for large in (0, 10**9):
        monkeypatch.setattr(layouts, "LARGE", large)
        results.append(slot_attention(*inputs, cu_seqlens, 33, backend="torch"))
    for one_by_one, padded in zip(*results, strict=True):
        torch.testing.assert_close(one_by_one, padded, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", ["mean", "sum"])
def test_oracle_is_the_formula(normalize):
    lengths, (C, H, D), (scale, eps) = [3, 0, 2], (2, 2, 3), (0.7, 0.01)
    q, k, v = make(lengths, C, (H, 1), D, torch.float64, "cpu")
    cu_seqlens = boundaries(lengths, "cpu")
    out, mass = torch.zeros_like(q), torch.zeros(3, H, C, dtype=torch.float64)
    for b, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        for h in range(H):

            def share(c, n, b=b, h=h):
                scores = [math.exp(scale * sum(float(q[b, e, h, d] * k[n, 0, d]) for d in range(D))) for e in range(C)]
                return scores[c] / sum(scores)

            for c in range(C):
                mass[b, h, c] = sum(share(c, n) for n in range(start, end))
                if normalize == "mean":
                    weights = {n: share(c, n) + eps for n in range(start, end)}
                    divisor = sum(weights.values())
                else:
                    weights = {n: share(c, n) for n in range(start, end)}
                    divisor = (end - start) / C
                for n, weight in weights.items():
                    out[b, c, h] += weight / divisor * v[n, 0]
    ours = reference_slot_attention(q, k, v, cu_seqlens, scale, normalize, eps)
    torch.testing.assert_close(ours, (out, mass), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", ["mean", "sum"])
def test_oracle_gradient(normalize):
    lengths = [3, 0, 2]
    leaves = [x.requires_grad_() for x in make(lengths, 2, (2, 1), 3, torch.float64, "cpu")]
    cu_seqlens = boundaries(lengths, "cpu")
    assert torch.autograd.gradcheck(lambda *x: reference_slot_attention(*x, cu_seqlens, 0.7, normalize, 0.01), leaves)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("C", [5, 70])  # within a tile, and over two
def test_every_token_is_given_away_once(C, backend, device):
    lengths = [19, 0, 30]
    inputs, cu_seqlens = make(lengths, C, (2, 2), 16, torch.float32, device), boundaries(lengths, device)
    _, mass = slot_attention(*inputs, cu_seqlens, 30, backend=backend)
    expected = torch.tensor(lengths, dtype=torch.float32, device=device)[:, None].expand(3, 2)
    torch.testing.assert_close(mass.sum(2), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_concept_that_owns_nothing(dtype, backend, device):
    """Its mean is that of all tokens, because of eps; without eps, or in a sum, it reads nothing. No NaN either way."""
    cu_seqlens = boundaries([12, 9], device)
    k, v = (draw(21, 1, 16, dtype=dtype, device=device, seed=i) for i in (1, 2))
    k[..., 0] = 8.0
    q = torch.zeros(2, 3, 1, 16, dtype=dtype, device=device)
    q[:, 1, :, 0] = -80.0  # its scores lie 640 below the others': exp(-640) = 0
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for normalize, eps in (("mean", 1e-8), ("mean", 0.0), ("sum", 1e-8)):
        options = {"scale": 1.0, "normalize": normalize, "eps": eps, "backend": backend}
        out, mass = slot_attention(*leaves, cu_seqlens, 12, **options)
        assert (mass[:, :, 1] == 0).all()
        expected = torch.zeros_like(out[:, 1])
        if eps and normalize == "mean":
            expected = torch.stack([v[:12].float().mean(0), v[12:].float().mean(0)]).to(dtype)
        torch.testing.assert_close(out[:, 1], expected, rtol=2e-3, atol=1e-3)
        gradients = torch.autograd.grad([out, mass], leaves, upstream(q))
        assert all(torch.isfinite(x).all() for x in (out, mass, *gradients))


def test_small_float16_gradients(device):
    """Terms of dq that float16 does not hold, each 1 / N of a sum that it does."""
    cu_seqlens = boundaries([97], device)
    q, k, v = (torch.ones(shape, dtype=torch.float16, device=device) for shape in ((1, 2, 1, 16), *[(97, 1, 16)] * 2))
    k[..., 0] = 30.0
    q.requires_grad_()
    out, _ = slot_attention(q, k, v, cu_seqlens, 97, scale=1.0, normalize="sum", backend="triton")
    upward = torch.tensor([1.0, -1.0], device=device).view(1, 2, 1, 1).expand(out.shape) * 1.37e-6
    (dq,) = torch.autograd.grad(out, q, upward.half())
    # A = 1/2, so dq_0 = sum_n A (1 - A) (dout_0 - dout_1) . v / (N / C) k = (dout_0 - dout_1) . v / 2 k
    expected = 0.5 * (upward[0, 0].half().double() - upward[0, 1].half().double()).sum() * 30.0
    assert abs(dq[0, 0, 0, 0].double() / expected - 1) < 0.03
    assert abs(dq[0, 1, 0, 0].double() / expected + 1) < 0.03


@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_eps(eps, device, no_worse):
    inputs, cu_seqlens = make([20], 4, (1, 1), 16, torch.float32, device), boundaries([20], device)
    options, gradients = (0.25, "mean", eps), upstream(inputs[0])
    ours = launch(inputs, cu_seqlens, 20, options, gradients)
    compare(no_worse, ours, inputs, cu_seqlens, options, gradients)


@pytest.mark.parametrize("normalize", ["mean", "sum"])
def test_chunks_and_tiles_change_rounding_only(normalize, device):
    lengths = [50, 5]
    inputs, cu_seqlens = make(lengths, 18, (1, 1), 16, torch.float32, device), boundaries(lengths, device)
    options, gradients = (0.25, normalize, 1e-8), upstream(inputs[0])
    one = launch(inputs, cu_seqlens, 50, options, gradients, 50)
    for chunk, max_tile in ((32, None), (9, None), (30, 16)):
        other = launch(inputs, cu_seqlens, 50, options, gradients, chunk, max_tile)
        for name, x, y in zip(NAMES, one, other, strict=True):
            assert (x - y).abs().max() <= 8 * torch.finfo(x.dtype).eps * x.abs().max(), (name, chunk, max_tile)


def test_same_bits_twice_and_under_any_strides(device):
    """Transposed, sliced, shared by the batch, at an odd offset, with an expanded gradient: strides change no bit."""
    lengths, (C, H, D) = [21, 0, 12], (5, 2, 16)
    cu_seqlens = boundaries(lengths, device)
    q = draw(C, H, D, dtype=torch.float32, device=device).expand(3, C, H, D)
    k = draw(H, sum(lengths), 2 * D, dtype=torch.float32, device=device, seed=1).chunk(2, -1)[1].transpose(0, 1)
    v = draw(1 + 33 * H * D, dtype=torch.float32, device=device, seed=2)[1:].view(33, H, D)
    copies = [x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)]

    def run(inputs, expanded):
        leaves = [x.detach().requires_grad_() for x in inputs]
        results = slot_attention(*leaves, cu_seqlens, 21, backend="triton")
        ones = [torch.ones((), device=device).expand(x.shape) for x in results]
        gradients = ones if expanded else [x.contiguous() for x in ones]
        return *results, *torch.autograd.grad(results, leaves, gradients)

    first = run(copies, False)
    for again in (run(copies, False), run((q, k, v), True)):
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("normalize", ["mean", "sum"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_sequences_without_tokens(backend, normalize, device):
    for lengths in ([0, 0], [], [0, 4]):
        leaves = [x.requires_grad_() for x in make(lengths, 3, (2, 1), 16, torch.float32, device)]
        options = {"normalize": normalize, "backend": backend}
        results = slot_attention(*leaves, boundaries(lengths, device), max(lengths, default=0), **options)
        gradients = torch.autograd.grad(results, leaves, upstream(leaves[0]))
        empty = torch.tensor([n == 0 for n in lengths], dtype=torch.bool, device=device)
        assert all(not x[empty].any() for x in (*results, gradients[0]))
        assert all(torch.isfinite(x).all() for x in (*results, *gradients))


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_result(used, device):
    """A result that nobody uses has no gradient; the other's must not change."""
    leaves = [x.requires_grad_() for x in make([11, 4], 3, (1, 1), 16, torch.float32, device)]
    cu_seqlens = boundaries([11, 4], device)
    ours, exact = (slot_attention(*leaves, cu_seqlens, 11, backend=backend)[used] for backend in ("triton", "torch"))
    gradient = upstream(leaves[0])[used]
    for x, y in zip(*(torch.autograd.grad(o, leaves, gradient, materialize_grads=True) for o in (ours, exact)),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_second_derivative_raises(device):
    leaves = [x.requires_grad_() for x in make([5], 3, (1, 1), 16, torch.float32, device)]
    out, _ = slot_attention(*leaves, boundaries([5], device), 5, backend="triton")
    gradients = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(gradients[0].sum(), leaves)


def test_registration(device):
    inputs, cu_seqlens = make([5, 3], 3, (2, 1), 16, torch.float32, device), boundaries([5, 3], device)
    options = cu_seqlens, 5, 0.25, "mean", 1e-8
    torch.library.opcheck(torch.ops.conceptron.slot_attention.default, (*inputs, *options))
    saved = torch.ops.conceptron.slot_attention(*inputs, *options)
    arguments = *upstream(inputs[0]), *inputs, *saved, *options
    torch.library.opcheck(torch.ops.conceptron.slot_attention_backward.default, arguments)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiles_once_for_all_lengths(backend, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(slot_attention, fullgraph=True, backend=counter)
    for lengths in ([9, 4], [6, 5], [7, 12]):
        leaves = [x.requires_grad_() for x in make(lengths, 3, (2, 1), 16, torch.float32, device)]
        arguments, gradients = (boundaries(lengths, device), max(lengths)), upstream(leaves[0])
        ours, plain = (f(*leaves, *arguments, backend=backend) for f in (compiled, slot_attention))
        for x, y in zip(
            (*ours, *torch.autograd.grad(ours, leaves, gradients)),
            (*plain, *torch.autograd.grad(plain, leaves, gradients)),
            strict=True,
        ):
            torch.testing.assert_close(x, y)
    assert counter.frame_count <= 2  # one for the first lengths, one for any others


def test_autocast(device):
    leaves = [x.requires_grad_() for x in make([9, 4], 3, (1, 1), 16, torch.float32, device)]
    cu_seqlens = boundaries([9, 4], device)
    with torch.autocast(device.type, torch.float16):
        out, mass = slot_attention(*leaves, cu_seqlens, 9, backend="triton")
    halves = slot_attention(*(x.half() for x in leaves), cu_seqlens, 9, backend="triton")
    assert out.dtype == torch.float16 and mass.dtype == torch.float32
    assert torch.equal(out, halves[0]) and torch.equal(mass, halves[1])
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad([out, mass], leaves, upstream(out)))


REFUSED = {
    "q: expected shape": lambda a: a | {"q": a["q"][0]},
    "q: expected float32": lambda a: a | {"q": a["q"].int()},
    "q: expected C >= 1": lambda a: a | {"q": a["q"][:, :0]},
    "k: expected a number of heads that divides": lambda a: a | {"k": a["k"].repeat(1, 3, 1)},
    "k: expected D = 16": lambda a: a | {"k": a["k"][..., 1:]},
    "k: expected q's dtype": lambda a: a | {"k": a["k"].half()},
    "v: expected k's shape": lambda a: a | {"v": a["v"][1:]},
    "v: expected a tensor": lambda a: a | {"v": 3},
    "cu_seqlens: expected int32": lambda a: a | {"cu_seqlens": a["cu_seqlens"].long()},
    "cu_seqlens: expected never to decrease": lambda a: a | {"cu_seqlens": a["cu_seqlens"][[0, 2, 1]]},
    "cu_seqlens: expected its length = 3": lambda a: a | {"cu_seqlens": a["cu_seqlens"][[0, 2]], "max_seqlen": 9},
    "max_seqlen: expected at least": lambda a: a | {"max_seqlen": 4},
    "scale: expected a positive": lambda a: a | {"scale": 0.0},
    "normalize: expected one of mean, sum": lambda a: a | {"normalize": "max"},
    "eps: expected 0 <= eps < 1": lambda a: a | {"eps": -1e-8},
    "eps: expected a float": lambda a: a | {"eps": None},
    "backend: expected one of": lambda a: a | {"backend": "cuda"},
    "q: 'triton' takes": lambda a: (
        {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in a.items()}
        | {"backend": "triton"}
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message, monkeypatch, device):
    monkeypatch.setenv("CONCEPTRON_CHECK", "1")
    arguments = dict(zip("qkv", make([5, 4], 3, (4, 2), 16, torch.float32, device), strict=True))
    arguments |= {"cu_seqlens": boundaries([5, 4], device), "max_seqlen": 5}
    slot_attention(**arguments)
    if "to decrease" in message:  # the end moves too, which is refused first
        arguments |= {name: arguments[name][:5] for name in "kv"}
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        slot_attention(**REFUSED[message](arguments))


def test_builds_cover_the_tables():
    names = [build.name for build in library.builds()]
    assert len(names) == len(set(names))
    for direction, tiles in (("forward", forward.TILES), ("backward", backward.TILES)):
        for (units, wide), table in tiles.items():
            for block_c, (block_n, *_) in table.items():
                shape = f"C{block_c}xN{block_n}xD{128 if wide else 64}"
                assert any(f"/{direction}/{units}/" in name and shape in name for name in names), (units, shape)


@pytest.mark.gpu
@pytest.mark.parametrize("normalize", ["mean", "sum"])
@pytest.mark.parametrize(
    ("lengths", "C", "heads", "D"),
    [([512] * 8, 128, (8, 8), 64), ([16384], 128, (8, 2), 64), ([4096, 0, 77, 1], 64, (4, 4), 128),
     ([700, 300], 600, (4, 4), 64)],
)  # fmt: skip
def test_bfloat16_at_real_sizes(lengths, C, heads, D, normalize, no_worse):
    device = torch.device("cuda")
    inputs, cu_seqlens = make(lengths, C, heads, D, torch.bfloat16, device), boundaries(lengths, device)
    gradients, options = upstream(inputs[0]), {"normalize": normalize, "backend": "triton"}
    run = lambda *x: slot_attention(*x, cu_seqlens, max(lengths), **options)  # noqa: E731
    ours, again = through_autograd(run, inputs, gradients), through_autograd(run, inputs, gradients)
    assert all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))
    compare(no_worse, ours, inputs, cu_seqlens, (1 / math.sqrt(D), normalize, 1e-8), gradients)


@pytest.mark.gpu
def test_graph_replay_with_other_lengths():
    device = torch.device("cuda")
    inputs, cu_seqlens = make([300, 724], 64, (4, 4), 64, torch.bfloat16, device), boundaries([300, 724], device)
    leaves, gradients = [x.requires_grad_() for x in inputs], upstream(inputs[0])

    def step():
        results = slot_attention(*leaves, cu_seqlens, 1024, backend="triton")
        return *results, *torch.autograd.grad(results, leaves, gradients)

    torch.use_deterministic_algorithms(False)  # filling memory is not part of what is captured
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for lengths in ([1024, 0], [1, 1023], [500, 524]):
        cu_seqlens.copy_(boundaries(lengths, device))
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(captured, step(), strict=True)), lengths
