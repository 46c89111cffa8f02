"""The memory gauge."""

import sys
import textwrap

import pytest

from conceptron.bench.measure import resident

CHILD = """
    import psutil
    def touch(num_bytes):
        before = psutil.Process().memory_info().rss
        keep = bytearray(num_bytes)
        keep[::4096] = b"x" * len(keep[::4096])  # pages are not resident until written
        def call():
            big = bytearray(2 * num_bytes)
            big[::4096] = b"x" * len(big[::4096])
            return {"before": before, "kept": len(keep)}
        return call
"""


def test_resident_peak_is_of_the_child_alone(tmp_path, monkeypatch):
    (tmp_path / "child_of_test.py").write_text(textwrap.dedent(CHILD))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    mb = 2**20
    ballast = bytearray(400 * mb)
    ballast[::4096] = b"x" * len(ballast[::4096])  # a large parent must not show in the child
    memory, result = resident.resident_peak("child_of_test:touch", num_bytes=100 * mb)
    assert result["kept"] == 100 * mb
    assert memory.baseline_bytes - result["before"] == pytest.approx(100 * mb, rel=0.1)
    assert memory.extra_bytes == pytest.approx(200 * mb, rel=0.05)


def test_resident_peak_tells_why_the_child_failed(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Traceback >&2\necho 'MemoryError: no room' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RuntimeError, match="some:thing: MemoryError: no room"):
        resident.resident_peak("some:thing")
