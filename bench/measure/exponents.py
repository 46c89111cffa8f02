"""How a measured quantity grows with N: fitted exponents, and from which N on one encoder is faster than another.

The exponent b of a quantity ~ N^b is the slope of log(quantity) against log(N) by least squares, with the 95 %
confidence interval of the slope; "at large N" means over the three longest N that ran.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from ...engine.files import write_text
from .results import write_results
from .timing import Timing

OURS, GROWING = "concept", "concept, C grows"
FROM_IDS, SHARED, WITH_KEYS = "concept, from ids", "concept, shared keys", "concept, keys kept"
FULL, UNPADDED, LOCAL, PERCEIVER = "full attention", "full, no padding", "local + full", "plain Perceiver"
LLAMA = "local + full, Llama"
WINDOWED, WINDOWED_TRAINED = "backbone, windows", "backbone, windows, all trained"
WHOLE_BACKBONE = "backbone, full attention"
ON_BACKBONE = (WINDOWED, WINDOWED_TRAINED, WHOLE_BACKBONE)
PEERS = (FULL, UNPADDED, LOCAL, LLAMA, PERCEIVER)
Rows = Sequence[Mapping[str, Any]]
PHASES = ("forward", "train")
QUANTITIES = {"time_ms": "time", "peak_bytes": "memory"}
LARGE = 3  # the longest lengths that make up "at large N"


class Fit(NamedTuple):
    """quantity ~ N^exponent; ``low`` and ``high`` bound the 95 % confidence interval (NaN from two points)."""

    exponent: float
    low: float
    high: float
    num_points: int


def fit_exponent(lengths: Sequence[float], values: Sequence[float]) -> Fit:
    """Slope of log(values) on log(lengths), least squares.

    Raises:
        ValueError: fewer than two points, or a value that is not positive.
    """
    if len(lengths) < 2:
        raise ValueError(f"lengths: expected at least two points to fit an exponent, got {len(lengths)}")
    if min(values) <= 0:
        raise ValueError(f"values: expected positive ones, got {min(values)}")
    line = stats.linregress(np.log(lengths), np.log(values))
    if len(lengths) == 2:
        return Fit(float(line.slope), math.nan, math.nan, 2)
    half = float(stats.t.ppf(0.975, len(lengths) - 2) * line.stderr)
    return Fit(float(line.slope), float(line.slope) - half, float(line.slope) + half, len(lengths))


def points(rows: Rows, name: str, phase: str, quantity: str) -> tuple[list[int], list[float]]:
    """(N, value) of every length at which this encoder ran, by N."""
    pairs = []
    for row in rows:
        value = row.get(quantity)
        value = value.median_ms if isinstance(value, Timing) else value
        if (row["encoder"], row["phase"]) == (name, phase) and isinstance(value, int | float):
            pairs.append((row["N"], value))
    return [n for n, _ in sorted(pairs)], [v for _, v in sorted(pairs)]


def in_tokens(number: int) -> str:
    """16384 -> 16K; 1048576 -> 1M."""
    for size, name in ((2**20, "M"), (2**10, "K")):
        if number % size == 0:
            return f"{number // size}{name}"
    return str(number)


def encoders_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["encoder"] for row in rows))


def fits(rows: Rows) -> list[dict]:
    """The fitted exponents: one row for each encoder, phase and quantity."""
    table = []
    for name in encoders_of(rows):
        for phase in PHASES:
            for quantity, of in QUANTITIES.items():
                lengths, values = points(rows, name, phase, quantity)
                if len(lengths) < 2:
                    continue
                whole, large = fit_exponent(lengths, values), fit_exponent(lengths[-LARGE:], values[-LARGE:])
                table.append({
                    "encoder": name, "phase": phase, "of": of, "exponent": round(whole.exponent, 3),
                    **({"low": None, "high": None} if whole.num_points == 2 else
                       {"low": round(whole.low, 3), "high": round(whole.high, 3)}),
                    "exponent at large N": round(large.exponent, 3), "up to N": lengths[-1],
                })  # fmt: skip
    return table


def summary(rows: Rows) -> list[dict]:
    """One row an encoder: its exponents at large N, and what the longest length costs it."""
    longest = max(row["N"] for row in rows)
    exponent = {(row["encoder"], row["phase"], row["of"]): row["exponent at large N"] for row in fits(rows)}
    table = []
    for name in encoders_of(rows):
        line: dict[str, Any] = {"encoder": name}
        for phase in PHASES:
            for of in QUANTITIES.values():
                line[f"{phase} {of} exponent"] = exponent.get((name, phase, of))
            times = dict(zip(*points(rows, name, phase, "time_ms"), strict=True))
            line[f"{phase} ms at N = {longest}"] = times.get(longest)
        table.append(line)
    return table


def crossover(rows: Rows, ours: str, peer: str, phase: str) -> str:
    """From which measured N on ``ours`` is faster than ``peer``, at this and every longer length that both ran."""
    a, b = (dict(zip(*points(rows, name, phase, "time_ms"), strict=True)) for name in (ours, peer))
    shared = sorted(set(a) & set(b))
    if not shared:
        return f"{phase}: {ours} and {peer} share no length that both ran"
    slower = [n for n in shared if a[n] >= b[n]]
    if slower and slower[-1] == shared[-1]:
        return f"{phase}: {ours} is not faster than {peer} at N = {shared[-1]} ({b[shared[-1]] / a[shared[-1]]:.2f}x)"
    start, last = next(n for n in shared if not slower or n > slower[-1]), shared[-1]
    return f"{phase}: {ours} is faster than {peer} from N = {start} on; {b[last] / a[last]:.1f}x at N = {last}"


def verdicts(rows: Rows) -> list[str]:
    """Where ours passes each peer, and by how much; every concept encoder, losses like wins."""
    names = encoders_of(rows)
    peers = [name for name in names if name in (*PEERS, WHOLE_BACKBONE)]
    return [
        crossover(rows, ours, peer, phase)
        for ours in names if ours not in peers for phase in PHASES for peer in peers
    ]  # fmt: skip


def write_tables(folder: Path, rows: Rows, stamp: Mapping[str, Any]) -> None:
    """What follows from the rows of scaling.json: exponents, summary, crossovers."""
    if table := fits(rows):
        write_results(folder, "exponents", table, stamp, title="Fitted exponents: quantity ~ N^exponent")
        title = "Exponents over the three longest N, and the time of the longest"
        write_results(folder, "summary", summary(rows), stamp, title=title)
    write_text(folder / "crossover.txt", "\n".join(verdicts(rows)) + "\n")
