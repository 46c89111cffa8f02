import math

import pytest
import torch

from conceptron.bench.allocator import allocator_peak
from conceptron.bench.harness import Timing
from conceptron.bench.peers import Perceiver, Shape, bert, modernbert
from conceptron.bench.scaling import (
    FULL,
    GROWING,
    OURS,
    PERCEIVER,
    UNPADDED,
    crossover,
    encoders,
    fit_exponent,
    fits,
    grown_concepts,
    make_batch,
    measure,
    points,
)  # fmt: skip

LENGTHS = [512, 1024, 2048, 4096, 8192]
TINY = Shape(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, vocab_size=128, max_tokens=128)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_fit_finds_the_exponent(exponent):
    fit = fit_exponent(LENGTHS, [3.0 * n**exponent for n in LENGTHS])
    assert fit.exponent == pytest.approx(exponent, abs=1e-9)
    assert fit.low == pytest.approx(exponent, abs=1e-6) and fit.high == pytest.approx(exponent, abs=1e-6)


def test_interval_holds_the_truth_in_noise():
    # 95 of 100 intervals should; with this seed the share is well inside what chance allows
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(200):
        noise = torch.randn(len(LENGTHS), generator=generator) * 0.1
        fit = fit_exponent(LENGTHS, [n * math.exp(e) for n, e in zip(LENGTHS, noise.tolist(), strict=True)])
        inside += fit.low <= 1.0 <= fit.high
    assert 180 <= inside <= 199


def test_fit_refuses():
    with pytest.raises(ValueError, match="at least two points"):
        fit_exponent([512], [1.0])
    with pytest.raises(ValueError, match="positive"):
        fit_exponent([512, 1024], [1.0, 0.0])


def test_concepts_grow_as_in_the_roadmap():
    assert [grown_concepts(n) for n in (512, 4096, 32768)] == [128, 512, 2048]


def row(encoder: str, n: int, ms: float) -> dict:
    timing = Timing(ms, ms, ms, 3, "clock")
    return {"encoder": encoder, "phase": "train", "N": n, "time_ms": timing, "peak_bytes": None}


def test_crossover_says_from_where_on():
    rows = [row(OURS, n, 2.0) for n in LENGTHS] + [row(FULL, n, n / 512) for n in LENGTHS]
    verdict = crossover(rows, OURS, FULL, "train")
    assert verdict == "train: concept is faster than full attention from N = 2048 on; 8.0x at N = 8192"
    assert "not faster" in crossover(rows, FULL, OURS, "train")
    assert "no length" in crossover(rows[:2], OURS, FULL, "train")


def test_a_skipped_case_leaves_no_point():
    rows = [row(OURS, 512, 1.0), {**row(OURS, 1024, 1.0), "time_ms": "not run: too slow"}]
    assert points(rows, OURS, "train", "time_ms") == ([512], [1.0])
    assert fits(rows, [OURS]) == []


def test_all_encoders_read_the_same_batch():
    """Each gives finite hidden states, and padding does not reach the real tokens of the padded ones."""
    names = (OURS, GROWING, FULL, UNPADDED, PERCEIVER)
    device = torch.device("cpu")
    batch = make_batch(64, TINY.vocab_size, device)
    assert batch.num_tokens == 64 + 48
    built = encoders(TINY, device)
    for name in names:
        module, call = built[name](64)(batch)
        module.eval()
        with torch.no_grad():
            out = call()
        assert torch.isfinite(out).all(), name
    full, one_by_one = (built[name](64)(batch) for name in (FULL, UNPADDED))
    with torch.no_grad():
        padded, separate = full[1](), one_by_one[1]()
    real = torch.cat([padded[0], padded[1, :48]])
    assert torch.allclose(real, separate, atol=1e-5)


def test_peers_have_the_width_that_was_asked_for():
    for build in (bert, modernbert, lambda shape: Perceiver(shape, 16)):
        module = build(TINY)
        assert any(p.shape == (TINY.vocab_size, TINY.hidden_size) for p in module.parameters())
        layers = module.encoder.layer if hasattr(module, "encoder") else module.layers
        assert len(layers) == TINY.num_layers


def test_measure_skips_what_would_take_too_long():
    rows = measure(TINY, [32, 64], torch.device("cpu"), [OURS], budget_s=0.01, limit_s=1e-9, report=lambda text: None)
    first, second = (row for row in rows if row["phase"] == "train")
    assert isinstance(first["time_ms"], Timing) and first["peak_bytes"] > 0
    assert second["time_ms"].reason.startswith("not run") and second["peak_bytes"] is None


def test_allocator_peak_counts_what_lives_at_once():
    def call():
        a = torch.zeros(1 << 18)  # 1 MiB
        b = a + 1
        del a
        return b + 1

    assert allocator_peak(call, "cpu").extra_bytes == pytest.approx(2 << 20, rel=0.01)
