"""concept_attention: both backends against the float64 oracle, the promises of its door, and every refusal."""

import typing

import pytest
import torch

from conceptron.kernels.concept_attention import backward, concept_attention, forward, library, reference
from conceptron.kernels.splits import choose_chunk

# name: lengths, C, H, Hkv, D, q shared by the batch, dropout, scale
CASES = {
    "tiny": ([1, 3, 1], 1, 1, 1, 16, False, 0.0, None),
    "ragged": ([33, 0, 97, 1], 7, 2, 1, 32, False, 0.0, None),  # one tile and a bit, empty, three tiles and one token
    "two chunks": ([15, 290], 33, 1, 1, 16, False, 0.0, 0.5),
    "shared q": ([40, 0, 130], 20, 2, 1, 24, True, 0.0, None),  # D is no power of 2
    "shared q, two chunks": ([0, 270], 16, 1, 1, 16, True, 0.0, None),
    "dropout": ([31, 64], 32, 2, 1, 16, False, 0.25, None),
    "dropout, two chunks": ([260], 5, 1, 1, 16, False, 0.5, None),
    "two row tiles": ([40, 0], 90, 3, 1, 16, False, 0.0, None),  # 270 rows: the seven-product backward
    "two row tiles, dropout": ([17], 140, 2, 1, 16, False, 0.2, None),
    "nothing": ([0, 0], 3, 1, 1, 16, False, 0.0, None),
}
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SEED = 1234567890123
OVERLOADS = typing.get_overloads(concept_attention)


def boundaries(lengths, device) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def inputs(lengths, C, H, Hkv, D, shared, dtype, device):
    """q, k, v and the gradients of out and lse, rounded to dtype once."""
    torch.manual_seed(0)
    B, T = len(lengths), sum(lengths)
    shapes = ((C, H, D) if shared else (B, C, H, D), (T, Hkv, D), (T, Hkv, D), (B, C, H, D))
    tensors = [torch.randn(shape).to(device, dtype) for shape in shapes]
    return *tensors, torch.randn(B, H, C).to(device)


def results(attend, q, k, v, dout, dlse, dtype):
    """out, lse and the three gradients, computed in dtype. Where lse is -inf its gradient is left out."""
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    out, lse = attend(q, k, v)
    finite = lse.detach().isfinite()
    assert (lse.detach()[~finite] == -torch.inf).all() and (out.detach()[~finite.transpose(1, 2)] == 0).all()
    lse = torch.where(finite, lse, 0.0)
    loss = (out * dout.to(out.dtype)).sum() + (lse * dlse.to(lse.dtype)).sum()
    gradients = torch.autograd.grad(loss, (q, k, v), allow_unused=True)
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip((q, k, v), gradients, strict=True)]
    return out.detach(), lse.detach(), *gradients


@pytest.fixture
def poison(poison, monkeypatch):
    """That of all operators, for what is made like another tensor too."""
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device))


def compare(lengths, C, H, Hkv, D, shared, dropout_p, scale, dtype, backend, device, no_worse):
    cu_seqlens = boundaries(lengths, device)
    tensors = inputs(lengths, C, H, Hkv, D, shared, dtype, device)
    options = {"scale": scale, "dropout_p": dropout_p, "seed": torch.tensor([SEED], device=device)}

    def door(q, k, v):
        longest = max(lengths, default=0)
        return concept_attention(q, k, v, cu_seqlens, longest, return_lse=True, backend=backend, **options)

    def oracle(q, k, v):
        return reference.concept_attention(q, k, v, cu_seqlens, **options)

    compared = (
        results(door, *tensors, dtype), results(oracle, *tensors, dtype), results(oracle, *tensors, torch.float64),
    )  # fmt: skip
    # p is recomputed as exp(s - lse): in float32 that rounding, eps * |lse|, is the largest, and eager does not have it
    slack = 8.0 if dtype == torch.float32 else 1.0
    for name, *three in zip(("out", "lse", "dq", "dk", "dv"), *compared, strict=True):
        no_worse(name, *three, slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_triton_is_no_worse_than_eager(case, dtype, device, no_worse, poison):
    compare(*case, dtype, "triton", device, no_worse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_torch_is_no_worse_than_eager(case, dtype, device, no_worse):
    compare(*case, dtype, "torch", device, no_worse)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_torch_is_the_oracle_in_float64(case, device):
    lengths, C, H, Hkv, D, shared, dropout_p, scale = case
    cu_seqlens = boundaries(lengths, device)
    tensors = inputs(lengths, C, H, Hkv, D, shared, torch.float32, device)
    options = {"scale": scale, "dropout_p": dropout_p, "seed": torch.tensor([SEED], device=device)}
    attends = (
        lambda *x: concept_attention(*x, cu_seqlens, max(lengths), return_lse=True, backend="torch", **options),
        lambda *x: reference.concept_attention(*x, cu_seqlens, **options),
    )
    for got, want in zip(*(results(attend, *tensors, torch.float64) for attend in attends), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("lengths", [[5, 5], [3, 0, 7], [0]], ids=["equal", "ragged", "empty"])
def test_torch_without_lse_takes_sdpa_and_agrees(lengths, device):
    cu_seqlens = boundaries(lengths, device)
    q, k, v, *_ = (x.double() for x in inputs(lengths, 6, 4, 2, 8, False, torch.float32, device))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = concept_attention(q, k, v, cu_seqlens, 9, backend="torch")
    expected, _ = reference.concept_attention(q, k, v, cu_seqlens)
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(torch.isfinite(gradient).all() for gradient in gradients), "T = 0 must still reach k and v"
    if sum(lengths):
        wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
        for got, want in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(got, want)


REAL = {
    "one long": ([131072], 128, 8, 8, 64, False, 0.0, None),
    "batch": ([512] * 16, 128, 8, 8, 64, True, 0.1, None),
    "ragged batch": ([4000, 1, 0, 129, 2047, 8192], 256, 8, 2, 64, False, 0.0, None),
    "many concepts": ([3000, 500], 2048, 2, 2, 64, False, 0.0, None),
    "wide heads": ([1000, 3], 128, 4, 4, 128, True, 0.1, None),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", REAL.values(), ids=REAL)
def test_real_sizes(case, dtype, device, no_worse, poison):
    compare(*case, dtype, "triton", device, no_worse)


@pytest.mark.parametrize("sign", [-1.0, 1.0], ids=["very negative", "very positive"])
@pytest.mark.parametrize("C", [5, 270], ids=["one pass", "two passes"])
def test_large_scores_stay_finite(C, sign, device):
    """All scores near sign * 3600: a masked column or row counts as a score of 0, whose weight would overflow."""
    q = torch.full((C, 1, 16), 30.0, device=device)
    k = (sign * 30 + torch.arange(40.0, device=device)[:, None, None] / 100).expand(40, 1, 16)
    v = torch.randn(40, 1, 16, device=device)
    lengths = [33, 0, 7]
    cu_seqlens = boundaries(lengths, device)
    leaves = [x.half().requires_grad_() for x in (q, k, v)]
    out = concept_attention(*leaves, cu_seqlens, 33, backend="triton")
    expected, _ = reference.concept_attention(*(x.double() for x in leaves), cu_seqlens)
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert torch.isfinite(gradient).all()


def run_split(q, k, v, dout, dlse, cu_seqlens, longest, chunk, dropout_p=0.0):
    seed = torch.tensor([SEED], device=q.device) if dropout_p else None
    out, lse = forward.forward(q, k, v, cu_seqlens, longest, 0.3, dropout_p, seed, chunk)
    arguments = dout, dlse, q, k, v, out, lse, cu_seqlens, longest, 0.3, dropout_p, seed, chunk
    return out, lse, *backward.backward(*arguments)


@pytest.mark.parametrize("shared", [False, True], ids=["own q", "shared q"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_result_does_not_depend_on_the_split(shared, dropout_p, device, poison):
    lengths = [90, 0, 64, 5]
    cu_seqlens = boundaries(lengths, device)
    q, k, v, dout, dlse = inputs(lengths, 5, 2, 2, 16, shared, torch.float16, device)
    dlse[1] = 0  # the empty sequence
    whole, *splits = (
        run_split(q, k, v, dout, dlse, cu_seqlens, 90, chunk, dropout_p) for chunk in (96, 64, 32)
    )  # one chunk a sequence, then up to 2 and 3
    for split in splits:
        for got, want in zip(split, whole, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)  # one rounding to float16


def test_same_bits_twice(device):
    lengths = [200, 0, 70]
    cu_seqlens = boundaries(lengths, device)
    tensors = inputs(lengths, 5, 2, 1, 16, True, torch.float16, device)
    first, second = (run_split(*tensors, cu_seqlens, 200, 64, 0.2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_chunks_follow_from_sizes():
    assert choose_chunk(131072, 131072, 8, 8, 64) * 33 >= 131072, "one long sequence fills the machine"
    assert choose_chunk(131072, 131072, 8, 8, 64) <= 4096
    assert choose_chunk(64 * 512, 512, 8, 8, 64) == 512, "a large batch needs no split"
    assert choose_chunk(0, 0, 8, 8, 64) == 64


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_any_strides_and_offsets(backend, device):
    """k and v as strided halves of one projection at an odd offset, q transposed, gradients expanded or transposed."""
    lengths, C, H, D = [19, 30], 6, 2, 16
    T, cu_seqlens = sum(lengths), boundaries(lengths, device)
    torch.manual_seed(0)
    buffer = torch.randn(1 + T * 2 * H * D + 2 * H * C * D, device=device)
    k, v = buffer[1 : 1 + T * 2 * H * D].view(T, 2 * H, D).chunk(2, dim=1)
    q = buffer[1 + T * 2 * H * D :].view(2, H, D, C).permute(0, 3, 1, 2)  # the last stride is C
    strided, packed = [q, k, v], [x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)]
    assert not any(x.is_contiguous() for x in strided)
    losses = (
        lambda out: out.sum(),  # the gradient arrives expanded, all strides 0
        lambda out: (out.transpose(1, 3) * torch.arange(C, device=device)).sum(),
    )
    for loss in losses:
        found = []
        for tensors in (strided, packed):
            leaves = [x.detach().requires_grad_() for x in tensors]
            out = concept_attention(*leaves, cu_seqlens, 30, backend=backend)
            found.append((out, *torch.autograd.grad(loss(out), leaves)))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_shared_q_equals_expanded_q(device):
    lengths = [30, 0, 70]
    cu_seqlens = boundaries(lengths, device)
    q, k, v, dout, _ = inputs(lengths, 5, 2, 2, 16, True, torch.float32, device)
    q.requires_grad_()
    shared = concept_attention(q, k, v, cu_seqlens, 70, backend="triton")
    expanded = concept_attention(q.expand(3, -1, -1, -1), k, v, cu_seqlens, 70, backend="triton")
    assert torch.equal(shared, expanded)
    gradients = [torch.autograd.grad(out, q, dout)[0] for out in (shared, expanded)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,)], ids=["q", "k", "v"])
def test_gradients_that_are_not_wanted(wanted, device):
    cu_seqlens = boundaries([20], device)
    tensors = list(inputs([20], 4, 1, 1, 16, False, torch.float32, device)[:3])
    for i in wanted:
        tensors[i].requires_grad_()
    out = concept_attention(*tensors, cu_seqlens, 20, backend="triton")
    out.sum().backward()
    assert [x.grad is not None for x in tensors] == [i in wanted for i in range(3)]


def test_lse_alone_is_differentiable(device):
    lengths = [20, 3]
    cu_seqlens = boundaries(lengths, device)
    q, k, v, _, dlse = inputs(lengths, 4, 2, 1, 16, False, torch.float32, device)
    q, k = q.requires_grad_(), k.requires_grad_()
    _, lse = concept_attention(q, k, v, cu_seqlens, 20, return_lse=True, backend="triton")
    _, expected = reference.concept_attention(q.double(), k.double(), v.double(), cu_seqlens)
    for got, want in zip(
        torch.autograd.grad(lse, (q, k), dlse), torch.autograd.grad(expected, (q, k), dlse.double()), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_second_derivative_raises(device):
    q, k, v, *_ = inputs([9], 3, 1, 1, 16, False, torch.float32, device)
    out = concept_attention(q.requires_grad_(), k, v, boundaries([9], device), 9, backend="triton")
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("shared", [False, True], ids=["own q", "shared q"])
def test_registration(shared, device):
    """torch.library.opcheck: schema, fake tensors, and tracing with dynamic shapes."""
    cu_seqlens = boundaries([9, 0, 20], device)
    q, k, v, dout, dlse = inputs([9, 0, 20], 3, 2, 1, 16, shared, torch.float32, device)
    seed = torch.tensor([SEED], device=device)
    ops = torch.ops.conceptron
    torch.library.opcheck(ops.concept_attention.default, (q, k, v, cu_seqlens, 20, 0.3, 0.2, seed))
    out, lse = ops.concept_attention(q, k, v, cu_seqlens, 20, 0.3, 0.0, None)
    rest = q, k, v, out, lse, cu_seqlens, 20, 0.3, 0.0, None
    torch.library.opcheck(ops.concept_attention_backward.default, (dout, dlse, *rest))
    torch.library.opcheck(ops.concept_attention_backward.default, (dout, None, *rest))


def test_types_say_what_return_lse_does():
    """What a type checker reads; mypy and pyright agree with it where they are run."""
    found = {typing.get_type_hints(f)["return_lse"]: typing.get_type_hints(f)["return"] for f in OVERLOADS}
    pair = tuple[torch.Tensor, torch.Tensor]
    assert found == {
        typing.Literal[False]: torch.Tensor, typing.Literal[True]: pair, bool: torch.Tensor | pair,
    }  # fmt: skip
    q, k = torch.zeros(1, 2, 1, 4), torch.zeros(3, 1, 4)
    for wanted, kind in ((False, torch.Tensor), (True, tuple)):
        assert type(concept_attention(q, k, k, boundaries([3], "cpu"), 3, return_lse=wanted)) is kind


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiles_whole_and_once_for_all_lengths(backend, device):
    torch._dynamo.reset()
    compiled = torch.compile(concept_attention, fullgraph=True, backend="aot_eager")
    for step, lengths in enumerate(([9, 4], [20, 0], [3, 8], [31, 2])):
        cu_seqlens = boundaries(lengths, device)
        q, k, v, *_ = inputs(lengths, 3, 2, 1, 16, False, torch.float32, device)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        with torch._dynamo.config.patch(error_on_recompile=step > 1):  # the second length makes T dynamic
            out, lse = compiled(q, k, v, cu_seqlens, max(lengths), return_lse=True, backend=backend)
        expected = concept_attention(q, k, v, cu_seqlens, max(lengths), return_lse=True, backend=backend)
        torch.testing.assert_close((out, lse), expected, rtol=1e-5, atol=1e-6)
        gradients, wanted = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (out, expected[0]))
        torch.testing.assert_close(gradients, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_casts_as_sdpa_does(backend, device):
    cu_seqlens = boundaries([9], device)
    q, k, v, *_ = inputs([9], 3, 1, 1, 16, False, torch.float32, device)
    q.requires_grad_()
    with torch.autocast(device.type, dtype=torch.float16):
        out, lse = concept_attention(q, k.half(), v, cu_seqlens, 9, return_lse=True, backend=backend)
    assert out.dtype == torch.float16 and lse.dtype == torch.float32
    out.sum().backward()
    assert q.grad.dtype == torch.float32 and torch.isfinite(q.grad).all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_dropout_seeds(backend, device):
    cu_seqlens = boundaries([40], device)
    q, k, v, *_ = inputs([40], 8, 2, 1, 16, False, torch.float32, device)

    def attend(seed):
        return concept_attention(q, k, v, cu_seqlens, 40, dropout_p=0.5, seed=seed, backend=backend)

    assert torch.equal(attend(5), attend(torch.tensor([5], device=device)))
    assert not torch.equal(attend(5), attend(6))
    torch.manual_seed(3)
    first, second = attend(None), attend(None)
    torch.manual_seed(3)
    assert torch.equal(first, attend(None)) and not torch.equal(first, second)


def test_dropout_keeps_the_mean(device):
    """Averaged over many seeds dropout gives the result without it: the kept weights grow by 1/(1-p)."""
    cu_seqlens = boundaries([24], device)
    q, k, v, *_ = inputs([24], 16, 2, 1, 16, False, torch.float32, device)
    plain = concept_attention(q, k, v, cu_seqlens, 24, backend="torch")
    drawn = [concept_attention(q, k, v, cu_seqlens, 24, dropout_p=0.3, seed=s, backend="torch") for s in range(200)]
    drawn = torch.stack(drawn)
    assert float(((drawn.mean(0) - plain) / (drawn.std(0) / 200**0.5)).abs().mean()) < 1.1


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
def test_whatever_the_tables_choose_is_compiled(dropout, compiled_by):
    """For any number of rows, the tiles of every kernel are among the builds of the compile table."""
    compiled = compiled_by([build for build in library.builds() if ("seed_ptr" not in build.constants) == dropout])
    for units, wide in forward.TILES:
        block_d = 128 if wide else 64
        for num_rows in (1, 17, 33, 65, 128, 129, 256, 257, 2048):
            chosen = forward.forward_config(num_rows, block_d, units, dropout)
            assert compiled(forward.forward_kernel, units, block_d, chosen), (units, wide, num_rows, chosen)
            rows, tokens = backward.backward_config(num_rows, block_d, units, dropout)
            assert rows["ONE_PASS"] == (tokens is None)
            assert compiled(backward.row_kernel, units, block_d, rows), (units, wide, num_rows, rows)
            assert tokens is None or compiled(backward.dkv_kernel, units, block_d, tokens), (units, wide, tokens)


@pytest.mark.gpu
def test_graph_capture_and_replay_with_other_lengths(device):
    q, k, v, dout, _ = inputs([1000, 24], 64, 4, 4, 64, False, torch.bfloat16, device)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    cu_seqlens = boundaries([1000, 24], device)

    def step():
        out = concept_attention(q, k, v, cu_seqlens, 1024)
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
    q, k, v = torch.zeros(2, 3, 4, 8), torch.zeros(10, 2, 8), torch.zeros(10, 2, 8)
    good = {"q": q, "k": k, "v": v, "cu_seqlens": torch.tensor([0, 4, 10], dtype=torch.int32), "max_seqlen": 6}
    return {**good, **changes}


REFUSED = {
    "q no tensor": (TypeError, r"q: expected a tensor", {"q": [1]}),
    "q rank": (ValueError, r"q: expected shape \[B, C, H, D\] or \[C, H, D\], got \[3, 4\]", {"q": torch.zeros(3, 4)}),
    "q dtype": (TypeError, r"q: expected float32, .* got torch.int64", {"q": torch.zeros(2, 3, 4, 8).long()}),
    "q empty": (ValueError, r"q: expected at least one concept", {"q": torch.zeros(2, 0, 4, 8)}),
    "k rank": (ValueError, r"k: expected shape \[T, Hkv, D\], got \[10, 16\]", {"k": torch.zeros(10, 16)}),
    "k dtype": (TypeError, r"k: expected q's dtype torch.float32", {"k": torch.zeros(10, 2, 8).half()}),
    "k device": (ValueError, r"k: expected q's device", {"k": torch.zeros(10, 2, 8, device="meta")}),
    "k width": (ValueError, r"k: expected D = 8 \(q's head width\), got 16", {"k": torch.zeros(10, 2, 16)}),
    "heads": (ValueError, r"k: expected Hkv to divide q's H = 4, got 3", {"k": torch.zeros(10, 3, 8)}),
    "v shape": (ValueError, r"v: expected T = 10 \(k's\), got 9", {"v": torch.zeros(9, 2, 8)}),
    "cu dtype": (TypeError, r"cu_seqlens: expected int32", {"cu_seqlens": torch.tensor([0, 4, 10])}),
    "cu start": (ValueError, r"cu_seqlens: expected to start at 0", {"cu_seqlens": torch.tensor([1, 4, 10]).int()}),
    "cu end": (ValueError, r"cu_seqlens: expected to end at T = 10", {"cu_seqlens": torch.tensor([0, 4, 9]).int()}),
    "cu order": (ValueError, r"cu_seqlens: expected never to", {"cu_seqlens": torch.tensor([0, 11, 10]).int()}),
    "max type": (TypeError, r"max_seqlen: expected a Python int", {"max_seqlen": torch.tensor(6)}),
    "max small": (ValueError, r"max_seqlen: expected at least the longest sequence, 6", {"max_seqlen": 5}),
    "batch": (ValueError, r"q: expected B = 2", {"q": torch.zeros(3, 3, 4, 8)}),
    "scale": (ValueError, r"scale: expected a positive, finite number, got 0.0", {"scale": 0.0}),
    "dropout": (ValueError, r"dropout_p: expected 0 <= dropout_p < 1, got 1.0", {"dropout_p": 1.0}),
    "seed": (ValueError, r"seed: expected 0 <= seed", {"dropout_p": 0.5, "seed": -1}),
    "backend": (ValueError, r"backend: expected one of auto, triton, torch, got 'cuda'", {"backend": "cuda"}),
}


@pytest.mark.parametrize(("error", "message", "changes"), REFUSED.values(), ids=REFUSED)
def test_refusals(error, message, changes):
    with pytest.raises(error, match="^" + message):
        concept_attention(**arguments(**changes))


def test_triton_refuses_what_it_cannot_run(device, monkeypatch):
    def refused(tensors):
        tensors = arguments(**tensors)
        tensors = {name: x.to(device) if torch.is_tensor(x) else x for name, x in tensors.items()}
        return concept_attention(**tensors, backend="triton")

    wide = {"q": torch.zeros(2, 3, 2, 136), "k": torch.zeros(10, 2, 136), "v": torch.zeros(10, 2, 136)}
    with pytest.raises(ValueError, match=r"^q: 'triton' takes a head width D up to 128, got 136"):
        refused(wide)
    double = {name: value.double() for name, value in arguments().items() if name in "qkv"}
    with pytest.raises(TypeError, match=r"^q: 'triton' takes float32, float16 and bfloat16, got float64"):
        refused(double)
    if device.type == "cpu":
        with pytest.raises(TypeError, match=r"^q: .* wrong bfloat16 products"):
            refused({name: value.bfloat16() for name, value in arguments().items() if name in "qkv"})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"^backend: 'triton' needs CUDA tensors, got one on cpu"):
        concept_attention(**arguments(backend="triton"))
