"""The stamp of a result."""

import json
import sys

import torch

from conceptron.bench.measure import environment
from conceptron.engine import environment as of_run


def test_environment_names_what_decides_a_number():
    stamp = environment.environment(seed=3)
    assert stamp["torch"] == torch.__version__
    assert stamp["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    for name in ("commit", "cpu", "gpu", "driver", "triton", "cudnn", "ptxas", "transformers", "deepspeed", "date",
                 "command", "threads"):  # fmt: skip
        assert name in stamp, name
    assert stamp["seed"] == 3
    assert stamp["cpu"]
    json.dumps(stamp)
    if not torch.cuda.is_available():
        assert stamp["gpu"] is None


def test_a_copy_without_git_is_the_commit_that_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(of_run, "__file__", str(tmp_path / "engine" / "environment.py"))
    monkeypatch.delenv("CONCEPTRON_COMMIT", raising=False)
    assert of_run.checkout() == (None, None)
    monkeypatch.setenv("CONCEPTRON_COMMIT", "abc123-dirty")
    assert of_run.checkout() == ("abc123", True)
    monkeypatch.setenv("CONCEPTRON_COMMIT", "abc123")
    assert of_run.checkout() == ("abc123", False)


def test_the_stamped_command_leaves_out_where_results_went(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/conceptron", "bench", "memory", "--out", "/tmp/x", "--fit", "2"])
    assert environment.environment()["command"] == "conceptron bench memory --fit 2"
    monkeypatch.setattr(sys, "argv", ["conceptron", "bench", "meaning", "/a/b/model", "--data", "DATA/", "--name", "x"])
    assert environment.environment()["command"] == "conceptron bench meaning model --data DATA/ --name x"
