"""token_attention: both backends against the float64 oracle, the promises of its door, and every refusal."""

import pytest
import torch

from conceptron.kernels.token_attention import backward, forward, library, reference, token_attention

# name: lengths, C, H, Hkv, D, dropout, scale
CASES = {
    "tiny": ([1, 3, 1], 2, 1, 1, 16, 0.0, None),
    "ragged": ([33, 0, 97, 1], 7, 2, 1, 32, 0.0, None),
    "two blocks of concepts": ([15, 31], 40, 2, 2, 16, 0.0, 0.5),
    "three query heads a key head": ([40, 0, 30], 20, 3, 1, 24, 0.0, None),  # D is no power of 2, tiles cut tokens
    "two chunks": ([0, 300], 16, 1, 1, 16, 0.0, None),
    "dropout": ([31, 64], 33, 2, 1, 16, 0.25, None),
    "one full tile": ([70], 256, 1, 1, 16, 0.0, None),
    "many concepts": ([20, 0], 300, 2, 1, 16, 0.0, None),  # more than one tile, forward and backward
    "many concepts, dropout": ([17], 270, 1, 1, 16, 0.2, None),
    "nothing": ([0, 0], 3, 1, 1, 16, 0.0, None),
}
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SEED = 1234567890123


def boundaries(lengths, device) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def inputs(lengths, C, H, Hkv, D, dtype, device):
    """q, k, v and the gradient of out, rounded to dtype once."""
    torch.manual_seed(0)
    B, T = len(lengths), sum(lengths)
    return [torch.randn(shape).to(device, dtype) for shape in ((T, H, D), (B, C, Hkv, D), (B, C, Hkv, D), (T, H, D))]


def results(attend, q, k, v, dout, dtype):
    """out and the three gradients, computed in dtype."""
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)
    gradients = torch.autograd.grad((out * dout.to(dtype)).sum(), (q, k, v), allow_unused=True)
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip((q, k, v), gradients, strict=True)]
    return out.detach(), *gradients


def attends(lengths, dropout_p, scale, backend, device):
    """The door and the oracle on the same sequences."""
    cu_seqlens = boundaries(lengths, device)
    options = {"scale": scale, "dropout_p": dropout_p, "seed": torch.tensor([SEED], device=device)}
    return (
        lambda q, k, v: token_attention(q, k, v, cu_seqlens, max(lengths), backend=backend, **options),
        lambda q, k, v: reference.token_attention(q, k, v, cu_seqlens, **options),
    )


def compare(lengths, C, H, Hkv, D, dropout_p, scale, dtype, backend, device, no_worse):
    tensors = inputs(lengths, C, H, Hkv, D, dtype, device)
    door, oracle = attends(lengths, dropout_p, scale, backend, device)
    compared = (
        results(door, *tensors, dtype), results(oracle, *tensors, dtype), results(oracle, *tensors, torch.float64),
    )  # fmt: skip
    # p is recomputed as exp(s - lse): in float32 that rounding, eps * |lse|, is the largest, and eager does not have it
    slack = 8.0 if dtype == torch.float32 else 1.0
    for name, *three in zip(("out", "dq", "dk", "dv"), *compared, strict=True):
        no_worse(name, *three, slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_triton_is_no_worse_than_eager(case, dtype, device, no_worse, poison):
    compare(*case, dtype, "triton", device, no_worse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_torch_is_no_worse_than_eager(case, dtype, device, no_worse):
    compare(*case, dtype, "torch", device, no_worse)


@pytest.mark.parametrize("case", [*CASES.values(), ([6, 6], 5, 4, 2, 8, 0.0, None)], ids=[*CASES, "equal lengths"])
def test_torch_is_the_oracle_in_float64(case, device):
    lengths, C, H, Hkv, D, dropout_p, scale = case
    tensors = inputs(lengths, C, H, Hkv, D, torch.float32, device)
    found = (results(attend, *tensors, torch.float64) for attend in attends(lengths, dropout_p, scale, "torch", device))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


REAL = {
    "one long": ([131072], 128, 8, 8, 64, 0.0, None),
    "batch": ([512] * 16, 128, 8, 8, 64, 0.1, None),
    "ragged batch": ([4000, 1, 0, 129, 2047, 8192], 256, 8, 2, 64, 0.0, None),
    "many concepts": ([3000, 500], 2048, 2, 2, 64, 0.0, None),
    "wide heads": ([1000, 3], 128, 4, 4, 128, 0.1, None),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", REAL.values(), ids=REAL)
def test_real_sizes(case, dtype, device, no_worse, poison):
    compare(*case, dtype, "triton", device, no_worse)


@pytest.mark.parametrize("sign", [-1.0, 1.0], ids=["very negative", "very positive"])
@pytest.mark.parametrize("C", [5, 270], ids=["one tile", "blocks"])
def test_large_scores_stay_finite(C, sign, device):
    """All scores near sign * 3600: a masked concept or row counts as a score of 0, whose weight would overflow."""
    q = torch.full((40, 1, 16), 30.0, device=device)
    k = (sign * 30 + torch.arange(float(C), device=device)[:, None, None] / C).expand(3, C, 1, 16)
    v = torch.randn(3, C, 1, 16, device=device)
    cu_seqlens = boundaries([33, 0, 7], device)
    leaves = [x.half().requires_grad_() for x in (q, k, v)]
    out = token_attention(*leaves, cu_seqlens, 33, backend="triton")
    expected = reference.token_attention(*(x.double() for x in leaves), cu_seqlens)
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert torch.isfinite(gradient).all()


def run_split(q, k, v, dout, cu_seqlens, longest, chunk, dropout_p=0.0):
    seed = torch.tensor([SEED], device=q.device) if dropout_p else None
    out = forward.forward(q, k, v, cu_seqlens, longest, 0.3, dropout_p, seed, chunk)
    return out, *backward.backward(dout, q, k, v, cu_seqlens, longest, 0.3, dropout_p, seed, chunk)


@pytest.mark.parametrize("C, dropout_p", [(5, 0.0), (5, 0.4), (130, 0.0)])
def test_result_does_not_depend_on_the_split(C, dropout_p, device, poison):
    lengths = [90, 0, 64, 5]
    cu_seqlens = boundaries(lengths, device)
    tensors = inputs(lengths, C, 2, 1, 16, torch.float16, device)
    whole, *splits = (run_split(*tensors, cu_seqlens, 90, chunk, dropout_p) for chunk in (96, 64, 32))
    for split in splits:
        for got, want in zip(split, whole, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)  # one rounding to float16


def test_same_bits_twice(device):
    lengths = [200, 0, 70]
    cu_seqlens = boundaries(lengths, device)
    tensors = inputs(lengths, 20, 2, 1, 16, torch.float16, device)
    first, second = (run_split(*tensors, cu_seqlens, 200, 64, 0.2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_but_the_inputs_is_saved(device):
    lengths = [20, 3]
    q, k, v, _ = inputs(lengths, 4, 2, 2, 16, torch.float32, device)
    cu_seqlens = boundaries(lengths, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        token_attention(q.requires_grad_(), k, v, cu_seqlens, 20, backend="triton")
    assert {x.data_ptr() for x in saved} <= {x.data_ptr() for x in (q, k, v, cu_seqlens)}


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_any_strides_and_offsets(backend, device):
    """k and v as strided halves of one projection at an odd offset, q transposed, gradients expanded or transposed."""
    lengths, C, H, D = [19, 30], 6, 2, 16
    T, cu_seqlens = sum(lengths), boundaries(lengths, device)
    torch.manual_seed(0)
    buffer = torch.randn(1 + 2 * C * 2 * H * D + T * H * D, device=device)
    k, v = buffer[1 : 1 + 2 * C * 2 * H * D].view(2, C, 2 * H, D).chunk(2, dim=2)
    q = buffer[1 + 2 * C * 2 * H * D :].view(H, D, T).permute(2, 0, 1)  # the last stride is T
    strided, packed = [q, k, v], [x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)]
    assert not any(x.is_contiguous() for x in strided)
    losses = (
        lambda out: out.sum(),  # the gradient arrives expanded, all strides 0
        lambda out: (out.transpose(0, 2) * torch.arange(T, device=device)).sum(),
    )
    for loss in losses:
        found = []
        for tensors in (strided, packed):
            leaves = [x.detach().requires_grad_() for x in tensors]
            out = token_attention(*leaves, cu_seqlens, 30, backend=backend)
            found.append((out, *torch.autograd.grad(loss(out), leaves)))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # values up to 100


def test_concepts_shared_by_the_batch(device):
    """k and v expanded over the batch (stride 0): autograd sums their gradients."""
    lengths = [30, 0, 20]
    q, k, v, dout = inputs(lengths, 5, 2, 2, 16, torch.float32, device)
    k, v = k[:1].requires_grad_(), v[:1].requires_grad_()
    door, oracle = attends(lengths, 0.0, None, "triton", device)
    found = (
        torch.autograd.grad(attend(q, k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1)), (k, v), dout)
        for attend in (door, oracle)
    )
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_one_concept_is_copied(backend, device):
    q, k, v, dout = inputs([5, 2], 1, 2, 1, 16, torch.float32, device)
    k.requires_grad_()
    out = token_attention(q, k, v, boundaries([5, 2], device), 5, backend=backend)
    assert torch.equal(out[:5], v[0].expand(5, 2, 16)) and torch.equal(out[5:], v[1].expand(2, 2, 16))
    assert float(torch.autograd.grad(out, k, dout)[0].abs().max()) < 1e-5


def test_second_derivative_raises(device):
    q, k, v, _ = inputs([9], 3, 1, 1, 16, torch.float32, device)
    out = token_attention(q.requires_grad_(), k, v, boundaries([9], device), 9, backend="triton")
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_registration(device):
    """torch.library.opcheck: schema, fake tensors, and tracing with dynamic shapes."""
    cu_seqlens = boundaries([9, 0, 20], device)
    q, k, v, dout = inputs([9, 0, 20], 3, 2, 1, 16, torch.float32, device)
    seed = torch.tensor([SEED], device=device)
    ops = torch.ops.conceptron
    torch.library.opcheck(ops.token_attention.default, (q, k, v, cu_seqlens, 20, 0.3, 0.2, seed))
    torch.library.opcheck(ops.token_attention_backward.default, (dout, q, k, v, cu_seqlens, 20, 0.3, 0.0, None))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiles_whole_and_once_for_all_lengths(backend, device):
    torch._dynamo.reset()
    compiled = torch.compile(token_attention, fullgraph=True, backend="aot_eager")
    for step, lengths in enumerate(([9, 4], [20, 0], [3, 8], [31, 2])):
        cu_seqlens = boundaries(lengths, device)
        q, k, v, _ = inputs(lengths, 3, 2, 1, 16, torch.float32, device)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        with torch._dynamo.config.patch(error_on_recompile=step > 1):  # the second length makes T dynamic
            out = compiled(q, k, v, cu_seqlens, max(lengths), backend=backend)
        expected = token_attention(q, k, v, cu_seqlens, max(lengths), backend=backend)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        gradients, wanted = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (out, expected))
        torch.testing.assert_close(gradients, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_casts_as_sdpa_does(backend, device):
    q, k, v, _ = inputs([9], 3, 1, 1, 16, torch.float32, device)
    q.requires_grad_()
    with torch.autocast(device.type, dtype=torch.float16):
        out = token_attention(q, k.half(), v, boundaries([9], device), 9, backend=backend)
    assert out.dtype == torch.float16
    out.sum().backward()
    assert q.grad.dtype == torch.float32 and torch.isfinite(q.grad).all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_dropout_seeds(backend, device):
    q, k, v, _ = inputs([40], 8, 2, 1, 16, torch.float32, device)
    cu_seqlens = boundaries([40], device)

    def attend(seed):
        return token_attention(q, k, v, cu_seqlens, 40, dropout_p=0.5, seed=seed, backend=backend)

    assert torch.equal(attend(5), attend(torch.tensor([5], device=device)))
    assert not torch.equal(attend(5), attend(6))
    torch.manual_seed(3)
    first, second = attend(None), attend(None)
    torch.manual_seed(3)
    assert torch.equal(first, attend(None)) and not torch.equal(first, second)


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
def test_whatever_the_tables_choose_is_compiled(dropout, compiled_by):
    """For any number of concepts, the tiles of every kernel are among the builds of the compile table."""
    compiled = compiled_by([build for build in library.builds() if ("seed_ptr" not in build.constants) == dropout])
    for units, wide in forward.WALK:
        block_d = 128 if wide else 64
        for num_concepts in (1, 17, 33, 65, 128, 129, 256, 2048):
            chosen = forward.attend_config(num_concepts, block_d, units, dropout)
            assert compiled(forward.forward_kernel, units, block_d, chosen), (units, wide, num_concepts, chosen)
            rows, concepts = backward.backward_config(num_concepts, block_d, units, dropout)
            assert rows["WITH_DQ"] != concepts["WITH_DQ"]
            assert compiled(backward.row_kernel, units, block_d, rows), (units, wide, num_concepts, rows)
            assert compiled(backward.concept_kernel, units, block_d, concepts), (units, wide, num_concepts, concepts)


@pytest.mark.gpu
def test_graph_capture_and_replay_with_other_lengths(device):
    q, k, v, dout = inputs([1000, 24], 64, 4, 4, 64, torch.bfloat16, device)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    cu_seqlens = boundaries([1000, 24], device)

    def step():
        out = token_attention(q, k, v, cu_seqlens, 1024)
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    cu_seqlens.copy_(boundaries([1, 1023], device))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


def arguments(**changes):
    q, k, v = torch.zeros(10, 4, 8), torch.zeros(2, 3, 2, 8), torch.zeros(2, 3, 2, 8)
    good = {"q": q, "k": k, "v": v, "cu_seqlens": torch.tensor([0, 4, 10], dtype=torch.int32), "max_seqlen": 6}
    return {**good, **changes}


REFUSED = {
    "q no tensor": (TypeError, r"q: expected a tensor", {"q": None}),
    "q rank": (ValueError, r"q: expected shape \[T, H, D\], got \[10, 32\]", {"q": torch.zeros(10, 32)}),
    "q dtype": (TypeError, r"q: expected float32, .* got torch.int64", {"q": torch.zeros(10, 4, 8).long()}),
    "q empty": (ValueError, r"q: expected at least one head", {"q": torch.zeros(10, 0, 8)}),
    "k rank": (ValueError, r"k: expected shape \[B, C, Hkv, D\], got \[3, 2, 8\]", {"k": torch.zeros(3, 2, 8)}),
    "k empty": (ValueError, r"k: expected at least one concept", {"k": torch.zeros(2, 0, 2, 8)}),
    "k dtype": (TypeError, r"k: expected q's dtype torch.float32", {"k": torch.zeros(2, 3, 2, 8).half()}),
    "k device": (ValueError, r"k: expected q's device", {"k": torch.zeros(2, 3, 2, 8, device="meta")}),
    "k width": (ValueError, r"k: expected D = 8 \(q's head width\), got 16", {"k": torch.zeros(2, 3, 2, 16)}),
    "heads": (ValueError, r"k: expected Hkv to divide q's H = 4, got 3", {"k": torch.zeros(2, 3, 3, 8)}),
    "v shape": (ValueError, r"v: expected C = 3 \(k's\), got 4", {"v": torch.zeros(2, 4, 2, 8)}),
    "cu dtype": (TypeError, r"cu_seqlens: expected int32", {"cu_seqlens": torch.tensor([0, 4, 10])}),
    "cu end": (ValueError, r"cu_seqlens: expected to end at T = 10", {"cu_seqlens": torch.tensor([0, 4, 9]).int()}),
    "max small": (ValueError, r"max_seqlen: expected at least the longest sequence, 6", {"max_seqlen": 5}),
    "batch": (ValueError, r"k: expected B = 2", {"k": torch.zeros(3, 3, 2, 8), "v": torch.zeros(3, 3, 2, 8)}),
    "scale": (ValueError, r"scale: expected a positive, finite number, got -1.0", {"scale": -1.0}),
    "dropout": (TypeError, r"dropout_p: expected a float, got str", {"dropout_p": "0.1"}),
    "seed": (TypeError, r"seed: expected an int, an int64 tensor or None", {"dropout_p": 0.5, "seed": 1.0}),
    "backend": (ValueError, r"backend: expected one of auto, triton, torch, got 'cuda'", {"backend": "cuda"}),
}


@pytest.mark.parametrize(("error", "message", "changes"), REFUSED.values(), ids=REFUSED)
def test_refusals(error, message, changes):
    with pytest.raises(error, match="^" + message):
        token_attention(**arguments(**changes))


def test_triton_refuses_what_it_cannot_run(device, monkeypatch):
    def refused(tensors):
        tensors = arguments(**tensors)
        tensors = {name: x.to(device) if torch.is_tensor(x) else x for name, x in tensors.items()}
        return token_attention(**tensors, backend="triton")

    wide = {"q": torch.zeros(10, 2, 136), "k": torch.zeros(2, 3, 2, 136), "v": torch.zeros(2, 3, 2, 136)}
    with pytest.raises(ValueError, match=r"^q: 'triton' takes a head width D up to 128, got 136"):
        refused(wide)
    double = {name: value.double() for name, value in arguments().items() if name in "qkv"}
    with pytest.raises(TypeError, match=r"^q: 'triton' takes float32, float16 and bfloat16, got float64"):
        refused(double)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"^backend: 'triton' needs CUDA tensors, got one on cpu"):
        token_attention(**arguments(backend="triton"))
