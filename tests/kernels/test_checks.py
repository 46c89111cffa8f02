"""The checks of the doors: what each lets through, and the one line it raises otherwise."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from conceptron.kernels import checks


def cu(*values):
    return torch.tensor(values, dtype=torch.int32)


CPU = torch.device("cpu")


def test_good_boundaries_give_their_lengths():
    assert checks.check_boundaries(cu(0, 3, 3, 5), 5, CPU) == [3, 0, 2]
    assert checks.check_boundaries(cu(0), 0, CPU) == []
    checks.check_cu_seqlens(cu(0, 3, 3, 5), 3, 5, CPU)
    checks.check_cu_seqlens(cu(0), 0, 0, CPU)


@pytest.mark.parametrize(
    ("cu_seqlens", "max_seqlen", "error", "message"),
    [
        ([0, 5], 5, TypeError, r"cu_seqlens: expected a tensor \[B\+1\], got list"),
        (cu(0, 5)[None], 5, ValueError, r"cu_seqlens: expected shape \[B\+1\], got \[1, 2\]"),
        (cu(0, 5).long(), 5, TypeError, "cu_seqlens: expected int32, got torch.int64"),
        (cu(0, 5).to("meta"), 5, ValueError, "cu_seqlens: expected device cpu, got meta"),
        (cu(), 5, ValueError, r"cu_seqlens: expected shape \[B\+1\] with at least one entry"),
        (cu(1, 5), 5, ValueError, "cu_seqlens: expected to start at 0, got 1"),
        (cu(0, 4, 3, 5), 5, ValueError, "cu_seqlens: expected never to decrease, got 4 then 3 at entry 2"),
        (cu(0, 4), 5, ValueError, "cu_seqlens: expected to end at T = 5, got 4"),
        (cu(0, 1, 5), 3, ValueError, "max_seqlen: expected at least the longest sequence, 4, got 3"),
        (cu(0, 5), torch.tensor(5), TypeError, "max_seqlen: expected a Python int .*got Tensor"),
        (cu(0, 5), 5.0, TypeError, "max_seqlen: expected a Python int .*got float"),
        (cu(0, 5), True, TypeError, "max_seqlen: expected a Python int .*got bool"),
    ],
)
def test_bad_boundaries(cu_seqlens, max_seqlen, error, message):
    with pytest.raises(error, match=message):
        checks.check_cu_seqlens(cu_seqlens, max_seqlen, 5, CPU)


def test_values_that_cannot_be_read_are_not(monkeypatch):
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(cu(0, 7))
    assert not checks.readable(fake) and not checks.readable(torch.empty(2, device="meta"))
    assert checks.readable(cu(0, 7))
    assert checks.check_boundaries(fake, 5, CPU) is None


def test_thorough_is_asked_for(monkeypatch):
    monkeypatch.delenv("CONCEPTRON_CHECK", raising=False)
    assert not checks.thorough()
    monkeypatch.setenv("CONCEPTRON_CHECK", "1")
    assert checks.thorough()


@pytest.mark.gpu
def test_gpu_values_are_read_only_when_asked(monkeypatch):
    bad = cu(0, 4).cuda()
    monkeypatch.delenv("CONCEPTRON_CHECK", raising=False)
    assert checks.check_boundaries(bad, 5, bad.device) is None
    monkeypatch.setenv("CONCEPTRON_CHECK", "1")
    with pytest.raises(ValueError, match="cu_seqlens: expected to end at T = 5, got 4"):
        checks.check_boundaries(bad, 5, bad.device)


def test_tensors():
    x = torch.zeros(2, 3)
    assert checks.check_tensor("q", x, "[T,d]", 2) is x and checks.check_tensor("q", x, "[T,d]", (2, 3)) is x
    with pytest.raises(TypeError, match=r"q: expected a tensor \[T,d\], got NoneType"):
        checks.check_tensor("q", None, "[T,d]", 2)
    with pytest.raises(ValueError, match=r"q: expected shape \[T,H,D\], got \[2, 3\]"):
        checks.check_tensor("q", x, "[T,H,D]", 3)


def test_dtypes_and_devices():
    x = torch.zeros(2)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        checks.check_float("q", x.to(dtype))
    with pytest.raises(TypeError, match=r"q: expected float32, float16, bfloat16 or float64, got torch\.int64"):
        checks.check_float("q", x.long())
    checks.check_like("k", x, "q", x)
    with pytest.raises(TypeError, match=r"k: expected q.s dtype torch\.float32, got torch\.float16"):
        checks.check_like("k", x.half(), "q", x)
    with pytest.raises(ValueError, match="k: expected q's device cpu, got meta"):
        checks.check_like("k", x.to("meta"), "q", x)
    with pytest.raises(ValueError, match=r"k: expected D = 64 \(from q\), got 32"):
        checks.check_size("k", "D", 32, 64, "from q")
    checks.check_size("k", "D", 64, 64, "from q")


def test_scales():
    assert checks.check_scale(None, 64) == 0.125 and checks.check_scale(2, 64) == 2.0
    for scale in ("1", True, torch.tensor(0.5)):
        with pytest.raises(TypeError, match="scale: expected a float or None, got"):
            checks.check_scale(scale, 64)
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="scale: expected a positive, finite number, got"):
            checks.check_scale(scale, 64)


def test_a_value_that_is_neither_is_refused(monkeypatch):
    for value in ("yes", "", "2"):
        monkeypatch.setenv("CONCEPTRON_CHECK", value)
        with pytest.raises(ValueError, match=f"CONCEPTRON_CHECK: expected 0 or 1, got '{value}'"):
            checks.thorough()
