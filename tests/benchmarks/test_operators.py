"""The comparison of `conceptron bench kernels` through pytest-benchmark.

    python -m pytest tests/benchmarks --benchmark-only --benchmark-autosave
    pytest-benchmark compare

The cases are those of the command: the matrix "anchor" on a GPU, "cpu" elsewhere. Without --benchmark-only it is the
small matrix, and each case runs once, as a check that it still runs and is accurate.
"""

import pytest
import torch

from conceptron.bench.kernels.cases import make_inputs
from conceptron.bench.kernels.matrix import MATRICES
from conceptron.bench.kernels.providers import PROVIDERS, providers_of
from conceptron.bench.kernels.run import allowed_error, calls_of, check, modes_of, truth_of
from conceptron.bench.measure.timing import Refusal

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = (torch.device("cuda"), torch.bfloat16) if ON_GPU else (torch.device("cpu"), torch.float32)
KNOWN: dict = {}


def pytest_generate_tests(metafunc):
    only = metafunc.config.getoption("benchmark_only", False)
    matrix = ("anchor" if ON_GPU else "cpu") if only else "small"
    # without --benchmark-only nothing is compared, and compiling takes seconds a case
    names = [name for name in PROVIDERS if name != "torch.compile" or only]
    metafunc.parametrize(("case", "name", "mode"), [
        pytest.param(case, name, mode, id=f"{case.operator}-{case.label}-{mode}-{name}".replace(" ", "_"))
        for case in MATRICES[matrix]() for name in providers_of(case.operator) if name in names
        for mode in modes_of(case)
    ])  # fmt: skip


def prepared(case):
    """Inputs, truth and tolerance of a case, made once."""
    if case not in KNOWN:
        torch._dynamo.reset()  # one function compiled for more than eight shapes would silently run eagerly
        inputs = make_inputs(case, DTYPE, DEVICE)
        truth, upstream = truth_of(inputs)
        KNOWN[case] = (inputs, truth, upstream, allowed_error(inputs, truth, upstream, DTYPE))
    return KNOWN[case]


def test_operator(case, name, mode, benchmark):
    inputs, truth, upstream, allowed = prepared(case)
    result = check(PROVIDERS[name], inputs, truth, upstream)
    if isinstance(result, Refusal):
        pytest.skip(result.reason)
    if result.error > allowed:
        message = f"{name}: error {result.error:.1e}, allowed {allowed:.1e}"
        assert not name.startswith("conceptron"), message
        pytest.skip(message)  # a peer's inaccuracy is a result, not a fault of ours
    benchmark.extra_info.update(error=result.error, operator=case.operator, case=case.label, provider=name, mode=mode)
    call = calls_of(result, mode)
    benchmark((lambda: (call(), torch.cuda.synchronize())) if ON_GPU else call)
