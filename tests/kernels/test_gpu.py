"""What only a GPU can show, for every operator alike, in bfloat16: `pytest -m gpu tests/kernels`.

The correctness matrix at real sizes and the capture of graphs stand in each operator's own file.
"""

import pytest
import torch

from conceptron import kernels
from conceptron.kernels.adaln.reference import reference_residual_modulate
from conceptron.kernels.bixt_attention.reference import reference_bixt_attention
from conceptron.kernels.concept_attention.reference import concept_attention
from conceptron.kernels.linear_cross_entropy.reference import linear_cross_entropy
from conceptron.kernels.slot_attention.reference import reference_slot_attention
from conceptron.kernels.token_attention.reference import token_attention

pytestmark = pytest.mark.gpu

# inputs in the order of the door: "concepts" are [B, C, H, D], "tokens" [T, H, D], "rows" [T, H D], "vectors" [B, H D]
INPUTS = {
    "concept_attention": ("concepts", "tokens", "tokens"),
    "token_attention": ("tokens", "concepts", "concepts"),
    "bixt_attention": ("concepts", "concepts", "tokens", "tokens"),
    "slot_attention": ("concepts", "tokens", "tokens"),
    "adaln_residual_modulate": ("rows", "rows", "vectors", "vectors", "vectors"),
}
OUTPUTS = {
    "concept_attention": ("concepts",), "token_attention": ("tokens",), "bixt_attention": ("concepts", "tokens"),
    "slot_attention": ("concepts", "masses"), "adaln_residual_modulate": ("rows", "rows"),
}  # fmt: skip
OF_TOKENS = ("tokens", "rows")
LENGTHS, SIZES = [700, 0, 1300, 48], {"C": 128, "H": 4, "D": 64}
FAR_LENGTHS, FAR_SIZES = [2**20, 3000], {"C": 64, "H": 16, "D": 128}  # the second sequence starts at element 2^31
FAR_BYTES = 60e9  # what its tensors and the oracle's take


def boundaries(lengths, device):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def draw(kind, lengths, sizes, device, seed, far=False):
    """``far``: the longest stride lies where it is least usual, on the heads or channels."""
    C, H, D = sizes["C"], sizes["H"], sizes["D"]
    B, T = len(lengths), sum(lengths)
    shape = {
        "concepts": (B, C, H, D), "tokens": (T, H, D), "rows": (T, H * D), "vectors": (B, H * D), "masses": (B, H, C),
    }[kind]  # fmt: skip
    generator = torch.Generator(device).manual_seed(seed)
    if far and kind in OF_TOKENS:
        shape = (shape[1], shape[0], *shape[2:])
    dtype = torch.float32 if kind == "masses" else torch.bfloat16
    x = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    return x.transpose(0, 1) if far and kind in OF_TOKENS else x


def make(name, lengths, sizes, device, far=False):
    """Inputs, the second of those of tokens with far strides if asked, and the gradients of the outputs."""
    first = INPUTS[name].index("tokens" if "tokens" in INPUTS[name] else "rows")
    inputs = [draw(kind, lengths, sizes, device, i, far and i > first) for i, kind in enumerate(INPUTS[name])]
    return inputs, [draw(kind, lengths, sizes, device, 10 + i) for i, kind in enumerate(OUTPUTS[name])]


def door(name, inputs, cu_seqlens, longest, operator=None):
    sizes = () if name.startswith("adaln") else (longest,)
    outputs = (operator or getattr(kernels, name))(*inputs, cu_seqlens, *sizes, backend="triton")
    return outputs if isinstance(outputs, tuple) else (outputs,)


def oracle(name, inputs, cu_seqlens):
    scale = inputs[0].shape[-1] ** -0.5
    if name == "concept_attention":
        return concept_attention(*inputs, cu_seqlens)[:1]
    if name == "token_attention":
        return (token_attention(*inputs, cu_seqlens),)
    if name == "bixt_attention":
        return reference_bixt_attention(*inputs, cu_seqlens, scale)
    if name == "slot_attention":
        return reference_slot_attention(*inputs, cu_seqlens, scale, "mean", 1e-8)
    return reference_residual_modulate(*inputs, cu_seqlens, 1e-6)


def run(operator, inputs, upstream):
    """Outputs and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = operator(leaves)
    gradients = torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)])
    return [x.detach() for x in (*outputs, *gradients)]


def head_loss(leaves, targets, index, token_weight, **options):
    hidden, weight = leaves
    options |= {"index": index, "token_weight": token_weight, "label_smoothing": 0.1}
    return (kernels.linear_cross_entropy(hidden, weight, targets, backend="triton", **options),)


def make_head(num_hidden, num_rows, width, num_words, device):
    generator = torch.Generator(device).manual_seed(0)
    shapes = (num_hidden, width), (num_words, width)
    options = {"generator": generator, "device": device}
    leaves = [torch.randn(shape, dtype=torch.bfloat16, **options) * width**-0.25 for shape in shapes]
    targets = torch.randint(num_words, (num_rows,), **options)
    index = num_hidden - 1 - torch.randint(min(num_rows, num_hidden), (num_rows,), **options)
    return leaves, (targets, index, torch.rand(num_rows, **options))


def step_of(name, device):
    """A forward and backward pass of the operator, for what does not depend on which one it is."""
    if name == "linear_cross_entropy":
        leaves, rest = make_head(2000, 3001, 512, 5003, device)
        return lambda: run(lambda x: head_loss(x, *rest), leaves, [torch.ones((), device=device)])
    inputs, upstream = make(name, LENGTHS, SIZES, device)
    cu_seqlens = boundaries(LENGTHS, device)
    return lambda: run(lambda x: door(name, x, cu_seqlens, max(LENGTHS)), inputs, upstream)


@pytest.mark.parametrize("name", [*INPUTS, "linear_cross_entropy"])
def test_never_waits_for_the_device(name, device):
    step = step_of(name, device)
    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", [*INPUTS, "linear_cross_entropy"])
def test_a_hundred_times_the_same_bits(name, device):
    step = step_of(name, device)
    first = step()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))


@pytest.mark.parametrize("name", [*INPUTS, "linear_cross_entropy"])
def test_launches_on_the_device_of_its_inputs(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here, there = (step_of(name, torch.device("cuda", i))() for i in range(2))  # the current device stays the first
    assert all(b.device.index == 1 and torch.equal(a, b.to(a.device)) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("name", INPUTS)
def test_compiled_by_inductor(name, device):
    torch._dynamo.reset()
    compiled = torch.compile(getattr(kernels, name), fullgraph=True)
    for lengths in (LENGTHS, [100, 1000, 0, 12]):
        inputs, upstream = make(name, lengths, SIZES, device)
        packed = boundaries(lengths, device), max(lengths)
        ours = run(lambda x, packed=packed: door(name, x, *packed, compiled), inputs, upstream)
        for a, b in zip(ours, run(lambda x, packed=packed: door(name, x, *packed), inputs, upstream), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", INPUTS)
def test_autocast_is_the_cast(name, device):
    inputs, upstream = make(name, LENGTHS, SIZES, device)
    packed = boundaries(LENGTHS, device), max(LENGTHS)
    wide = [x.float() for x in inputs]
    with torch.autocast("cuda", torch.bfloat16):
        ours = run(lambda x: door(name, x, *packed), wide, upstream)
    if name.startswith("adaln"):  # whose residual stream stays float32
        assert [x.dtype for x in ours[:2]] == [torch.float32, torch.bfloat16]
        return
    for a, b in zip(ours, run(lambda x: door(name, x, *packed), inputs, upstream), strict=True):
        assert torch.equal(a, b.to(a.dtype))


@pytest.mark.parametrize("far", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("name", INPUTS)
def test_offsets_past_two_to_the_31(name, far, device, no_worse):
    """Alone, the second sequence must give what it gives behind 2^31 elements."""
    if torch.cuda.mem_get_info()[0] < FAR_BYTES:
        pytest.skip(f"needs {FAR_BYTES / 1e9:.0f} GB of free memory")
    first, second = FAR_LENGTHS
    inputs, upstream = make(name, FAR_LENGTHS, FAR_SIZES, device, far)
    cu_seqlens = boundaries(FAR_LENGTHS, device)

    def of_second(kinds, tensors):
        return [x[first:] if kind in OF_TOKENS else x[1:] for kind, x in zip(kinds, tensors, strict=True)]

    results = run(lambda x: door(name, x, cu_seqlens, first), inputs, upstream)
    kinds = *OUTPUTS[name], *INPUTS[name]
    ours = [x.clone() for x in of_second(kinds, results)]
    inputs, upstream = (
        [x.clone() for x in of_second(kinds[name], tensors)]
        for kinds, tensors in ((INPUTS, inputs), (OUTPUTS, upstream))
    )
    del results
    alone = boundaries([second], device)
    plain, truth = (
        run(lambda x: oracle(name, x, alone), [x.to(dtype) for x in inputs], upstream)
        for dtype in (torch.bfloat16, torch.float64)
    )
    for i, (a, b, c) in enumerate(zip(ours, plain, truth, strict=True)):
        no_worse(f"{kinds[i]} {i}", a, b.to(a.dtype), c)


def test_rows_past_two_to_the_31(device, no_worse):
    leaves, rest = make_head(2**22 + 1000, 1000, 512, 5003, device)
    loss, dhidden, dweight = run(lambda x: head_loss(x, *rest), leaves, [torch.ones((), device=device)])
    assert not dhidden[: 2**22].any()
    targets, index, token_weight = rest
    near = [leaves[0][2**22 :], leaves[1]]

    def reference(x):
        options = {"index": index - 2**22, "token_weight": token_weight, "label_smoothing": 0.1}
        return (linear_cross_entropy(*x, targets, **options),)

    plain, truth = (
        run(reference, [x.to(dtype) for x in near], [torch.ones((), device=device)])
        for dtype in (torch.bfloat16, torch.float64)
    )
    ours = loss, dhidden[2**22 :], dweight
    for name, a, b, c in zip(("loss", "dhidden", "dweight"), ours, plain, truth, strict=True):
        no_worse(name, a, b.to(a.dtype), c, 4.0)


def test_a_chunk_past_two_to_the_31(device, monkeypatch):
    """One chunk of 45000 x 50368 exponentials against many small ones."""
    leaves, rest = make_head(45000, 45000, 128, 50368, device)
    found = []
    for megabytes in ("8192", "256"):
        monkeypatch.setenv("CONCEPTRON_LCE_CHUNK_MB", megabytes)
        found.append(run(lambda x: head_loss(x, *rest), leaves, [torch.ones((), device=device)]))
    for a, b in zip(*found, strict=True):
        assert float((a.double() - b.double()).abs().max()) <= 2 * torch.finfo(a.dtype).eps * float(b.abs().max())
