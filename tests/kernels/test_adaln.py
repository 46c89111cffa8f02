"""Adaptive layer norm: both backends against the float64 oracle, with shapes that break masks and strides that break
addresses."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from conceptron.kernels.adaln import adaln_modulate, adaln_residual_modulate, fused, library, op
from conceptron.kernels.adaln.reference import reference_modulate, reference_residual_modulate

LENGTHS = {"ragged": [17, 0, 40, 1], "one": [9], "ends-empty": [0, 3, 0], "all-empty": [0, 0], "none": []}
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def poison():
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def boundaries(lengths, device):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def make(shape, batch, width, dtype, device, residual=True):
    """x, branch, and modulations that are views of one [B,6d], as a model has them."""
    generator = torch.Generator().manual_seed(1)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    x, branch = (1 + 2 * draw(*shape, width)).to(device, dtype), draw(*shape, width).to(device, dtype)
    modulation = draw(batch, 6 * width).to(device, dtype)
    leaves = [x, branch, modulation] if residual else [x, modulation]
    return [leaf.requires_grad_() for leaf in leaves]


def call(leaves, cu_seqlens, plain, residual):
    gate, shift, scale = leaves[-1].chunk(6, -1)[1:4]
    if len(leaves) == 3:
        return residual(leaves[0], leaves[1], gate, shift, scale, cu_seqlens)
    return (plain(leaves[0], shift, scale, cu_seqlens),)


def door(leaves, cu_seqlens, backend, eps=1e-6):
    doors = (functools.partial(each, eps=eps, backend=backend) for each in (adaln_modulate, adaln_residual_modulate))
    return call(leaves, cu_seqlens, *doors)


def oracle(leaves, cu_seqlens, eps=1e-6):
    oracles = (functools.partial(each, eps=eps) for each in (reference_modulate, reference_residual_modulate))
    return call(leaves, cu_seqlens, *oracles)


def double(leaves):
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


def gradients_of(outputs):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype) for o in outputs]


def check(no_worse, leaves, cu_seqlens, backend, eps=1e-6):
    ours, eager = door(leaves, cu_seqlens, backend, eps), oracle(leaves, cu_seqlens, eps)
    exact = double(leaves)
    truth = oracle(exact, cu_seqlens, eps)
    upstream = gradients_of(ours)
    grads = torch.autograd.grad(ours, leaves, upstream)
    eager_grads = torch.autograd.grad(eager, leaves, upstream)
    true_grads = torch.autograd.grad(truth, exact, [g.double() for g in upstream])
    names = ["h", "y"][-len(ours) :] + ["dx", "dbranch", "dmodulation"][: len(leaves) - 1] + ["dmodulation"]
    for name, *three in zip(names, (*ours, *grads), (*eager, *eager_grads), (*truth, *true_grads), strict=False):
        no_worse(name, *(t.detach() for t in three))


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("lengths", "width"), [("ragged", 33), ("ragged", 128), ("one", 200), ("ends-empty", 7)])
def test_packed(lengths, width, dtype, residual, device, no_worse):
    lengths = LENGTHS[lengths]
    leaves = make([sum(lengths)], len(lengths), width, dtype, device, residual)
    check(no_worse, leaves, boundaries(lengths, device), "triton")


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", [(2, 35, 48), (3, 1, 5), (1, 70, 128)], ids=str)
def test_padded(shape, residual, device, no_worse):
    check(no_worse, make(shape[:2], shape[0], shape[2], torch.float32, device, residual), None, "triton")


@pytest.mark.parametrize("width", [1, 300, 600, 1100, 2100, 4100, 8192])
def test_every_width(width, device, no_worse, monkeypatch):
    monkeypatch.setattr(fused, "REDUCE_D", 1024)  # fewer programs: the interpreter runs them one by one
    check(no_worse, make([5], 2, width, torch.float32, device), boundaries([2, 3], device), "triton")


@pytest.mark.parametrize("lengths", ["all-empty", "none"])
def test_no_rows(lengths, device):
    lengths = LENGTHS[lengths]
    for backend in ("triton", "torch"):
        leaves = make([0], len(lengths), 16, torch.float32, device)
        outputs = door(leaves, boundaries(lengths, device), backend)
        assert [list(o.shape) for o in outputs] == [[0, 16], [0, 16]]
        grads = torch.autograd.grad(outputs, leaves, gradients_of(outputs))
        assert not grads[2].any() and torch.isfinite(grads[2]).all()


def test_padded_without_tokens(device):
    for backend in ("triton", "torch"):
        leaves = make([2, 0], 2, 16, torch.float32, device)
        outputs = door(leaves, None, backend)
        assert not torch.autograd.grad(outputs, leaves, gradients_of(outputs))[2].any()


def test_more_sequences_than_one_search_step(device, no_worse, monkeypatch):
    monkeypatch.setattr(fused, "BLOCK_B", 4)
    lengths = [1, 0, 0, 5, 2, 0, 1, 35, 0, 3, 0]
    leaves = make([sum(lengths)], len(lengths), 20, torch.float32, device)
    check(no_worse, leaves, boundaries(lengths, device), "triton")


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_eps_is_used(backend, device, no_worse):
    leaves = make([6], 1, 12, torch.float32, device)
    check(no_worse, leaves, boundaries([6], device), backend, eps=0.5)


def test_constant_rows_give_the_shift(device):
    x, modulation = torch.full((3, 9), 7.25, device=device), torch.randn(2, 1, 9, device=device)
    for backend in ("triton", "torch"):
        y = adaln_modulate(x, modulation[0], modulation[1], boundaries([3], device), backend=backend)
        assert torch.equal(y, modulation[0].expand(3, 9))


@pytest.mark.parametrize("lengths", ["ragged", "one", "ends-empty"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("repeat", [1, 30])  # short sequences are expanded, long ones normalised one by one
def test_torch_backend(lengths, residual, repeat, device, no_worse):
    lengths = [repeat * n for n in LENGTHS[lengths]]
    leaves = make([sum(lengths)], len(lengths), 33, torch.float32, device, residual)
    check(no_worse, leaves, boundaries(lengths, device), "torch")


def test_torch_backend_padded_and_in_float64(device):
    leaves = make([2, 5], 2, 8, torch.float64, device)
    ours, truth = door(leaves, None, "torch"), oracle(leaves, None)
    torch.testing.assert_close(ours, truth)
    grads = [torch.autograd.grad(outputs, leaves, gradients_of(truth)) for outputs in (ours, truth)]
    torch.testing.assert_close(*grads)


def test_torch_backend_saves_no_expanded_modulation():
    x, modulation = make([400], 2, 64, torch.float32, "cpu", residual=False)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        door([x, modulation], boundaries([100, 300], "cpu"), "torch")
    assert sum(t.numel() for t in saved.values()) < 1.1 * x.numel()


class Recorder:
    """Stands in for a kernel: notes the arguments, then launches it."""

    def __init__(self, kernel):
        self.kernel, self.calls = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.calls.append(dict(zip(self.kernel.arg_names, args, strict=False)))
            return self.kernel[grid](*args, **options)

        return launch


def test_chunks_are_read_in_place(device, monkeypatch):
    leaves = make([5], 2, 24, torch.float32, device)
    gate, shift, scale = leaves[2].detach().chunk(6, -1)[1:4]
    recorders = [Recorder(fused._forward_kernel), Recorder(fused._backward_kernel)]
    monkeypatch.setattr(fused, "_forward_kernel", recorders[0])
    monkeypatch.setattr(fused, "_backward_kernel", recorders[1])
    outputs = door(leaves, boundaries([2, 3], device), "triton")
    torch.autograd.grad(outputs, leaves, gradients_of(outputs))
    (forward,), (backward,) = recorders[0].calls, recorders[1].calls
    for seen, name, view in [(forward, "gate", gate), (forward, "shift", shift), (forward, "scale", scale),
                             (backward, "gate", gate), (backward, "scale", scale)]:  # fmt: skip
        assert seen[f"{name}_ptr"].data_ptr() == view.data_ptr()
        assert (seen[f"{name}_stride_b"], seen[f"{name}_stride_d"]) == (6 * 24, 1)


def odd(tensor, how):
    """The same values in another layout."""
    if how == "offset":  # the first element is not aligned to anything
        room = tensor.new_empty(tensor.numel() + 3)
        return room[3:].view(tensor.shape).copy_(tensor)
    if how == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "gapped":
        return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]
    return tensor[:1].expand_as(tensor)


@pytest.mark.parametrize("how", ["offset", "transposed", "gapped", "expanded"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_any_strides(how, packed, device):
    shape, cu_seqlens = ([7], boundaries([3, 4], device)) if packed else ([2, 4], None)
    x, branch, modulation = (odd(t.detach(), how) for t in make(shape, 2, 20, torch.float32, device))
    results = []
    for layout in (lambda t: t, torch.Tensor.contiguous):
        leaves = [layout(t).detach().requires_grad_() for t in (x, branch, modulation)]
        outputs = door(leaves, cu_seqlens, "triton")
        upstream = [layout(odd(g, how)) for g in gradients_of(outputs)]
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, upstream)))
    for strided, contiguous in zip(*results, strict=True):
        if device.type == "cpu":
            assert torch.equal(strided, contiguous)
        torch.testing.assert_close(strided, contiguous)  # a GPU may sum in another order: the layout of loads differs


@pytest.mark.parametrize("used", [0, 1], ids=["only h", "only y"])
def test_one_output_unused(used, device, no_worse):
    leaves = make([8], 2, 20, torch.float32, device)
    cu_seqlens = boundaries([5, 3], device)
    exact = double(leaves)
    runs = [(door(leaves, cu_seqlens, "triton"), leaves), (oracle(leaves, cu_seqlens), leaves),
            (oracle(exact, cu_seqlens), exact)]  # fmt: skip
    grads = [torch.autograd.grad(out[used].square().sum(), of, materialize_grads=True) for out, of in runs]
    for name, *three in zip(("dx", "dbranch", "dmodulation"), *grads, strict=True):
        no_worse(name, *three, slack=4.0)  # three more roundings: the square and its gradient


def test_expanded_gradient_of_a_sum(device):
    results = []
    for backend in ("triton", "torch"):
        leaves = make([8], 2, 20, torch.float32, device)
        h, y = door(leaves, boundaries([5, 3], device), backend)
        results.append(torch.autograd.grad(h.sum() + 2 * y.sum(), leaves))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_twice_the_same_bits_and_no_neighbours(device):
    lengths = [19, 0, 33]
    leaves = make([52], 3, 40, torch.float32, device)
    runs = []
    for _ in range(2):
        outputs = door(leaves, boundaries(lengths, device), "triton")
        runs.append((*outputs, *torch.autograd.grad(outputs, leaves, gradients_of(outputs))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    alone = [leaves[0][19:], leaves[1][19:], leaves[2][2:]]
    for mine, whole in zip(door(alone, boundaries([33], device), "triton"), runs[0], strict=False):
        assert torch.equal(mine, whole[19:])


def test_y_is_the_norm_of_h_as_stored(device):
    leaves = [t.detach() for t in make([40], 2, 33, torch.float16, device)]
    cu_seqlens = boundaries([15, 25], device)
    h, y = door(leaves, cu_seqlens, "triton")
    again = door([h, leaves[2]], cu_seqlens, "triton")[0]
    # of a norm of the unrounded h, every third value would differ; another kernel on a GPU may round a few otherwise
    assert (y != again).float().mean() <= (0.0 if device.type == "cpu" else 0.02)


def test_slots_cover_every_row_once():
    """The map of the kernels, in Python, over many boundaries: no row is missed, none belongs to two slots."""
    generator = torch.Generator().manual_seed(3)
    for trial in range(200):
        lengths = torch.randint(0, 30, (trial % 7 + 1,), generator=generator).tolist()
        rows = [1, 2, 8, 16][trial % 4]
        starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        total, batch = starts[-1], len(lengths)
        seen = [0] * total
        cu_seqlens = torch.tensor(starts, dtype=torch.int32)
        for slot in range(fused.num_slots(torch.Size([total, 4]), cu_seqlens, rows)):
            b = sum(starts[i] // rows + i <= slot for i in range(1, batch))
            first = starts[b] + (slot - starts[b] // rows - b) * rows
            for row in range(first, min(first + rows, starts[b + 1])):
                seen[row] += 1
        assert seen == [1] * total


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast(backend, device):
    leaves = make([9], 2, 16, torch.float32, device)
    lower = torch.float16 if device.type == "cpu" else torch.bfloat16  # the interpreter has no true bfloat16
    mixed = [leaves[0], leaves[1].to(lower), leaves[2].to(lower)]
    cu_seqlens = boundaries([4, 5], device)
    with torch.autocast(device.type, dtype=lower):
        h, y = door(mixed, cu_seqlens, backend)
    assert (h.dtype, y.dtype) == (torch.float32, lower)
    truth = oracle([t.double() for t in mixed], cu_seqlens)
    torch.testing.assert_close(h.double(), truth[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y.double(), truth[1], rtol=torch.finfo(lower).eps, atol=torch.finfo(lower).eps)
    grads = torch.autograd.grad((h.sum() + y.float().square().sum()), leaves)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_fullgraph_compiles_once_for_every_length(backend, device):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(door, backend=backend), fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for lengths in ([5, 4], [11, 2], [0, 31]):
        leaves = make([sum(lengths)], 2, 16, torch.float32, device)
        cu_seqlens = boundaries(lengths, device)
        outputs, eager = compiled(leaves, cu_seqlens), door(leaves, cu_seqlens, backend)
        upstream = gradients_of(eager)
        torch.testing.assert_close(outputs, eager)
        grads = [torch.autograd.grad(o, leaves, upstream) for o in (outputs, eager)]
        torch.testing.assert_close(*grads)
        counts.append(counter.frame_count)
    assert counts[0] >= 1 and counts == counts[:1] * 3


def test_library_operators(device):
    x, branch, modulation = (t.detach() for t in make([6], 2, 12, torch.float32, device))
    gate, shift, scale = modulation.chunk(6, -1)[1:4]
    cu_seqlens = boundaries([2, 4], device)
    ops = library.OPS
    y, mean, rstd = ops.adaln_modulate(x, shift, scale, cu_seqlens, 1e-6, torch.float32)
    samples = [
        (ops.adaln_modulate, (x, shift, scale, cu_seqlens, 1e-6, torch.float16)),
        (ops.adaln_modulate, (x[None].expand(2, 6, 12), shift, scale, None, 1e-6, torch.float32)),
        (ops.adaln_modulate_backward, (y, x, shift, scale, mean, rstd, cu_seqlens)),
        (ops.adaln_residual_modulate, (x, branch, gate, shift, scale, cu_seqlens, 1e-6, torch.float32)),
        (ops.adaln_residual_modulate_backward, (y, y, x, branch, gate, shift, scale, mean, rstd, cu_seqlens)),
        (ops.adaln_residual_modulate_backward, (y, None, x, branch, gate, shift, scale, mean, rstd, cu_seqlens)),
    ]
    for operator, args in samples:
        torch.library.opcheck(operator, args)


def test_second_derivative_is_refused(device):
    leaves = make([4], 1, 8, torch.float32, device)
    y = door(leaves, boundaries([4], device), "triton")[1]
    (dx,) = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def arguments(**changes):
    """Good arguments of the residual door, changed."""
    good = {"x": torch.zeros(5, 8), "branch": torch.zeros(5, 8), "cu_seqlens": torch.tensor([0, 2, 5]).int()}
    return {**good, **{name: torch.zeros(2, 8) for name in ("gate", "shift", "scale")}, **changes}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


REFUSED = [
    ({"x": [1.0]}, TypeError, "x: expected a tensor"),
    ({"x": torch.zeros(5, 8, dtype=torch.int64)}, TypeError, "x: expected float32"),
    ({"x": torch.zeros(1, 5, 8)}, ValueError, r"x: expected shape \[T,d\]"),
    ({"cu_seqlens": None}, ValueError, r"x: expected shape \[B,N,d\]"),
    ({"x": torch.zeros(5, 0)}, ValueError, "x: expected a width d of at least 1"),
    ({"branch": torch.zeros(4, 8)}, ValueError, r"branch: expected x's shape \[5, 8\], got \[4, 8\]"),
    ({"branch": torch.zeros(5, 8).half()}, TypeError, "branch: expected x's dtype"),
    ({"shift": torch.zeros(8)}, ValueError, r"shift: expected shape \[B,d\]"),
    ({"shift": torch.zeros(2, 8).double()}, TypeError, "shift: expected x's dtype torch.float32, got torch.float64"),
    ({"scale": torch.zeros(3, 8)}, ValueError, "scale: expected B = 2 .*got 3"),
    ({"gate": torch.zeros(2, 7)}, ValueError, "gate: expected d = 8 .*got 7"),
    ({"gate": torch.zeros(2, 8, device="meta")}, ValueError, "gate: expected x's device cpu, got meta"),
    ({"cu_seqlens": torch.tensor([0, 2, 5])}, TypeError, "cu_seqlens: expected int32, got torch.int64"),
    ({"cu_seqlens": [0, 2, 5]}, TypeError, "cu_seqlens: expected a tensor"),
    ({"cu_seqlens": int32(1, 2, 5)}, ValueError, "cu_seqlens: expected to start at 0, got 1"),
    ({"cu_seqlens": int32(0, 6, 5)}, ValueError, "cu_seqlens: expected never to decrease, got 6 then 5"),
    ({"cu_seqlens": int32(0, 2, 4)}, ValueError, "cu_seqlens: expected to end at T = 5, got 4"),
    ({"cu_seqlens": int32()}, ValueError, "cu_seqlens: expected shape"),
    ({"eps": "1e-6"}, TypeError, "eps: expected a Python number, got str"),
    ({"eps": -1.0}, ValueError, "eps: expected a finite number >= 0, got -1.0"),
    ({"backend": "cuda"}, ValueError, "backend: expected one of auto, triton, torch, got 'cuda'"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
def test_refused(changes, error, message):
    with pytest.raises(error, match=message):
        adaln_residual_modulate(**arguments(**changes))
    if "branch" not in changes and "gate" not in changes:
        plain = {k: v for k, v in arguments(**changes).items() if k not in ("branch", "gate")}
        with pytest.raises(error, match=message):
            adaln_modulate(**plain)


def test_refused_by_triton(device):
    x, modulation = torch.zeros(1, 2, 8, device=device), torch.zeros(1, 8, device=device)
    with pytest.raises(TypeError, match="x: expected float32, float16 or bfloat16 with the triton backend"):
        adaln_modulate(x.double(), modulation.double(), modulation.double(), backend="triton")
    modulation = torch.zeros(1, op.MAX_WIDTH + 1, device=device)
    with pytest.raises(ValueError, match="x: expected a width d of at most 8192"):
        adaln_modulate(modulation[None], modulation, modulation, backend="triton")


def test_widest_row_has_a_configuration():
    assert fused.width_block(op.MAX_WIDTH) == max(fused.CONFIGS)
    for width in (1, 128, 129, 512, 513, 8192):
        assert fused.width_block(width) in fused.CONFIGS and fused.width_block(width) >= width
    for num_rows in (1, 2048, 5000, 1 << 20):
        for tile in (1, 4, 16):
            for rows in (fused.forward_rows(num_rows, tile), fused.backward_rows(num_rows, tile)):
                assert rows >= tile and rows % tile == 0 and rows <= 64


@pytest.mark.gpu
@pytest.mark.parametrize("width", [512, 768, 4096, 8192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_gpu_sizes(width, dtype, device, no_worse):
    lengths = [2048, 0, 517, 1, 3000]
    leaves = make([sum(lengths)], len(lengths), width, dtype, device)
    check(no_worse, leaves, boundaries(lengths, device), "auto")


@pytest.mark.gpu
def test_gpu_never_waits_and_replays_other_lengths(device):
    leaves = make([1000], 3, 512, torch.bfloat16, device)
    cu_seqlens = boundaries([500, 0, 500], device)
    upstream = gradients_of(door(leaves, cu_seqlens, "auto"))

    def step():
        outputs = door(leaves, cu_seqlens, "auto")
        return (*outputs, *torch.autograd.grad(outputs, leaves, upstream))

    torch.cuda.set_sync_debug_mode("error")
    step()
    torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    cu_seqlens.copy_(boundaries([1, 998, 1], device))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
def test_gpu_hundred_times_the_same_bits(device):
    leaves = make([20000], 4, 512, torch.bfloat16, device)
    cu_seqlens = boundaries([7000, 1, 12000, 999], device)
    upstream = gradients_of(door(leaves, cu_seqlens, "auto"))
    first = torch.autograd.grad(door(leaves, cu_seqlens, "auto"), leaves, upstream)
    for _ in range(100):
        again = torch.autograd.grad(door(leaves, cu_seqlens, "auto"), leaves, upstream)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
