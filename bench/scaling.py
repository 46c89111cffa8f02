"""Time and memory against N: the concept encoder beside full attention and beside a plain Perceiver.

    conceptron bench scaling [--max-tokens 16384] [--out runs/bench/scaling]

A case is a batch of two texts of N and 3N/4 tokens, through the encoder alone ("forward") or through forward and
backward of the mean square of its output ("train"). All share width, depth, heads, feed-forward width and vocabulary.

    concept             C = 128 for every N
    concept, C grows    C = 128 (N / 512)^(2/3): 512 / 128, 4096 / 512, 32768 / 2048
    full attention      BERT-like, SDPA, the padded batch with its mask
    full, no padding    the same encoder, one text after the other without a mask, its best case: SDPA's flash path
    local + full        ModernBERT-like, SDPA, the padded batch
    plain Perceiver     torch.nn.MultiheadAttention with a key padding mask, C = 128

The exponent b of a quantity ~ N^b is the slope of log(quantity) against log(N) by least squares, with the 95 %
confidence interval of the slope; "at large N" means over the three longest N that ran.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from ..models.config import ConceptConfig
from ..models.encoder import ConceptEncoder
from ..models.packing import pack_padded
from .allocator import allocator_peak
from .harness import (
    Refusal,
    Timing,
    cell,
    compare,
    device_of,
    environment,
    markdown_table,
    write_results,
    write_text,
)  # fmt: skip
from .peers import Perceiver, Shape, bert, modernbert
from .plot import BLUE, GREEN, GREY, ORANGE, canvas, length_axis

OURS, GROWING = "concept", "concept, C grows"
FULL, UNPADDED, LOCAL, PERCEIVER = "full attention", "full, no padding", "local + full", "plain Perceiver"
NAMES = (OURS, GROWING, FULL, UNPADDED, LOCAL, PERCEIVER)
COLOURS = dict(zip(NAMES, (BLUE, BLUE, ORANGE, ORANGE, GREEN, GREY), strict=True))
STYLES = dict(zip(NAMES, ("o-", "o--", "s-", "s--", "^-", "v-"), strict=True))
PHASES = ("forward", "train")
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


def grown_concepts(num_tokens: int) -> int:
    """C for "C grows": 128 (N / 512)^(2/3), to the nearest multiple of 32."""
    return max(32, 32 * round(128 * (num_tokens / 512) ** (2 / 3) / 32))


class Batch(NamedTuple):
    input_ids: Tensor  # [2, N]
    attention_mask: Tensor  # [2, N]
    num_tokens: int  # that are not padding


def make_batch(num_tokens: int, vocab_size: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(num_tokens)
    input_ids = torch.randint(1, vocab_size, (2, num_tokens), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[1, 3 * num_tokens // 4 :] = 0
    return Batch((input_ids * mask).to(device), mask.to(device), int(mask.sum()))


Encode = Callable[[], Tensor]
Build = Callable[[Batch], tuple[nn.Module, Encode]]


def encoders(shape: Shape, device: torch.device) -> dict[str, Callable[[int], Build]]:
    """name -> (N -> (batch -> (module, call))): the modules that do not depend on N are built once."""
    torch.manual_seed(0)

    def concept(num_concepts: int) -> nn.Module:
        return ConceptEncoder(ConceptConfig(
            vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, num_concepts=num_concepts,
            num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
            intermediate_size=shape.intermediate_size,
        )).to(device)  # fmt: skip

    fixed, full = concept(128), bert(shape).to(device)
    local, perceiver = modernbert(shape).to(device), Perceiver(shape, 128).to(device)

    def ours(module: nn.Module, batch: Batch) -> Encode:
        packed = pack_padded(batch.input_ids, batch.attention_mask)
        return lambda: module(packed=packed).last_hidden_state

    def padded(module: nn.Module, batch: Batch) -> Encode:
        def call() -> Tensor:
            out = module(batch.input_ids, attention_mask=batch.attention_mask)
            return out if isinstance(out, Tensor) else out.last_hidden_state

        return call

    def one_by_one(module: nn.Module, batch: Batch) -> Encode:
        texts = [ids[mask != 0][None] for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
        return lambda: torch.cat([module(text).last_hidden_state[0] for text in texts])

    def with_module(module: nn.Module, build) -> Callable:
        return lambda batch: (module, build(module, batch))

    return {
        OURS: lambda n: with_module(fixed, ours),
        GROWING: lambda n: with_module(concept(grown_concepts(n)), ours),
        FULL: lambda n: with_module(full, padded),
        UNPADDED: lambda n: with_module(full, one_by_one),
        LOCAL: lambda n: with_module(local, padded),
        PERCEIVER: lambda n: with_module(perceiver, padded),
    }


def phase_call(phase: str, module: nn.Module, encode: Encode) -> Callable[[], object]:
    if phase == "forward":
        return torch.no_grad()(encode)

    def step() -> None:
        module.zero_grad(set_to_none=True)
        encode().float().square().mean().backward()

    return step


def measure(
    shape: Shape, lengths: Sequence[int], device: torch.device, names: Sequence[str], *, budget_s: float,
    limit_s: float, report: Callable[[str], None] = print,
) -> list[dict]:  # fmt: skip
    """One row for each encoder, phase and N.

    A provider whose last step took so long that four times it would pass ``limit_s`` is not run at the next length; the
    row says so. One that raises (out of memory, say) says what it raised.
    """
    builders = encoders(shape, device)
    expected_s: dict[tuple[str, str], float] = {}
    rows = []
    for num_tokens in lengths:
        batch = make_batch(num_tokens, shape.vocab_size, device)
        modules = {name: builders[name](num_tokens)(batch) for name in names}
        for phase in PHASES:
            ready, results, memory = {}, {}, {}
            for name in names:
                wait_s = 4 * expected_s.get((name, phase), 0.0)
                if wait_s > limit_s:
                    results[name] = Refusal(f"not run: expected about {wait_s:.0f} s a call, limit {limit_s:.0f} s")
                else:
                    ready[name] = phase_call(phase, *modules[name])
            results |= compare(ready, device=device, budget_s=budget_s, min_rounds=1, max_rounds=20)
            for name, call in ready.items():
                if isinstance(results[name], Timing):
                    expected_s[name, phase] = results[name].median_ms / 1e3
                    memory[name] = allocator_peak(call, device).extra_bytes
                    modules[name][0].zero_grad(set_to_none=True)
                else:
                    expected_s[name, phase] = math.inf
            for name in names:
                rows.append({
                    "encoder": name, "phase": phase, "N": num_tokens, "tokens": batch.num_tokens,
                    "C": {OURS: 128, GROWING: grown_concepts(num_tokens), PERCEIVER: 128}.get(name),
                    "time_ms": results[name],
                    "us_per_token": results[name].median_ms * 1e3 / batch.num_tokens
                    if isinstance(results[name], Timing) else None,
                    "peak_bytes": memory.get(name),
                })  # fmt: skip
            shown = (f"{name} {cell(results[name].median_ms) if name in memory else '-'}" for name in names)
            report(f"N={num_tokens:>7} {phase:<7} ms: {'  '.join(shown)}")
    return rows


def points(rows: Sequence[dict], name: str, phase: str, quantity: str) -> tuple[list[int], list[float]]:
    """(N, value) of every length at which this encoder ran."""
    kept = [row for row in rows if row["encoder"] == name and row["phase"] == phase]
    value = [row[quantity].median_ms if isinstance(row[quantity], Timing) else row[quantity] for row in kept]
    pairs = [(row["N"], v) for row, v in zip(kept, value, strict=True) if isinstance(v, (int, float))]
    return [n for n, _ in pairs], [v for _, v in pairs]


def fits(rows: Sequence[dict], names: Sequence[str]) -> list[dict]:
    """The fitted exponents: one row for each encoder, phase and quantity."""
    table = []
    for name in names:
        for phase in PHASES:
            for quantity in ("time_ms", "peak_bytes"):
                lengths, values = points(rows, name, phase, quantity)
                if len(lengths) < 2:
                    continue
                whole, large = fit_exponent(lengths, values), fit_exponent(lengths[-LARGE:], values[-LARGE:])
                table.append({
                    "encoder": name, "phase": phase, "of": quantity.split("_")[0],
                    "exponent": round(whole.exponent, 3), "low": round(whole.low, 3), "high": round(whole.high, 3),
                    "exponent at large N": round(large.exponent, 3), "up to N": lengths[-1],
                })  # fmt: skip
    return table


def summary(table: Sequence[dict]) -> list[dict]:
    """One row an encoder: its exponents over all lengths that ran."""
    lines: dict[str, dict] = {}
    for row in table:
        line = lines.setdefault(row["encoder"], {"encoder": row["encoder"]})
        line[f"{row['phase']} {'memory' if row['of'] == 'peak' else 'time'}"] = row["exponent"]
    return list(lines.values())


def crossover(rows: Sequence[dict], ours: str, peer: str, phase: str) -> str:
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


def plot(
    path: Path, rows: Sequence[dict], table: Sequence[dict], names: Sequence[str], quantity: str, note: str
) -> None:
    """Log-log, one panel a phase; each line is labelled with its exponent at large N."""
    title, unit, scale = {
        "time_ms": ("Time against length", "time of a batch (ms)", 1.0),
        "peak_bytes": ("Memory against length", "peak memory of a batch (MiB)", 2.0**20),
    }[quantity]
    with canvas(path, title, note, size=(10.4, 5.6), columns=2) as panels:
        for axes, phase in zip(panels, PHASES, strict=True):
            for name in names:
                lengths, values = points(rows, name, phase, quantity)
                if not lengths:
                    continue
                exponent = [
                    row["exponent at large N"] for row in table
                    if (row["encoder"], row["phase"], row["of"]) == (name, phase, quantity.split("_")[0])
                ]  # fmt: skip
                label = f"{name}  (N^{exponent[0]:.2f})" if exponent else name
                axes.plot(
                    lengths, [v / scale for v in values], STYLES[name], color=COLOURS[name], label=label, markersize=4
                )
            axes.set_yscale("log")
            axes.set_title(phase)
            length_axis(axes, [row["N"] for row in rows])
            axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2)
        panels[0].set_ylabel(unit)


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="conceptron bench scaling", description="Time and memory against N.")
    parser.add_argument("--min-tokens", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--width", type=int, default=128, help="d, of every encoder")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="ENCODER")
    parser.add_argument("--seconds", type=float, default=1.0, help="timed for each case, at least one call")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a call may be expected to take")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/scaling"))
    options = parser.parse_args(argv)
    if not 1 <= options.min_tokens <= options.max_tokens:
        parser.error("--min-tokens: expected at least 1 and at most --max-tokens")
    lengths = [options.min_tokens]
    while lengths[-1] * 2 <= options.max_tokens:
        lengths.append(lengths[-1] * 2)
    shape = Shape(options.width, options.layers, options.heads, 2 * options.width, 8192, lengths[-1])
    device = torch.device(options.device)
    rows = measure(shape, lengths, device, options.only, budget_s=options.seconds, limit_s=options.limit)
    table = fits(rows, options.only)
    verdicts = [
        crossover(rows, OURS, peer, phase) for phase in PHASES for peer in (FULL, UNPADDED, LOCAL, PERCEIVER)
        if OURS in options.only and peer in options.only
    ]  # fmt: skip
    stamp = environment()
    sizes = f"d={options.width}, {options.layers} layers, {options.heads} heads"
    title = f"Scaling: {sizes}, two texts of N and 3N/4 tokens"
    write_results(options.out, "scaling", rows, stamp, title=title)
    write_results(options.out, "exponents", table, stamp, title=f"{title}: fitted exponents")
    write_results(options.out, "summary", summary(table), stamp, title=f"{title}: exponents in N")
    write_text(options.out / "crossover.txt", "\n".join(verdicts) + "\n")
    note = f"d = {options.width}, {options.layers} layers, {device_of(stamp)}; lower is better"
    for quantity in ("time_ms", "peak_bytes"):
        for suffix in ("png", "svg"):
            plot(options.out / f"{quantity.split('_')[0]}.{suffix}", rows, table, options.only, quantity, note)
    print(markdown_table(table, list(table[0])) if table else "one length only: nothing to fit")
    print("\n".join(verdicts))
    print(f"written to {options.out}")
    return 0
