"""Strides whose offsets pass 2^31 elements, of every operand of every operator and along every axis.

The operands lie in a sparse file, so that a view of terabytes touches a few pages. In the interpreter only: what a GPU
can hold stands in test_gpu.py.
"""

import os

import pytest
import torch

from conceptron import kernels

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the operands lie in a file: the interpreter only")

B, N, C, H, D = 3, 12, 11, 3, 16
LENGTHS = [N, 0, N + 3]
SHAPES = {"concepts": (B, C, H, D), "tokens": (2 * N + 3, H, D), "masses": (B, H, C), "rows": (2 * N + 3, D)}
SHAPES |= {"padded": (B, N, D), "vectors": (B, D), "wide rows": (2 * N + 3, 80), "words": (40, 80)}
CASES = {  # inputs in the order of the door, then the gradients of the outputs
    "concept_attention": (("concepts", "tokens", "tokens"), ("concepts", "masses")),
    "token_attention": (("tokens", "concepts", "concepts"), ("tokens",)),
    "bixt_attention": (("concepts", "concepts", "tokens", "tokens"), ("concepts", "tokens")),
    "slot_attention": (("concepts", "tokens", "tokens"), ("concepts", "masses")),
    "adaln_modulate": (("rows", "vectors", "vectors"), ("rows",)),
    "adaln_residual_modulate": (("rows", "rows", "vectors", "vectors", "vectors"), ("rows", "rows")),
    "adaln_residual_modulate, padded": (("padded", "padded", "vectors", "vectors", "vectors"), ("padded", "padded")),
    "linear_cross_entropy": (("wide rows", "words"), ()),
    "linear_cross_entropy, streamed": (("wide rows", "words"), ()),
}
NUM_AXES = {name: max(len(SHAPES[kind]) for kind in sum(kinds, ())) for name, kinds in CASES.items()}
TAKES_ANY = ("adaln", "linear")  # also along the channels; attention copies where the last stride is not 1


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """2^39 float32 that exist when written to."""
    path = tmp_path_factory.mktemp("sparse") / "space"
    path.touch()
    os.truncate(path, 2**41)
    mapped = torch.from_file(str(path), shared=True, size=2**39, dtype=torch.float32)
    path.unlink()  # the mapping keeps it
    return mapped


class Far:
    """Copies tensors into the file, one behind the other, far apart along one axis."""

    def __init__(self, space, axis):
        self.space, self.axis, self.used = space.view(-1), axis, 0

    def __call__(self, x):
        strides = list(x.stride())
        if self.axis < x.ndim:  # the ninth element, or the last, lies 2^31 elements or more behind the first
            strides[self.axis] = -(-(2**31) // min(x.shape[self.axis] - 1, 8) // 16) * 16
        view = torch.as_strided(self.space, x.shape, strides, self.used)
        self.used += sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True)) // 16 * 16 + 16
        return view.copy_(x)


def results(name, inputs, upstream):
    """Outputs and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    operator = getattr(kernels, name.split(",")[0])
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    if name.startswith("linear"):
        targets = torch.arange(leaves[0].shape[0]) % leaves[1].shape[0]
        outputs = (operator(*leaves, targets, backend="triton"),)
    elif name.startswith("adaln"):
        packed = () if "padded" in name else (cu_seqlens,)
        outputs = operator(*leaves, *packed, backend="triton")
    else:
        options = {"return_lse": True} if name == "concept_attention" else {}
        outputs = operator(*leaves, cu_seqlens, max(LENGTHS), backend="triton", **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(outputs, leaves, upstream or None)
    return [x.detach() for x in (*outputs, *gradients)]


@pytest.mark.parametrize(
    ("name", "axis"),
    [(name, axis) for name in CASES for axis in range(NUM_AXES[name]) if axis < 3 or name.startswith(TAKES_ANY)],
)
def test_offsets_beyond_int32(name, axis, space, monkeypatch):
    if "streamed" in name:
        monkeypatch.setenv("CONCEPTRON_LCE_CHUNK_MB", "0")
    torch.manual_seed(0)
    inputs, upstream = ([torch.randn(SHAPES[kind]) for kind in kinds] for kinds in CASES[name])
    expected = results(name, inputs, upstream)
    far = Far(space, axis)
    got = results(name, [far(x) for x in inputs], [far(x) for x in upstream])
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_tile_of_half_precision_beyond_int32(space):
    """Half precision takes longer tiles, and the one pass backward of concept_attention."""
    torch.manual_seed(0)
    cu_seqlens, far = torch.tensor([0, 70]).int(), Far(space.view(torch.float16), 0)
    q, k, v, dout = (torch.randn(shape).half() for shape in ((1, 5, 1, 16), (70, 1, 16), (70, 1, 16), (1, 5, 1, 16)))
    found = []
    for tensors in ((k, v), (far(k), far(v))):
        leaves = [x.detach().requires_grad_() for x in (q, *tensors)]
        out = kernels.concept_attention(*leaves, cu_seqlens, 70, backend="triton")
        found.append((out, *torch.autograd.grad(out, leaves, dout)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
