"""Test environment and the one tolerance.

Without a GPU, Triton kernels run in the interpreter; that has to be decided before triton is first imported.
"""

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
else:  # fixtures ask for deterministic algorithms; cuBLAS refuses them unless this is set before its first product
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now stays: a full collection that does not visit it takes microseconds and not 0.3 s."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()  # else what ends with the process is reported as leaked


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def no_worse():
    """Checks one result: no worse than eager torch in the same dtype, both measured against float64.

    One unit of rounding of the largest true value is allowed on top: two orders of summation may differ by it.
    """

    def check(name: str, fused: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, slack: float = 1.0) -> None:
        assert fused.shape == truth.shape, f"{name}: shape {tuple(fused.shape)} instead of {tuple(truth.shape)}"
        assert fused.dtype == eager.dtype, f"{name}: {fused.dtype} instead of {eager.dtype}"
        if truth.numel() == 0:
            return
        assert torch.isfinite(fused).all(), f"{name}: not finite"
        rounding = torch.finfo(fused.dtype).eps * float(truth.abs().max()) * slack
        ours, theirs = (fused.double() - truth).abs(), (eager.double() - truth).abs()
        for how in (torch.max, torch.mean):
            allowed = float(how(theirs)) + rounding
            assert float(how(ours)) <= allowed, f"{name} {how.__name__}: {float(how(ours)):.1e} > {allowed:.1e}"

    return check
