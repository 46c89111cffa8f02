import pytest
import torch
from torch import nn

from conceptron.bench.measure import resident
from conceptron.bench.measure.peers import Shape
from conceptron.bench.memory import (
    ENCODERS,
    FULL,
    OURS,
    encoder_case,
    longest_that_fits,
    make_model,
    make_view,
    run_encoder_case,
    saved_by_part,
    training_case,
)

TINY = Shape(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, vocab_size=256, max_tokens=512)


def test_prediction_is_the_line_through_the_last_two():
    rows = [{"N": n, "allocator_peak": 1000 + 7 * n} for n in (512, 1024, 2048)]
    rows[0]["allocator_peak"] = 1  # the constant part dominates short texts: they are not used
    assert longest_that_fits(rows, 1000 + 7 * 100_000) == 100_000
    with pytest.raises(ValueError, match="at least two"):
        longest_that_fits(rows[:1], 10)
    with pytest.raises(ValueError, match="does not grow"):
        longest_that_fits([{"N": 1, "allocator_peak": 5}, {"N": 2, "allocator_peak": 5}], 10)


def test_saved_bytes_are_counted_once_and_given_to_their_part():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(4, 4, bias=False), nn.Linear(4, 8, bias=False)

        def forward(self, x):
            return self.decoder(self.encoder(x))

    model, x = Model(), torch.randn(10, 4)
    with saved_by_part(model, num_tokens=10) as saved:
        model(x)
    assert saved["encoder"] == 10 * 4 * 4  # x, for the encoder's weight
    assert saved["decoder"] == 10 * 4 * 4  # its input; the weights themselves are parameters and do not count
    assert saved["other"] == 0


@pytest.mark.parametrize("kind", [OURS, FULL])
def test_a_case_accounts_for_its_peak(kind):
    result = training_case(kind, list(TINY.__dict__.values()), 128, 16, "cpu")()
    model = make_model(kind, TINY, 16)
    assert result["parameters"] == sum(p.nbytes for p in model.parameters()) == result["gradients"]
    assert result["optimizer"] == pytest.approx(2 * result["parameters"], rel=0.01)  # two moments, and step counts
    kept = sum(size for name, size in result.items() if name.startswith("activations"))
    assert kept > 0
    assert result["allocator_peak"] > result["parameters"] + result["optimizer"] + result["gradients"]


@pytest.mark.parametrize("name", ENCODERS)
def test_a_case_of_encoders(name):
    result = encoder_case(name, list(TINY.__dict__.values()), 64, "cpu")()
    assert result["tokens"] == 64 + 48 and result["peak"] is None and result["seconds"] > 0


def test_a_fresh_process_has_its_peak():
    row = run_encoder_case(OURS, TINY, 64, "cpu")
    assert row["peak"] > 0 and row["bytes_per_token"] == round(row["peak"] / 112, 1)


def test_both_models_answer_the_same_targets():
    view = make_view(128, 256, "drop")
    losses = [make_model(OURS, TINY, 16)(view=view).loss, make_model(FULL, TINY, 16)(make_view(128, 256, "mask"))]
    for loss in losses:  # untrained: near the weighted loss of a uniform guess
        assert torch.isfinite(loss)
    assert torch.equal(view.targets, make_view(128, 256, "mask").targets)


def test_a_case_that_fails_says_why_and_is_not_predicted_from(monkeypatch):
    import conceptron.bench.memory as memory

    def child(target, **case):
        if case["num_tokens"] > 1024:
            raise RuntimeError(f"{target}: exit code -9")
        result = {"parameters": 10, "gradients": 10, "optimizer": 20, "activations: encoder": 5,
                  "allocator_peak": 50 + case["num_tokens"], "memory_used_bytes": 7, "throttled": "no"}  # fmt: skip
        return resident.Memory(0, 99), result

    monkeypatch.setattr(memory, "resident_peak", child)
    rows = [memory.run_case(OURS, TINY, n, 16, "cuda") for n in (512, 1024, 2048)]
    assert rows[0]["temporary"] == 50 + 512 - 45 and rows[0]["resident_peak"] == 7 and rows[0]["throttled"] == "no"
    assert rows[2] == {"encoder": OURS, "N": 2048, "C": 16,
                       "status": "RuntimeError: conceptron.bench.memory:training_case: exit code -9"}  # fmt: skip
    check = memory.check_prediction(rows, TINY, 16, 1.0, "cuda")
    assert check["predicted N"] == 2**30 - 50 and check["predicted from N"] == 1024
    assert check["status"].endswith("exit code -9") and check["measured_GiB"] is check["error_percent"] is None
    check = memory.check_prediction(rows[1:], TINY, 16, 1.0, "cuda")
    assert check["measured_GiB"] is None and check["status"].startswith("not run: rows: expected at least two lengths")
