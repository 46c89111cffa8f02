"""float16 scores beyond 65504, the largest float16: every attention on both backends stays near the oracle.

Queries and keys are of size 100 to 200, so that scores before and after the scale pass the limit. Sequences are ragged
or of one length, which take different ways through the torch backends.
"""

import pytest
import torch

from conceptron import kernels
from conceptron.kernels.bixt_attention.reference import reference_bixt_attention
from conceptron.kernels.concept_attention import reference as of_concepts
from conceptron.kernels.slot_attention.reference import reference_slot_attention
from conceptron.kernels.token_attention import reference as of_tokens

C, H, D = 5, 2, 16
OPERATORS = {  # name: (inputs, oracle, options)
    "concept_attention": ("qkv", lambda *x: of_concepts.concept_attention(*x[:4], scale=x[4]), {}),
    "concept_attention, lse": (
        "qkv", lambda *x: of_concepts.concept_attention(*x[:4], scale=x[4]), {"return_lse": True},
    ),
    "token_attention": ("kqc", lambda *x: of_tokens.token_attention(*x[:4], scale=x[4]), {}),
    "bixt_attention": ("qckv", reference_bixt_attention, {}),
    "slot_attention, mean": (
        "qkv", lambda *x: reference_slot_attention(*x, "mean", 1e-8), {"normalize": "mean"},
    ),
    "slot_attention, sum": ("qkv", lambda *x: reference_slot_attention(*x, "sum", 1e-8), {"normalize": "sum"}),
}  # fmt: skip


def draw(names, lengths, device):
    torch.manual_seed(0)
    B, T = len(lengths), sum(lengths)
    shapes = {"q": (B, C, H, D), "c": (B, C, H, D), "k": (T, H, D), "v": (T, H, D)}
    found = {name: torch.randn(shape) * (120 if name in "qk" else 1) for name, shape in shapes.items()}
    return [found[name].to(device, torch.float16) for name in names]


def first(outputs, count):
    return (outputs if isinstance(outputs, tuple) else (outputs,))[:count]


WAYS = {"triton": [7, 0, 12], "torch": [7, 0, 12], "torch, equal lengths": [9, 9], "torch, autocast": [7, 0, 12]}
WAYS["torch, compiled"] = [7, 0, 12]


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter, in rows that a kernel masks afterwards
@pytest.mark.parametrize(("how", "lengths"), WAYS.items(), ids=WAYS)
@pytest.mark.parametrize("name", OPERATORS)
def test_scores_beyond_float16(name, how, lengths, device):
    names, oracle, options = OPERATORS[name]
    operator, count = getattr(kernels, name.partition(",")[0]), 2 if "lse" in name or name[0] in "bs" else 1
    inputs = draw(names, lengths, device)
    cu_seqlens, scale = torch.tensor([0, *lengths], device=device).cumsum(0).int(), 2.0
    expected = first(oracle(*(x.double() for x in inputs), cu_seqlens, scale), count)
    leaves = [(x.float() if "autocast" in how else x).requires_grad_() for x in inputs]
    options = options | {"scale": scale, "backend": how.partition(",")[0]}
    if "compiled" in how:
        torch._dynamo.reset()
        operator = torch.compile(operator, fullgraph=True, backend="aot_eager")
    with torch.autocast(device.type, torch.float16, enabled="autocast" in how):
        got = first(operator(*leaves, cu_seqlens, max(lengths), **options), count)
    for ours, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-3, atol=2e-3)
    finite = [x[x.isfinite()] for x in got]  # the log-sum-exp of no token is -inf
    for gradient in torch.autograd.grad([x.sum() for x in finite], leaves):
        assert torch.isfinite(gradient).all()
