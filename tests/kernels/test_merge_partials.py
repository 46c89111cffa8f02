"""merge_partials: token shards give what the whole gives, values and gradients, in one process and in two."""

import multiprocessing
import traceback

import pytest
import torch
import torch.distributed as dist

from conceptron.kernels.concept_attention import concept_attention, merge_partials

LENGTHS = [[3, 0, 6, 0], [5, 0, 0, 1], [0, 0, 7, 2]]  # tokens of each of 4 sequences in each of 3 shards
C, H, D = 5, 2, 16


def boundaries(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def shards(dtype, device):
    """Shared q and one (k, v) a shard."""
    torch.manual_seed(0)
    q = torch.randn(C, H, D, dtype=dtype, device=device, requires_grad=True)
    parts = [torch.randn(2, sum(lengths), H, D, dtype=dtype, device=device, requires_grad=True) for lengths in LENGTHS]
    return q, parts


def attend(q, part, lengths, backend):
    cu_seqlens = boundaries(lengths).to(q.device)
    return concept_attention(q, part[0], part[1], cu_seqlens, max(lengths), return_lse=True, backend=backend)


def whole(q, parts, backend):
    """The unsplit operator: every sequence's tokens of all shards, one after the other."""
    split = [part.split(lengths, dim=1) for part, lengths in zip(parts, LENGTHS, strict=True)]
    joined = torch.cat([split[shard][b] for b in range(len(LENGTHS[0])) for shard in range(len(parts))], dim=1)
    return attend(q, joined, [sum(lengths) for lengths in zip(*LENGTHS, strict=True)], backend)


def loss(out, lse):
    torch.manual_seed(1)
    weights = torch.randn(out.shape, dtype=out.dtype), torch.randn(lse.shape, dtype=lse.dtype)
    finite = torch.where(lse.isfinite(), lse, 0.0)  # the second sequence is empty everywhere
    return (out * weights[0].to(out.device)).sum() + (finite * weights[1].to(lse.device)).sum()


@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float64), ("triton", torch.float32)])
def test_shards_equal_the_whole(backend, dtype, device):
    q, parts = shards(dtype, device)
    merged = merge_partials(*zip(*(attend(q, *s, backend) for s in zip(parts, LENGTHS, strict=True)), strict=True))
    expected = whole(q, parts, backend)
    tolerance = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {}
    torch.testing.assert_close(merged, expected, **tolerance)
    assert (merged[0][1] == 0).all() and (merged[1][1] == -torch.inf).all()
    gradients, wanted = (torch.autograd.grad(loss(*result), (q, *parts)) for result in (merged, expected))
    torch.testing.assert_close(gradients, wanted, **tolerance)


def test_merge_is_associative(device):
    q, parts = shards(torch.float64, device)
    a, b, c = (attend(q, *s, "torch") for s in zip(parts, LENGTHS, strict=True))

    def merge(*results):
        return merge_partials(*zip(*results, strict=True))

    for other in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, a, b)):
        torch.testing.assert_close(other, merge(a, b, c))
    torch.testing.assert_close(merge(a), a)


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    outs = torch.randn(3, 1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    lses = torch.randn(3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(merge_partials, (outs, lses))


def test_large_and_missing_lse_stay_finite():
    outs = torch.ones(2, 1, 3, 1, 4, requires_grad=True)
    lses = torch.tensor([[500.0, -torch.inf, -500.0], [-torch.inf, -torch.inf, -501.0]]).view(2, 1, 1, 3)
    lses.requires_grad_()
    out, lse = merge_partials(outs, lses)
    assert out[0, :, 0, 0].tolist() == [1.0, 0.0, 1.0]
    assert lse[0, 0, 0] == 500 and lse[0, 0, 1] == -torch.inf and -500 < lse[0, 0, 2] < -499
    (out.sum() + lse[0, 0, 0] + lse[0, 0, 2]).backward()
    assert torch.isfinite(outs.grad).all() and torch.isfinite(lses.grad).all()


def test_low_precision_outs_keep_their_dtype():
    out, lse = merge_partials([torch.ones(1, 2, 1, 4).bfloat16()] * 2, [torch.zeros(1, 1, 2)] * 2)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32


def test_compiles_whole():
    torch._dynamo.reset()
    q, parts = shards(torch.float32, "cpu")
    results = [attend(q, *s, "torch") for s in zip(parts, LENGTHS, strict=True)]
    compiled = torch.compile(merge_partials, fullgraph=True, backend="aot_eager")
    outs, lses = ([result[i].detach() for result in results] for i in (0, 1))
    torch.testing.assert_close(compiled(outs, lses), merge_partials(outs, lses))


REFUSED = {
    "number": (TypeError, r"outs: expected a tensor or a sequence", 3, torch.zeros(2, 1, 1, 3)),
    "none": (ValueError, r"outs: expected at least one shard", [], []),
    "mixed": (ValueError, r"outs: expected shards of one shape", [torch.zeros(1), torch.zeros(2)], torch.zeros(1)),
    "rank": (ValueError, r"outs: expected shape \[S, B, C, H, D\]", torch.zeros(1, 3, 1, 4), torch.zeros(2, 1, 1, 3)),
    "lse dtype": (TypeError, r"lses: expected float32", torch.zeros(2, 1, 3, 1, 4), torch.zeros(2, 1, 1, 3).half()),
    "lse shape": (ValueError, r"lses: expected shape", torch.zeros(2, 1, 3, 1, 4), torch.zeros(2, 1, 3, 1)),
    "empty": (ValueError, r"outs: expected at least one shard", torch.zeros(0, 1, 3, 1, 4), torch.zeros(0, 1, 1, 3)),
}


@pytest.mark.parametrize(("error", "message", "outs", "lses"), REFUSED.values(), ids=REFUSED)
def test_refusals(error, message, outs, lses):
    with pytest.raises(error, match="^" + message):
        merge_partials(outs, lses)


class Gather(torch.autograd.Function):
    """Every rank's tensor, stacked; backward sums the gradients that all ranks have for this rank's."""

    @staticmethod
    def forward(ctx, x):
        gathered = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, x.contiguous())
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


def _rank(rank: int, folder: str, errors) -> None:
    """One of two processes, each with its own tokens: only out and lse, and their gradients, cross."""
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(f"{folder}/store", 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        q, parts = shards(torch.float64, "cpu")
        out, lse = attend(q, parts[rank], LENGTHS[rank], "torch")
        merged = merge_partials(Gather.apply(out), Gather.apply(lse))
        (loss(*merged) / 2).backward()  # both ranks compute the whole loss; the gather's backward adds them up
        dist.all_reduce(q.grad)
        lengths = [sum(n) for n in zip(*LENGTHS[:2], strict=True)]
        split = [part.detach().split(n, dim=1) for part, n in zip(parts[:2], LENGTHS[:2], strict=True)]
        joined = torch.cat([split[shard][b] for b in range(4) for shard in range(2)], dim=1).requires_grad_()
        whole_q = q.detach().clone().requires_grad_()
        expected = attend(whole_q, joined, lengths, "torch")
        torch.testing.assert_close(merged, expected)
        loss(*expected).backward()
        torch.testing.assert_close(q.grad, whole_q.grad)
        mine = torch.cat([
            piece for b, piece_lengths in enumerate(zip(*LENGTHS[:2], strict=True))
            for piece in [joined.grad.split(lengths, dim=1)[b].split(piece_lengths, dim=1)[rank]]
        ], dim=1)  # fmt: skip
        torch.testing.assert_close(parts[rank].grad, mine)
        dist.destroy_process_group()
    except BaseException:
        errors.put(f"rank {rank}:\n{traceback.format_exc()}")
        raise


def test_two_processes_that_share_a_sequence(tmp_path):
    context = multiprocessing.get_context("fork")
    errors = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path), errors)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    for process in ranks:
        if process.is_alive():
            process.kill()
    assert errors.empty(), errors.get()
    assert [process.exitcode for process in ranks] == [0, 0]
