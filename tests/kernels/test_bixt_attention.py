"""BiXT attention: both backends against the float64 oracle, and the oracle against a double loop."""

import math
from itertools import pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from conceptron.kernels.bixt_attention import backward, bixt_attention, eager, forward, library
from conceptron.kernels.bixt_attention.reference import reference_bixt_attention

NAMES = "concept_out", "token_out", "dconcept_qk", "dconcept_v", "dtoken_qk", "dtoken_v"
LENGTHS = {"ragged": [33, 0, 17], "long": [97], "even": [16, 16], "short": [1, 2, 0, 15], "none": [], "empty": [0, 0]}
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


def make(lengths, C, H, D, dtype, device):
    """concept_qk, concept_v, token_qk, token_v."""
    shapes = [(len(lengths), C, H, D)] * 2 + [(sum(lengths), H, D)] * 2
    return [draw(*shape, dtype=dtype, device=device, seed=i) for i, shape in enumerate(shapes)]


def upstream(outputs):
    return [draw(*o.shape, dtype=o.dtype, device=o.device, seed=9 + i) for i, o in enumerate(outputs)]


def slack(dtype):
    """Float32 weights come from rounded statistics of the forward pass: a few roundings more than eager's."""
    return 8.0 if dtype == torch.float32 else 1.0


def through_autograd(function, inputs, upstream, dtype=None):
    """Both outputs and the four gradients of ``function``."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    gradients = torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)])
    return [x.detach() for x in (*outputs, *gradients)]


def oracle(inputs, cu_seqlens, scale, upstream, dtype=None):
    return through_autograd(lambda *x: reference_bixt_attention(*x, cu_seqlens, scale), inputs, upstream, dtype)


def launch(inputs, cu_seqlens, max_seqlen, scale, upstream, chunk):
    """The kernels without the door, so that a test chooses the chunks."""
    concept_out, token_out, *weights = forward.forward(*inputs, cu_seqlens, max_seqlen, scale, chunk)
    saved = concept_out, *weights, cu_seqlens, max_seqlen, scale, chunk
    return [concept_out, token_out, *backward.backward(*upstream, *inputs, *saved)]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("lengths", "C", "H", "D", "chunk"),
    [
        ("ragged", 7, 2, 32, None),  # masks in both directions, an empty sequence between two others
        ("ragged", 7, 2, 32, 16),  # the same in several chunks, some of them partly filled
        ("long", 33, 1, 64, 32),  # a tile half full of concepts
        ("even", 16, 2, 20, None),  # a full tile, a width that is no power of two
        ("short", 1, 1, 16, 8),
        ("ragged", 12, 1, 100, 24),  # a wide head; a chunk that is no multiple of a tile
    ],
)
def test_triton(lengths, C, H, D, chunk, dtype, device, no_worse):
    lengths = LENGTHS[lengths]
    inputs, cu_seqlens = make(lengths, C, H, D, dtype, device), boundaries(lengths, device)
    scale = 1.3 / math.sqrt(D)
    gradients = upstream([inputs[0], inputs[2]])
    ours = launch(inputs, cu_seqlens, max(lengths), scale, gradients, chunk)
    plain = oracle(inputs, cu_seqlens, scale, gradients)
    truth = oracle(inputs, cu_seqlens, scale, gradients, torch.float64)
    for name, *three in zip(NAMES, ours, plain, truth, strict=True):
        no_worse(name, *three, slack=slack(dtype))


def test_more_concepts_than_a_tile(device, no_worse):
    lengths = [9, 0, 20]
    inputs, cu_seqlens = make(lengths, 70, 1, 32, torch.float32, device), boundaries(lengths, device)
    assert forward.tile_of(backward.TILES, inputs[0]) is None
    gradients = upstream([inputs[0], inputs[2]])
    ours = through_autograd(lambda *x: bixt_attention(*x, cu_seqlens, 20, backend="triton"), inputs, gradients)
    plain = oracle(inputs, cu_seqlens, 1 / math.sqrt(32), gradients)
    truth = oracle(inputs, cu_seqlens, 1 / math.sqrt(32), gradients, torch.float64)
    for name, *three in zip(NAMES, ours, plain, truth, strict=True):
        no_worse(name, *three, slack=slack(torch.float32))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_torch_backend(lengths, dtype, device, no_worse):
    lengths = LENGTHS[lengths]
    inputs, cu_seqlens = make(lengths, 5, 3, 12, dtype, device), boundaries(lengths, device)
    gradients = upstream([inputs[0], inputs[2]])
    ours = through_autograd(
        lambda *x: bixt_attention(*x, cu_seqlens, max(lengths, default=0) + 3, scale=0.4, backend="torch"),
        inputs,
        gradients,
    )
    if not lengths:
        assert [list(x.shape) for x in ours[:2]] == [[0, 5, 3, 12], [0, 3, 12]]
        return
    plain = oracle(inputs, cu_seqlens, 0.4, gradients)
    truth = oracle(inputs, cu_seqlens, 0.4, gradients, torch.float64)
    for name, *three in zip(NAMES, ours, plain, truth, strict=True):
        no_worse(name, *three, slack=8.0)  # sums in another order, and products scaled before instead of after


def test_layouts_of_the_torch_backend_agree(device, monkeypatch):
    lengths = LENGTHS["ragged"]
    inputs, cu_seqlens = make(lengths, 5, 2, 8, torch.float64, device), boundaries(lengths, device)
    results = []
    for large in (0, 10**9):
        monkeypatch.setattr(eager, "LARGE", large)
        results.append(bixt_attention(*inputs, cu_seqlens, 33, backend="torch"))
    for one_by_one, padded in zip(*results, strict=True):
        torch.testing.assert_close(one_by_one, padded, rtol=1e-12, atol=1e-12)


def test_small_sequences_are_padded(device):
    def pays(lengths, weights_per_token):
        return eager.pays_to_pad(boundaries(lengths, device), sum(lengths), max(lengths, default=0), weights_per_token)

    if device.type == "cuda":  # lengths cannot be read there without waiting
        assert pays([9, 10], 10**6)
        return
    assert pays([9, 10, 8], 64) and pays([], 64)
    assert not pays([9, 10, 8], 10**4)  # large ones are not
    assert not pays([90, 2, 1, 1], 8)  # nor where most rows would be padding
    assert not pays([5], 8)


def test_oracle_is_the_formula():
    lengths, (C, H, D), scale = [3, 0, 2], (2, 2, 3), 0.7
    concept_qk, concept_v, token_qk, token_v = make(lengths, C, H, D, torch.float64, "cpu")
    cu_seqlens = boundaries(lengths, "cpu")
    concept_out, token_out = torch.zeros_like(concept_qk), torch.zeros_like(token_qk)
    for b, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        for h in range(H):

            def weight(c, n, b=b, h=h):
                return math.exp(scale * sum(float(concept_qk[b, c, h, d] * token_qk[n, h, d]) for d in range(D)))

            for c in range(C):
                total = sum(weight(c, n) for n in range(start, end))
                for n in range(start, end):
                    concept_out[b, c, h] += weight(c, n) / total * token_v[n, h]
            for n in range(start, end):
                total = sum(weight(c, n) for c in range(C))
                for c in range(C):
                    token_out[n, h] += weight(c, n) / total * concept_v[b, c, h]
    ours = reference_bixt_attention(concept_qk, concept_v, token_qk, token_v, cu_seqlens, scale)
    torch.testing.assert_close(ours, (concept_out, token_out), rtol=1e-12, atol=1e-12)


def test_oracle_gradient():
    lengths = [3, 0, 2]
    leaves = [x.requires_grad_() for x in make(lengths, 2, 1, 3, torch.float64, "cpu")]
    cu_seqlens = boundaries(lengths, "cpu")
    assert torch.autograd.gradcheck(lambda *x: reference_bixt_attention(*x, cu_seqlens, 0.7), leaves)


def test_the_number_of_chunks_changes_rounding_only(device):
    lengths = [50, 5]
    inputs, cu_seqlens = make(lengths, 6, 1, 16, torch.float32, device), boundaries(lengths, device)
    gradients = upstream([inputs[0], inputs[2]])
    one = launch(inputs, cu_seqlens, 50, 0.25, gradients, 50)
    for chunk in (48, 32, 9):
        several = launch(inputs, cu_seqlens, 50, 0.25, gradients, chunk)
        for name, x, y in zip(NAMES, one, several, strict=True):
            assert (x - y).abs().max() <= 8 * torch.finfo(x.dtype).eps * x.abs().max(), (name, chunk)


def test_same_bits_twice_and_under_any_strides(device):
    """Transposed, sliced, shared by the batch, at an odd offset, with an expanded gradient: strides change no bit."""
    lengths, (C, H, D) = [21, 0, 12], (5, 2, 16)
    cu_seqlens = boundaries(lengths, device)
    concepts = draw(C, H, 2 * D, dtype=torch.float32, device=device)
    tokens = draw(H, sum(lengths), D, dtype=torch.float32, device=device, seed=1)
    odd = draw(1 + 33 * H * D, dtype=torch.float32, device=device, seed=2)[1:].view(33, H, D)
    views = [*(x.expand(3, C, H, D) for x in concepts.chunk(2, -1)), tokens.transpose(0, 1), odd]
    copies = [x.clone(memory_format=torch.contiguous_format) for x in views]

    def run(inputs, ones):
        outputs = [x.requires_grad_() for x in (y.detach() for y in inputs)]
        result = bixt_attention(*outputs, cu_seqlens, 21, backend="triton")
        gradients = [torch.ones((), device=device).expand(o.shape) if ones == "expanded" else torch.ones_like(o)
                     for o in result]  # fmt: skip
        return *result, *torch.autograd.grad(result, outputs, gradients)

    first = run(copies, "dense")
    for again in (run(copies, "dense"), run(views, "expanded")):
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_sequences_without_tokens(backend, device):
    for lengths in ([0, 0], [], [0, 4]):
        leaves = [x.requires_grad_() for x in make(lengths, 3, 2, 16, torch.float32, device)]
        cu_seqlens = boundaries(lengths, device)
        concept_out, token_out = bixt_attention(*leaves, cu_seqlens, max(lengths, default=0), backend=backend)
        gradients = torch.autograd.grad([concept_out, token_out], leaves, upstream([concept_out, token_out]))
        empty = torch.tensor([n == 0 for n in lengths], dtype=torch.bool, device=device)
        for x in (concept_out, gradients[0], gradients[1]):
            assert not x[empty].any()
        assert all(torch.isfinite(x).all() for x in (concept_out, token_out, *gradients))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_scores_beyond_the_range_of_exp(backend, device):
    """Scores of several hundred: each softmax becomes a choice, nothing overflows, no token is lost."""
    cu_seqlens = boundaries([6], device)
    leaves = [x.requires_grad_() for x in make([6], 4, 1, 16, torch.float32, device)]
    outputs = bixt_attention(*leaves, cu_seqlens, 6, scale=300.0, backend=backend)
    exact = reference_bixt_attention(*(x.detach().double() for x in leaves), cu_seqlens, 300.0)
    for x, y in zip(outputs, exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-3)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(outputs, leaves, upstream(outputs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_scores_far_below_zero(dtype, device, no_worse):
    """The log-sum-exp is so low that exp(-lse), the weight of a token past the end, is infinite."""
    concept_qk, concept_v, token_qk, token_v = make([20], 5, 1, 16, dtype, device)
    concept_qk[..., 0], token_qk[..., 0] = 12.0, -12.0
    inputs, cu_seqlens = (concept_qk, concept_v, token_qk, token_v), boundaries([20], device)
    gradients = upstream([concept_qk, token_qk])
    ours = launch(inputs, cu_seqlens, 20, 1.0, gradients, None)
    plain = oracle(inputs, cu_seqlens, 1.0, gradients)
    truth = oracle(inputs, cu_seqlens, 1.0, gradients, torch.float64)
    for name, *three in zip(NAMES, ours, plain, truth, strict=True):
        no_worse(name, *three, slack=150.0 if dtype == torch.float32 else 1.0)  # the rounding of a score of -150


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_one_token_far_above_the_others(dtype, chunk, device, no_worse):
    """Its scores push the exponentials of all other tokens to 0: their softmax over concepts is computed again."""
    lengths = [40, 3]
    concept_qk, concept_v, token_qk, token_v = make(lengths, 5, 1, 16, dtype, device)
    concept_qk[..., 0], token_qk[..., 0], token_qk[0, :, 0] = 10.0, 0.0, 10.0
    inputs, cu_seqlens = (concept_qk, concept_v, token_qk, token_v), boundaries(lengths, device)
    gradients = upstream([concept_qk, token_qk])
    ours = launch(inputs, cu_seqlens, 40, 1.0, gradients, chunk)
    plain = oracle(inputs, cu_seqlens, 1.0, gradients)
    truth = oracle(inputs, cu_seqlens, 1.0, gradients, torch.float64)
    for name, *three in zip(NAMES, ours, plain, truth, strict=True):
        no_worse(name, *three, slack=100.0 if dtype == torch.float32 else 1.0)  # the rounding of a score of 100


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_result(used, device):
    """An output that nobody uses has no gradient; the other's must not change."""
    leaves = [x.requires_grad_() for x in make([11, 4], 3, 1, 16, torch.float32, device)]
    cu_seqlens = boundaries([11, 4], device)
    ours = bixt_attention(*leaves, cu_seqlens, 11, backend="triton")[used]
    exact = bixt_attention(*leaves, cu_seqlens, 11, backend="torch")[used]
    (gradient,) = upstream([ours])
    for x, y in zip(*(torch.autograd.grad(o, leaves, gradient, materialize_grads=True) for o in (ours, exact)),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_second_derivative_raises(device):
    leaves = [x.requires_grad_() for x in make([5], 3, 1, 16, torch.float32, device)]
    outputs = bixt_attention(*leaves, boundaries([5], device), 5, backend="triton")
    gradients = torch.autograd.grad(outputs[0].sum(), leaves, create_graph=True, materialize_grads=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(gradients[0].sum(), leaves)


def test_registration(device):
    inputs, cu_seqlens = make([5, 3], 3, 1, 16, torch.float32, device), boundaries([5, 3], device)
    arguments = *inputs, cu_seqlens, 5, 0.25
    torch.library.opcheck(torch.ops.conceptron.bixt_attention.default, arguments)
    concept_out, token_out, *weights = torch.ops.conceptron.bixt_attention(*arguments)
    arguments = *upstream([concept_out, token_out]), *inputs, concept_out, *weights, cu_seqlens, 5, 0.25
    torch.library.opcheck(torch.ops.conceptron.bixt_attention_backward.default, arguments)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiles_once_for_all_lengths(backend, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(bixt_attention, fullgraph=True, backend=counter)
    for lengths in ([9, 4], [6, 5], [7, 12]):
        leaves = [x.requires_grad_() for x in make(lengths, 3, 1, 16, torch.float32, device)]
        arguments = boundaries(lengths, device), max(lengths)
        ours, plain = (f(*leaves, *arguments, backend=backend) for f in (compiled, bixt_attention))
        for x, y in zip(
            (*ours, *torch.autograd.grad(ours, leaves, upstream(ours))),
            (*plain, *torch.autograd.grad(plain, leaves, upstream(plain))),
            strict=True,
        ):
            torch.testing.assert_close(x, y)
    assert counter.frame_count <= 2  # one for the first lengths, one for any others


def test_autocast(device):
    leaves = [x.requires_grad_() for x in make([9, 4], 3, 1, 16, torch.float32, device)]
    cu_seqlens = boundaries([9, 4], device)
    with torch.autocast(device.type, torch.float16):
        outputs = bixt_attention(*leaves, cu_seqlens, 9, backend="triton")
    halves = bixt_attention(*(x.half() for x in leaves), cu_seqlens, 9, backend="triton")
    assert all(x.dtype == torch.float16 and torch.equal(x, y) for x, y in zip(outputs, halves, strict=True))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(outputs, leaves, upstream(outputs)))


REFUSED = {
    "concept_qk: expected shape": lambda a: a | {"concept_qk": a["concept_qk"][0]},
    "concept_v: expected concept_qk's shape": lambda a: a | {"concept_v": a["concept_v"][:, 1:]},
    "concept_v: expected concept_qk's dtype": lambda a: a | {"concept_v": a["concept_v"].half()},
    "concept_qk: expected C >= 1": lambda a: a | {k: a[k][:, :0] for k in ("concept_qk", "concept_v")},
    "concept_qk: expected float32": lambda a: a | {"concept_qk": a["concept_qk"].int()},
    "token_qk: expected H = 2": lambda a: a | {"token_qk": a["token_qk"][:, :1]},
    "token_qk: expected D = 16": lambda a: a | {"token_qk": a["token_qk"][..., 1:]},
    "token_v: expected token_qk's shape": lambda a: a | {"token_v": a["token_v"][1:]},
    "token_v: expected a tensor": lambda a: a | {"token_v": None},
    "cu_seqlens: expected int32": lambda a: a | {"cu_seqlens": a["cu_seqlens"].long()},
    "cu_seqlens: expected to start at 0": lambda a: a | {"cu_seqlens": a["cu_seqlens"] + 1},
    "cu_seqlens: expected to end at T = 9": lambda a: a | {"cu_seqlens": a["cu_seqlens"].clamp(max=7)},
    "cu_seqlens: expected its length = 3": lambda a: a | {"cu_seqlens": a["cu_seqlens"][[0, 2]], "max_seqlen": 9},
    "max_seqlen: expected at least": lambda a: a | {"max_seqlen": 4},
    "max_seqlen: expected a Python int": lambda a: a | {"max_seqlen": torch.tensor(5)},
    "scale: expected a positive": lambda a: a | {"scale": -1.0},
    "scale: expected a float": lambda a: a | {"scale": "1"},
    "backend: expected one of": lambda a: a | {"backend": "cuda"},
    "concept_qk: 'triton' takes": lambda a: (
        {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in a.items()}
        | {"backend": "triton"}
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message, monkeypatch, device):
    monkeypatch.setenv("CONCEPTRON_CHECK", "1")
    names = "concept_qk", "concept_v", "token_qk", "token_v"
    arguments = dict(zip(names, make([5, 4], 3, 2, 16, torch.float32, device), strict=True))
    arguments |= {"cu_seqlens": boundaries([5, 4], device), "max_seqlen": 5}
    bixt_attention(**arguments)
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        bixt_attention(**REFUSED[message](arguments))


def test_builds_cover_the_tables():
    names = [build.name for build in library.builds()]
    assert len(names) == len(set(names))
    for direction, tiles in (("forward", forward.TILES), ("backward", backward.TILES)):
        assert tiles.keys() == forward.TILES.keys()
        for (units, wide), table in tiles.items():
            assert table.keys() == backward.TILES[units, wide].keys()  # backward decides what is library
            for block_c, (block_n, *_) in table.items():
                shape = f"C{block_c}xN{block_n}xD{128 if wide else 64}"
                assert any(f"/{direction}/{units}/" in name and shape in name for name in names), (units, shape)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("lengths", "C", "H", "D"),
    [([512] * 8, 128, 8, 64), ([16384], 128, 8, 64), ([4096, 0, 77, 1], 64, 4, 128), ([700, 300], 256, 4, 64)],
)
def test_bfloat16_at_real_sizes(lengths, C, H, D, no_worse):
    device = torch.device("cuda")
    inputs, cu_seqlens = make(lengths, C, H, D, torch.bfloat16, device), boundaries(lengths, device)
    gradients, scale = upstream([inputs[0], inputs[2]]), 1 / math.sqrt(D)
    run = lambda *x: bixt_attention(*x, cu_seqlens, max(lengths), backend="triton")  # noqa: E731
    ours, again = through_autograd(run, inputs, gradients), through_autograd(run, inputs, gradients)
    assert all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))
    plain = oracle(inputs, cu_seqlens, scale, gradients)
    truth = oracle(inputs, cu_seqlens, scale, gradients, torch.float64)
    for name, *three in zip(NAMES, ours, plain, truth, strict=True):
        no_worse(name, *three)


@pytest.mark.gpu
def test_graph_replay_with_other_lengths():
    device = torch.device("cuda")
    inputs, cu_seqlens = make([300, 724], 64, 4, 64, torch.bfloat16, device), boundaries([300, 724], device)
    leaves = [x.requires_grad_() for x in inputs]

    def step():
        outputs = bixt_attention(*leaves, cu_seqlens, 1024, backend="triton")
        return *outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])

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
