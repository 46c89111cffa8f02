"""streamed_attention: both backends against the float64 oracle, the promises of its door, and every refusal."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from conceptron.kernels.streamed_attention import SharedGradient, library, reference, streamed_attention

# name: lengths, C, H, Hkv, D, E, q shared by the batch, chunk, what keys and tokens are made with
CASES = {
    "bare": ([9, 0, 13, 1], 5, 2, 2, 16, 12, False, 12, ()),
    "all of it": ([17, 0, 12, 1], 7, 4, 2, 16, 24, False, 12, ("bias", "norm", "turn")),
    "ids": ([10, 5, 0], 6, 2, 1, 32, 20, False, 8, ("bias", "norm", "turn", "ids")),
    "ids only": ([9], 3, 1, 1, 16, 12, False, None, ("ids",)),
    "shared q": ([20, 0, 3], 9, 2, 1, 24, 16, True, 12, ("norm", "turn")),
    "one chunk": ([12, 12], 4, 2, 2, 16, 12, False, None, ("bias", "turn")),
    "odd width": ([11, 9], 3, 2, 1, 5, 8, False, 7, ("bias", "norm")),
    "nothing": ([0, 0], 3, 1, 1, 16, 8, False, None, ("bias", "norm", "turn")),
}
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
NAMES = ("q", "x", "w_key", "w_value", "key_bias", "key_norm", "token_norm")


def boundaries(lengths, device) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def draw(lengths, C, H, Hkv, D, E, shared, chunk, parts, dtype, device):
    """The tensors that have a gradient, rounded to dtype once, the rest, and the gradient of out."""
    torch.manual_seed(0)
    B, T = len(lengths), sum(lengths)
    shapes = [(C, H, D) if shared else (B, C, H, D), (17 if "ids" in parts else T, E), (Hkv * D, E), (Hkv * D, E)]
    shapes += [(D,) if "bias" in parts else None, (D,) if "norm" in parts else None]
    shapes += [(E,) if "ids" in parts else None]
    scales = (1.0, 1.0, E**-0.5, E**-0.5, 1.0, 1.0, 1.0)
    drawn = {
        name: (torch.randn(shape) * scale).to(device, dtype)
        for name, shape, scale in zip(NAMES, shapes, scales, strict=True) if shape is not None
    }  # fmt: skip
    rest = {"ids": torch.randint(0, 17, (T,), device=device)} if "ids" in parts else {}
    if "turn" in parts:
        positions = torch.cat([torch.arange(n) * 2 for n in lengths]).to(device)
        frequencies = 10.0 ** -torch.arange(D // 2, device=device)
        rest |= {"positions": positions, "frequencies": frequencies, "temperature": 1.1}
    return drawn, rest, torch.randn(B, C, H, D).to(device, dtype)


def results(read, drawn, rest, dout, dtype):
    """out and the gradients of all that were drawn."""
    leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in drawn.items()}
    out = read(**leaves, **rest)
    gradients = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def through(backend, cu_seqlens, longest, chunk):
    def read(q, x, w_key, w_value, **options):
        return streamed_attention(q, x, w_key, w_value, cu_seqlens, longest, chunk=chunk, backend=backend, **options)

    return read


def oracle(cu_seqlens):
    return lambda q, x, w_key, w_value, **options: reference.streamed_attention(
        q, x, w_key, w_value, cu_seqlens, **options
    )


def compare(case, dtype, backend, device, no_worse):
    lengths, chunk = case[0], case[7]
    drawn, rest, dout = draw(*case, dtype, device)
    cu_seqlens = boundaries(lengths, device)
    ours = results(through(backend, cu_seqlens, max(lengths) + 1, chunk), drawn, rest, dout, dtype)
    eager = results(oracle(cu_seqlens), drawn, rest, dout, dtype)
    truth = results(oracle(cu_seqlens), drawn, rest, dout, torch.float64)
    slack = 8.0 if dtype == torch.float32 else 2.0  # p = exp(s - lse) is made again, as in concept_attention
    for name in ours:
        no_worse(name, ours[name], eager[name], truth[name], slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_triton_is_no_worse_than_eager(case, dtype, device, no_worse, poison):
    compare(case, dtype, "triton", device, no_worse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_torch_is_no_worse_than_eager(case, dtype, device, no_worse):
    compare(case, dtype, "torch", device, no_worse)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_torch_is_the_oracle_in_float64(case, device):
    drawn, rest, dout = draw(*case, torch.float64, device)
    if "frequencies" in rest:
        rest["frequencies"] = rest["frequencies"].double()
    cu_seqlens = boundaries(case[0], device)
    ours = results(through("torch", cu_seqlens, 40, case[7]), drawn, rest, dout, torch.float64)
    truth = results(oracle(cu_seqlens), drawn, rest, dout, torch.float64)
    for name, value in ours.items():
        torch.testing.assert_close(value, truth[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("read", ["oracle", "door"])
@pytest.mark.parametrize("parts", [("bias", "norm", "turn"), ("norm", "ids")], ids=["states", "ids"])
def test_gradients_are_those_of_finite_differences(parts, read):
    case = [3, 0, 4], 2, 2, 1, 4, 3, False, 3, parts
    drawn, rest, _ = draw(*case, torch.float64, "cpu")
    cu_seqlens = boundaries(case[0], "cpu")
    call = oracle(cu_seqlens) if read == "oracle" else through("torch", cu_seqlens, 4, 3)
    leaves = [value.requires_grad_() for value in drawn.values()]
    assert torch.autograd.gradcheck(lambda *x: call(**dict(zip(drawn, x, strict=True)), **rest), leaves)


REAL = {
    "long": ([100000, 3], 128, 8, 8, 64, 512, False, None, ("bias", "norm", "turn")),
    "ids": ([4000, 1, 0, 129, 20000], 128, 8, 2, 64, 512, False, None, ("bias", "norm", "turn", "ids")),
    "wide heads": ([30000], 128, 4, 4, 128, 512, True, None, ("norm", "turn")),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL.values(), ids=REAL)
def test_real_sizes(case, device, no_worse, poison):
    compare(case, torch.bfloat16, "triton", device, no_worse)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_chunks_change_rounding_only_and_bits_stay(backend, device):
    case = CASES["all of it"]
    drawn, rest, dout = draw(*case, torch.float16, device)
    cu_seqlens = boundaries(case[0], device)
    runs = [
        results(through(backend, cu_seqlens, 17, chunk), drawn, rest, dout, torch.float16) for chunk in (200, 11, 11)
    ]
    for name, whole in runs[0].items():
        assert torch.equal(runs[1][name], runs[2][name]), f"{name}: other bits the second time"
        torch.testing.assert_close(runs[1][name], whole, rtol=4e-3, atol=4e-3 * float(whole.abs().max()))


@pytest.mark.parametrize("parts", [("bias", "norm", "turn"), ("norm", "ids")], ids=["states", "ids"])
def test_the_same_bits_on_any_number_of_threads(parts):
    """Also where the number comes from the first call of a thread."""
    case = [3000, 0, 17, 17, 900], 24, 4, 2, 16, 32, False, None, parts
    drawn, rest, dout = draw(*case, torch.float32, "cpu")
    cu_seqlens, before, runs = boundaries(case[0], "cpu"), torch.get_num_threads(), []
    for num_threads in (1, 2, 3, 2):
        torch.set_num_threads(num_threads)
        runs.append(results(through("torch", cu_seqlens, 3000, None), drawn, rest, dout, torch.float32))
    torch.set_num_threads(before)
    for name, value in runs[0].items():
        assert all(torch.equal(value, run[name]) for run in runs[1:]), name


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_any_strides(backend, device):
    case = CASES["ids"]
    drawn, rest, _ = draw(*case, torch.float32, device)
    cu_seqlens = boundaries(case[0], device)
    read = through(backend, cu_seqlens, 10, 8)

    def apart(x):  # every second element, last axis outermost
        wide = x.new_zeros(*x.shape[::-1], 2)
        wide[..., 0] = x.permute(*range(x.ndim)[::-1])
        return wide[..., 0].permute(*range(x.ndim)[::-1])

    found = []
    for own in (drawn, {name: apart(x) for name, x in drawn.items()}):
        leaves = {name: x.detach().requires_grad_() for name, x in own.items()}
        out = read(**leaves, **rest)
        found.append([out, *torch.autograd.grad(out.sum(), list(leaves.values()))])  # of an expanded gradient
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "backend"), [("ids", "triton"), ("ids", "torch"), ("all of it", "torch")])
def test_reads_that_share_one_gradient(name, backend, device):
    """Of the same states, through autograd or through one buffer; the buffer is there while a backward pass is."""
    case = CASES[name]
    drawn, rest, dout = draw(*case, torch.float32, device)
    read = through(backend, boundaries(case[0], device), 33, case[7])
    found = []
    for is_shared in (False, True):
        leaves = {key: x.detach().requires_grad_() for key, x in drawn.items()}
        of_states = [leaves[key] for key in ("x", "token_norm") if key in leaves]
        options = {"shared": SharedGradient(*of_states)} if is_shared else {}
        first = read(**leaves, **rest, **options)
        second = read(**{**leaves, "q": leaves["q"] * 0.5}, **rest, **options)
        (first * second).backward(dout)
        found.append([x.grad for x in leaves.values()])
        assert not is_shared or options["shared"].buffers.gradients == ()
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [("norm", "turn"), ("norm", "turn", "ids")], ids=["states", "ids"])
def test_what_is_kept_of_a_token(parts):
    def kept(length):
        drawn, rest, _ = draw([length], 4, 2, 2, 16, 12, False, 64, parts, torch.float32, "cpu")
        sizes = {}

        def save(x):
            sizes[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        leaves = {name: x.requires_grad_() for name, x in drawn.items()}
        with saved_tensors_hooks(save, lambda x: x):
            out = through("torch", boundaries([length], "cpu"), length, 64)(**leaves, **rest)
        del out
        return sum(sizes.values())

    assert (kept(300) - kept(100)) / 200 == (8 + 8 if "ids" in parts else 12 * 4 + 8)  # and the position


@pytest.mark.parametrize(("name", "backend"), [("shared q", "triton"), ("shared q", "torch"), ("ids", "torch")])
def test_registration(name, backend, device):
    """torch.library.opcheck: schema, fake tensors, what is written to, and tracing with dynamic shapes."""
    case = CASES[name]
    drawn, rest, dout = draw(*case, torch.float32, device)
    given = {**dict.fromkeys(library.Arguments._fields), **drawn, **rest, "cu_seqlens": boundaries(case[0], device)}
    given |= {"max_seqlen": 40, "temperature": 1.1, "token_eps": 1e-6, "eps": 1e-6, "scale": 0.3, "chunk": 16}
    arguments = *library.Arguments(**given), backend
    operators = torch.ops.conceptron
    torch.library.opcheck(operators.streamed_attention.default, arguments)
    out, lse = operators.streamed_attention(*arguments)
    for dx in (torch.zeros_like(drawn["x"]), None):
        torch.library.opcheck(operators.streamed_attention_backward.default, (dout, out, lse, dx, *arguments))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiles_whole_and_once_for_all_lengths(backend, device):
    """One matrix makes keys and values, which is one tensor twice."""
    torch._dynamo.reset()

    def read(q, x, weight, norm, cu_seqlens, positions, frequencies, longest):
        return streamed_attention(
            q, x, weight, weight, cu_seqlens, longest, key_norm=norm, positions=positions, frequencies=frequencies,
            chunk=16, backend=backend,
        )  # fmt: skip

    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    for step, lengths in enumerate(([9, 4], [20, 0], [19, 2])):
        drawn, rest, dout = draw(lengths, 3, 2, 1, 16, 8, False, 16, ("norm", "turn"), torch.float32, device)
        leaves = [drawn[name].requires_grad_() for name in ("q", "x", "w_key", "key_norm")]
        others = boundaries(lengths, device), rest["positions"], rest["frequencies"], max(lengths)
        with torch._dynamo.config.patch(error_on_recompile=step > 1):  # the second length makes T dynamic
            out = compiled(*leaves, *others)
        expected = read(*leaves, *others)
        found = ([x.detach(), *torch.autograd.grad(x, leaves, dout)] for x in (out, expected))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_rounds_the_queries_and_not_the_gradients(backend, device):
    case = CASES["ids"]
    drawn, rest, dout = draw(*case, torch.float32, device)
    read = through(backend, boundaries(case[0], device), 20, 8)
    with torch.autocast(device.type, torch.float16):
        lower = results(read, drawn, rest, dout, torch.float32)
    assert lower["out"].dtype == torch.float16
    truth = results(oracle(boundaries(case[0], device)), drawn, rest, dout, torch.float64)
    for name, value in lower.items():
        assert name == "out" or value.dtype == torch.float32
        torch.testing.assert_close(value.double(), truth[name], rtol=2e-2, atol=1e-2 * float(truth[name].abs().max()))


def test_second_derivative_raises():
    drawn, rest, _ = draw(*CASES["bare"], torch.float32, "cpu")
    leaves = {name: x.requires_grad_() for name, x in drawn.items()}
    out = through("torch", boundaries([9, 0, 13, 1], "cpu"), 13, 16)(**leaves, **rest)
    (gradient,) = torch.autograd.grad(out.square().sum(), leaves["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def arguments(**changes):
    """Valid arguments but for ``changes``."""
    given = {
        "q": torch.zeros(2, 3, 4, 8), "x": torch.zeros(10, 6), "w_key": torch.zeros(16, 6),
        "w_value": torch.zeros(16, 6), "cu_seqlens": torch.tensor([0, 6, 10]).int(), "max_seqlen": 6,
        "key_bias": torch.zeros(8), "key_norm": torch.ones(8), "positions": torch.arange(10),
        "frequencies": torch.ones(4), "backend": "torch",
    }  # fmt: skip
    return {**given, **changes}


WITH_IDS = {"ids": torch.zeros(10, dtype=torch.int64), "token_norm": torch.ones(6)}
OTHER = SharedGradient(torch.zeros(10, 6, requires_grad=True))
REFUSED = {
    "q type": (TypeError, r"q: expected a tensor", {"q": 1}),
    "q rank": (ValueError, r"q: expected shape \[B, C, H, D\] or \[C, H, D\]", {"q": torch.zeros(3, 8)}),
    "q dtype": (TypeError, r"q: expected float32", {"q": torch.zeros(2, 3, 4, 8).long()}),
    "q empty": (ValueError, r"q: expected at least one concept", {"q": torch.zeros(2, 0, 4, 8)}),
    "batch": (ValueError, r"q: expected B = 2", {"q": torch.zeros(3, 3, 4, 8)}),
    "odd": (ValueError, r"q: expected an even head width D with positions, got 7", {
        "q": torch.zeros(2, 3, 4, 7), "w_key": torch.zeros(14, 6), "w_value": torch.zeros(14, 6),
        "key_bias": None, "key_norm": None}),
    "x rank": (ValueError, r"x: expected shape \[T, E\]", {"x": torch.zeros(10)}),
    "x dtype": (TypeError, r"x: expected float64 where q is", {"x": torch.zeros(10, 6).double()}),
    "table": (ValueError, r"x: expected shape \[V, E\], the table", {**WITH_IDS, "x": torch.zeros(10)}),
    "w_key width": (ValueError, r"w_key: expected E = 6", {"w_key": torch.zeros(16, 5)}),
    "w_key heads": (ValueError, r"w_key: expected Hkv \* D rows", {"w_key": torch.zeros(24, 6)}),
    "w_value": (ValueError, r"w_value: expected Hkv \* D = 16", {"w_value": torch.zeros(8, 6)}),
    "cu": (ValueError, r"cu_seqlens: expected to end at T = 10", {"cu_seqlens": torch.tensor([0, 6, 9]).int()}),
    "max": (ValueError, r"max_seqlen: expected at least the longest", {"max_seqlen": 5}),
    "bias": (ValueError, r"key_bias: expected D = 8", {"key_bias": torch.zeros(16)}),
    "norm": (ValueError, r"key_norm: expected shape \[D\]", {"key_norm": torch.zeros(2, 8)}),
    "positions alone": (ValueError, r"frequencies: expected a tensor with positions", {"frequencies": None}),
    "frequencies alone": (ValueError, r"positions: expected a tensor with frequencies", {"positions": None}),
    "positions": (ValueError, r"positions: expected T = 10", {"positions": torch.arange(9)}),
    "positions dtype": (TypeError, r"positions: expected real numbers", {"positions": torch.zeros(10).bool()}),
    "frequencies": (ValueError, r"frequencies: expected D/2 = 4", {"frequencies": torch.ones(8)}),
    "frequencies' gradient": (ValueError, r"frequencies: expected a constant", {
        "frequencies": torch.ones(4, requires_grad=True)}),
    "ids alone": (ValueError, r"token_norm: expected a tensor with ids", {"ids": WITH_IDS["ids"]}),
    "norm alone": (ValueError, r"ids: expected a tensor with token_norm", {"token_norm": torch.ones(6)}),
    "ids dtype": (TypeError, r"ids: expected int64", {**WITH_IDS, "ids": torch.zeros(10).int()}),
    "ids beyond": (ValueError, r"ids: expected rows of x, 0 to 9, got 0 to 10", {
        **WITH_IDS, "ids": torch.tensor([0] * 9 + [10])}),
    "token norm": (ValueError, r"token_norm: expected E = 6", {**WITH_IDS, "token_norm": torch.ones(5)}),
    "eps": (ValueError, r"eps: expected 0 <= eps < 1, got -1", {"eps": -1}),
    "token eps": (TypeError, r"token_eps: expected a number, got str", {"token_eps": "1"}),
    "temperature": (ValueError, r"temperature: expected a positive, finite number", {"temperature": 0.0}),
    "scale": (ValueError, r"scale: expected a positive, finite number", {"scale": -1.0}),
    "chunk": (ValueError, r"chunk: expected a whole number of tokens, at least 1, or None, got 0", {"chunk": 0}),
    "chunk type": (ValueError, r"chunk: expected a whole number", {"chunk": 2.0}),
    "shared": (TypeError, r"shared: expected a SharedGradient or None, got int", {"shared": 1}),
    "shared of others": (ValueError, r"shared: expected the gradient of x", {"shared": OTHER}),
    "backend": (ValueError, r"backend: expected one of auto, triton, torch", {"backend": "cuda"}),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changes"), REFUSED.values(), ids=REFUSED)
def test_refusals(error, message, changes):
    with pytest.raises(error, match="^" + message):
        streamed_attention(**arguments(**changes))


def test_triton_refuses_what_it_cannot_run(device):
    wide = {"q": torch.zeros(2, 3, 2, 136), "w_key": torch.zeros(136, 6), "w_value": torch.zeros(136, 6)}
    bare = dict.fromkeys(("key_bias", "key_norm", "positions", "frequencies"))
    double = {name: arguments()[name].double() for name in ("q", "x", "w_key", "w_value")}
    for changes, error, message in (
        (wide, ValueError, r"^q: 'triton' takes a head width D up to 128, got 136"),
        (double, TypeError, r"^q: 'triton' takes float32, float16 and bfloat16, got float64"),
    ):
        given = arguments(**bare, **changes, backend="triton")
        with pytest.raises(error, match=message):
            streamed_attention(**{name: x.to(device) if torch.is_tensor(x) else x for name, x in given.items()})
