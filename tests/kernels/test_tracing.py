"""One tensor in two places of an operator, in one graph with its gradients; the eager call is the measure.

The Triton kernels are run by its interpreter, behind operators that torch.compile does not look into.
"""

import pytest
import torch

from conceptron import kernels

B, C, H, D = 2, 5, 2, 16
LENGTHS = [7, 12]
SHAPES = {"concepts": (B, C, H, D), "tokens": (19, H, D), "rows": (19, 32), "vectors": (B, 32)}
CASES = {  # kinds of the distinct tensors, and how the operator is given them
    "concept_attention": (("concepts", "tokens"), lambda op, q, k, cu, **o: op(q, k, k, cu, 12, **o)),
    "concept_attention, contiguous": (
        ("concepts", "tokens"), lambda op, q, k, cu, **o: op(q, k, k.contiguous(), cu, 12, return_lse=True, **o),
    ),
    "token_attention": (("tokens", "concepts"), lambda op, q, k, cu, **o: op(q, k, k, cu, 12, **o)),
    "bixt_attention": (("concepts", "tokens"), lambda op, q, k, cu, **o: op(q, q, k, k, cu, 12, **o)),
    "slot_attention": (("concepts", "tokens"), lambda op, q, k, cu, **o: op(q, k, k, cu, 12, **o)),
    "adaln_modulate": (("rows", "vectors"), lambda op, x, m, cu, **o: op(x, m, m, cu, **o)),
    "adaln_residual_modulate": (("rows", "vectors"), lambda op, x, m, cu, **o: op(x, x, m, m, m, cu, **o)),
    "linear_cross_entropy": (("rows",), lambda op, x, cu, **o: op(x, x, torch.arange(19, device=x.device), **o)),
    "linear_cross_entropy, index": (
        ("rows",), lambda op, x, cu, **o: op(x, x, cu[:2], index=cu[:2], **o),
    ),
}  # fmt: skip


def results(call, inputs, *rest):
    outputs = call(*inputs, *rest)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return *outputs, *torch.autograd.grad([x.square().sum() for x in outputs], inputs)


ON_TORCH = [name for name in CASES if name.startswith("linear")]  # on others it is torch's own operations


@pytest.mark.parametrize(
    ("name", "backend"), [(name, "triton") for name in CASES] + [(name, "torch") for name in ON_TORCH]
)
def test_one_tensor_twice_is_one_graph(name, backend, device):
    kinds, call = CASES[name]
    operator = getattr(kernels, name.partition(",")[0])
    torch.manual_seed(0)
    inputs = [torch.randn(SHAPES[kind], device=device).requires_grad_() for kind in kinds]
    cu_seqlens = torch.tensor([0, *LENGTHS], device=device).cumsum(0).int()

    def step(*tensors):
        return call(operator, *tensors, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(results(compiled, inputs, cu_seqlens), results(step, inputs, cu_seqlens), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
