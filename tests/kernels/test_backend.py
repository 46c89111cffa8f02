"""The choice of a backend: by device, by argument, by variable; never by trial."""

import importlib.util
import types

import pytest
import torch

from conceptron.kernels.backend import choose, interpreting

ON_CPU = torch.zeros(1)
ON_CUDA = types.SimpleNamespace(is_cuda=True, device="cuda:0")  # all that choose looks at


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("CONCEPTRON_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_auto_goes_by_device():
    assert choose("auto", ON_CPU) == "torch"
    assert choose("auto", ON_CUDA) == "triton"


def test_auto_is_torch_even_where_the_interpreter_runs(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert interpreting() and choose("auto", ON_CPU) == "torch"


def test_the_variable_speaks_for_auto_only(monkeypatch):
    monkeypatch.setenv("CONCEPTRON_BACKEND", "torch")
    assert choose("auto", ON_CUDA) == "torch"
    assert choose("triton", ON_CUDA) == "triton"
    monkeypatch.setenv("CONCEPTRON_BACKEND", "auto")
    assert choose("auto", ON_CUDA) == "triton"


def test_an_explicit_torch_runs_anywhere():
    assert choose("torch", ON_CPU) == choose("torch", ON_CUDA) == "torch"


def test_triton_without_a_gpu_raises(monkeypatch):
    with pytest.raises(ValueError, match="backend: 'triton' needs CUDA tensors, got one on cpu"):
        choose("triton", ON_CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("triton", ON_CPU) == "triton"


def test_the_variable_does_not_fall_back_either(monkeypatch):
    monkeypatch.setenv("CONCEPTRON_BACKEND", "triton")
    with pytest.raises(ValueError, match="CONCEPTRON_BACKEND: 'triton' needs CUDA tensors"):
        choose("auto", ON_CPU)


def test_triton_that_is_not_installed_raises(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"backend: .triton. is not installed; install triton>=3\.6"):
        choose("triton", ON_CUDA)


@pytest.mark.parametrize("name", ["cuda", "", "Triton"])
def test_unknown_names(name, monkeypatch):
    with pytest.raises(ValueError, match=f"backend: expected one of auto, triton, torch, got '{name}'"):
        choose(name, ON_CPU)
    if name:
        monkeypatch.setenv("CONCEPTRON_BACKEND", name)
        with pytest.raises(ValueError, match=f"CONCEPTRON_BACKEND: expected one of auto, triton, torch, got '{name}'"):
            choose("auto", ON_CPU)
