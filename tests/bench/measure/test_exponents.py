import math

import pytest
import torch

from conceptron.bench.measure.exponents import crossover, fit_exponent, fits, points, summary
from conceptron.bench.measure.timing import Timing

LENGTHS = [512, 1024, 2048, 4096, 8192]
OURS, FULL = "concept", "full attention"


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
    assert fits(rows) == []


def test_summary_tells_the_exponents_at_large_n_and_the_cost_of_the_longest():
    rows = [
        {"encoder": name, "phase": phase, "N": n, "time_ms": float(n**power), "peak_bytes": n if n < 8192 else None}
        for name, power in ((OURS, 1), (FULL, 2)) for phase in ("forward", "train") for n in LENGTHS
    ]
    rows[-1] |= {"time_ms": "not run: expected about 80 s a call, limit 20 s"}
    ours, full = summary(rows)
    assert (ours["encoder"], ours["train time exponent"], ours["train ms at N = 8192"]) == (OURS, 1.0, 8192.0)
    assert full["forward time exponent"] == full["train time exponent"] == 2.0
    assert full["train memory exponent"] == 1.0
    assert full["train ms at N = 8192"] is None, "what was not run has no time"
