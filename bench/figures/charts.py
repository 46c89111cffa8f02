"""The figures of measured results, each drawn from the result files alone: ``conceptron bench report`` draws them anew.

    scaling.json    time.*, memory.*: log-log against N; speedup.*: how many times faster than each peer, against N
    memory.json     memory.*: peaks against N, and what the largest one is made of
    kernels.json    roofline.*: our operators under the run's ceilings; speedup.*: against the fastest accurate peer
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from ..measure.environment import device_of
from ..measure.exponents import (
    FROM_IDS,
    FULL,
    GROWING,
    LLAMA,
    LOCAL,
    OURS,
    PEERS,
    PERCEIVER,
    PHASES,
    QUANTITIES,
    SHARED,
    UNPADDED,
    WITH_KEYS,
    Rows,
    encoders_of,
    fits,
    points,
)
from ..measure.results import read_results
from .plot import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, canvas, in_units, length_axis, unit_axis

SUFFIXES = ("png", "svg")
PHASE_TITLES = {"forward": "encoder, forward", "train": "encoder, forward and backward"}
LINES = {  # encoder -> marker, line, colour; what is not listed is a variant of ours
    OURS: ("o", "-", BLUE), GROWING: ("o", "--", BLUE), FULL: ("s", "-", ORANGE), UNPADDED: ("s", "--", ORANGE),
    FROM_IDS: ("D", "-", PURPLE), SHARED: ("P", "-", BLUE), WITH_KEYS: ("o", ":", BLUE),
    LOCAL: ("^", "-", GREEN), LLAMA: ("^", "--", GREEN), PERCEIVER: ("v", "-", GREY),
}  # fmt: skip
VARIANTS = (  # marker, colour
    ("H", "#7a3fb0"), ("P", "#b5487f"), ("X", "#0f8a8a"), ("*", "#a67c00"), ("d", "#5b6bd6"), ("p", "#7a5c3e"),
    ("h", "#3b8d3b"), ("<", "#a33b3b"), (">", "#4a5560"),
)  # fmt: skip


def line_of(name: str, names: Sequence[str]) -> dict[str, Any]:
    variants = [each for each in names if each not in LINES]
    if name in LINES:
        marker, line, colour = LINES[name]
    else:
        (marker, colour), line = VARIANTS[variants.index(name) % len(VARIANTS)], (0, (4, 1.5, 1, 1.5))
    return {"marker": marker, "linestyle": line, "color": colour, "markersize": 4.5}


def legend_below(panels: Sequence[Axes]) -> None:
    """One legend for all panels, under them."""
    found = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if not found:
        return
    columns = len(found) if len(found) <= 4 else 3 if max(map(len, found)) < 48 else 2
    panels[0].figure.legend(
        found.values(), found, fontsize=9, loc="outside lower center", ncols=columns, handlelength=3.4,
    )  # fmt: skip


def draw_scaling(folder: Path) -> None:
    rows, environment = read_results(folder / "scaling.json")
    sizes = f"d = {environment.get('width')}, {environment.get('layers')} layers" if "width" in environment else ""
    note = "; ".join(part for part in (sizes, "two texts of N and 3N/4 tokens", device_of(environment)) if part)
    for suffix in SUFFIXES:
        plot_growth(folder / f"time.{suffix}", rows, "time_ms", note)
        plot_growth(folder / f"memory.{suffix}", rows, "peak_bytes", note)
        plot_speedup(folder / f"speedup.{suffix}", rows, note)


def plot_growth(path: Path, rows: Rows, quantity: str, note: str) -> None:
    """Log-log, one panel a phase; each line is labelled with its exponents at large N."""
    title, label, unit = {
        "time_ms": ("Time against length", "time of a batch", "ms"),
        "peak_bytes": ("Memory against length", "peak memory of a batch", "bytes"),
    }[quantity]
    names = encoders_of(rows)
    exponent = {(row["encoder"], row["phase"], row["of"]): row["exponent at large N"] for row in fits(rows)}
    note = f"{note}; lower is better; $N^a$, $N^b$: growth over the three longest, left and right"
    height = 4.7 + 0.21 * math.ceil(len(names) / 3)
    with canvas(path, title, note, size=(10.8, height), columns=2) as panels:
        for axes, phase in zip(panels, PHASES, strict=True):
            for name in names:
                lengths, values = points(rows, name, phase, quantity)
                slopes = (exponent.get((name, phase, QUANTITIES[quantity])) for phase in PHASES)
                text = ", ".join(f"$N^{{{slope:.2f}}}$" for slope in slopes if slope is not None)
                if lengths:
                    axes.plot(lengths, values, label=f"{name}  {text}", **line_of(name, names))
            axes.set_title(PHASE_TITLES[phase], fontsize=11)
            unit_axis(axes, unit)
            length_axis(axes, [row["N"] for row in rows])
        panels[0].set_ylabel(label)
        legend_below(panels)


def plot_speedup(path: Path, rows: Rows, note: str) -> None:
    """Each peer's time over ours, against N; below 1 is a loss."""
    peers = [name for name in encoders_of(rows) if name in PEERS]
    if not peers or not points(rows, OURS, "forward", "time_ms")[0]:
        return
    with canvas(path, "How many times faster than each peer", f"concept encoder; {note}", size=(10.4, 4.9),
                columns=2) as panels:  # fmt: skip
        for axes, phase in zip(panels, PHASES, strict=True):
            mine = dict(zip(*points(rows, OURS, phase, "time_ms"), strict=True))
            ends = []
            for name in peers:
                theirs = dict(zip(*points(rows, name, phase, "time_ms"), strict=True))
                shared = [n for n in theirs if n in mine]
                if not shared:
                    continue
                ratios = [theirs[n] / mine[n] for n in shared]
                axes.plot(shared, ratios, label=name, **line_of(name, peers))
                ends.append((shared[-1], ratios[-1], line_of(name, peers)["color"]))
            axes.axhline(1, color=INK, linewidth=1)
            axes.set_yscale("log")
            marks = [mark for mark in (0.1, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
                     if axes.get_ylim()[0] <= mark <= axes.get_ylim()[1]]  # fmt: skip
            axes.set_yticks(marks, [f"{mark:g}x" for mark in marks])
            axes.minorticks_off()
            axes.set_title(PHASE_TITLES[phase], fontsize=11)
            length_axis(axes, [row["N"] for row in rows])
            axes.margins(x=0.1)
            name_ends(axes, ends)
        panels[0].set_ylabel("peer's time / ours")
        legend_below(panels)


def name_ends(axes: Axes, ends: Sequence[tuple[float, float, str]], apart: float = 1.22) -> None:
    """The last value of each line behind its end, on a logarithmic axis; those too near each other are moved apart."""
    places: dict[float, float] = {}
    for x, y, colour in sorted(ends, key=lambda end: end[1]):
        places[x] = max(y, places[x] * apart) if x in places else y
        text = f"{y:.2f}x" if y < 10 else f"{y:.0f}x"
        axes.annotate(text, (x, places[x]), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9,
                      color=colour, path_effects=[withStroke(linewidth=3, foreground="white")], zorder=5)  # fmt: skip


def draw_memory(folder: Path) -> None:
    rows, environment = read_results(folder / "memory.json")
    rows = [row for row in rows if row.get("failed") is None]
    sizes = f"d = {environment.get('width')}, {environment.get('layers')} layers" if "width" in environment else ""
    parts = (sizes, "one text of N tokens", environment.get("dtype"), device_of(environment))
    if not any(row["C"] for row in rows):
        return
    for suffix in SUFFIXES:
        plot_memory(folder / f"memory.{suffix}", rows, "; ".join(part for part in parts if part))


def plot_memory(path: Path, rows: Rows, note: str) -> None:
    """Left: peaks against N, log-log. Right: what the peak of the longest concept case is made of."""
    with canvas(path, "Memory of a training step", note, size=(10.4, 4.9), columns=2) as (against, parts):
        lines = list(dict.fromkeys((row["encoder"], row["C"]) for row in rows))
        shades = dict(zip([line for line in lines if line[1]], (BLUE, GREEN, PURPLE), strict=False))
        for line in lines:
            kept = [row for row in rows if (row["encoder"], row["C"]) == line]
            label = f"{line[0]}, C = {line[1]}" if line[1] else line[0]
            for key, style, what in (("allocator_peak", "o-", "tensors"), ("resident_peak", "o:", "process")):
                against.plot(
                    [row["N"] for row in kept], [row[key] for row in kept], style, color=shades.get(line, ORANGE),
                    markersize=4, label=f"{label}: {what}",
                )  # fmt: skip
        against.set_ylabel("peak memory")
        against.set_title("peak of the tensors, and of the process", fontsize=11)
        unit_axis(against, "bytes")
        length_axis(against, [row["N"] for row in rows])
        legend_below([against])
        last = max((row for row in rows if row["C"]), key=lambda row: (row["N"], row["C"]))
        held = ["parameters", "gradients", "optimizer"]
        names = [*held, *(n for n in last if n.startswith("activations") and last[n] >= 1024), "temporary"]
        sizes = [last[name] / 2**20 for name in names]
        colours = [GREY if name in held else INK if name == "temporary" else BLUE for name in names]
        parts.barh(names[::-1], sizes[::-1], color=colours[::-1], height=0.65)
        for i, name in enumerate(names[::-1]):
            parts.text(last[name] / 2**20, i, f" {in_units(last[name], 'bytes')}", va="center", fontsize=9)
        parts.set(xlabel="MiB", xlim=(0, 1.2 * max(sizes)))
        parts.set_title(f"{last['encoder']}, N = {last['N']}, C = {last['C']}", fontsize=11)
        parts.grid(axis="y", visible=False)


def draw_kernels(folder: Path, best: Rows) -> None:
    """``best``: the table of ``suite.best_peers``."""
    rows, environment = read_results(folder / "kernels.json")
    for suffix in SUFFIXES:
        plot_roofline(folder / f"roofline.{suffix}", rows, environment)
        plot_best(folder / f"speedup.{suffix}", best, environment)


def plot_roofline(path: Path, rows: Rows, environment: Mapping[str, Any]) -> None:
    """Measured rate of our operators against their intensity, under the two ceilings of the same run.

    Operators without matrix products have no place in it; their share of the floor is in the table.
    """
    copy, matmul = environment["copy_gb_s"], environment["matmul_tflops"]
    ours = [row for row in rows if row["provider"].startswith("conceptron") and row.get("tflops")]
    if not ours:
        return
    note = f"{device_of(environment)}; copy {copy:.0f} GB/s and matmul {matmul:.3g} TFLOP/s measured in this run"
    operators = list(dict.fromkeys(row["operator"] for row in ours))
    shades = dict(zip(operators, (BLUE, ORANGE, GREEN, PURPLE, GREY, INK), strict=False))
    with canvas(path, "Operators under the roofline", note, size=(8.2, 5.4)) as (axes,):
        intensity = [row["tflops"] * 1e3 / row["gb_s"] for row in ours]
        ridge = matmul * 1e3 / copy
        low, high = min([*intensity, ridge]) / 3, max([*intensity, ridge]) * 3
        axes.plot([low, ridge, high], [low * copy / 1e3, matmul, matmul], color=INK, linewidth=1.4)
        for operator in operators:
            for mode, marker in (("forward", "o"), ("backward", "s"), ("both", "^")):
                kept = [(x, row["tflops"]) for x, row in zip(intensity, ours, strict=True)
                        if (row["operator"], row["mode"]) == (operator, mode)]  # fmt: skip
                if kept:
                    axes.plot(*zip(*kept, strict=True), marker, color=shades[operator], markersize=6, alpha=0.85)
        for operator in operators:
            axes.plot([], [], "o", color=shades[operator], label=operator)
        for mode, marker in (("forward", "o"), ("backward", "s"), ("forward + backward", "^")):
            axes.plot([], [], marker, color="none", markeredgecolor=INK, label=mode)
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s")
        axes.set_ylim(0.5 * min(row["tflops"] for row in ours), 1.7 * matmul)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
        marks = [step * 10.0**k for k in range(-4, 5) for step in (1, 2, 5)]
        axes.set_yticks([mark for mark in marks if axes.get_ylim()[0] <= mark <= axes.get_ylim()[1]])
        axes.text(high, 1.06 * matmul, f"matmul, {matmul:.3g} TFLOP/s", ha="right", va="bottom", fontsize=9)
        axes.legend(fontsize=8.5, loc="upper left", bbox_to_anchor=(-0.02, -0.14), ncols=4)


def plot_best(path: Path, best: Rows, environment: Mapping[str, Any]) -> None:
    """Our time against the fastest accurate peer's, one bar a case; left of 1 is a loss."""
    table = [row for row in best if row["ours is faster by"]]
    if not table:
        return
    note = f"forward and backward; {device_of(environment)}; right of 1 ours is faster"
    with canvas(path, "Against the fastest accurate peer", note, size=(9.2, 1.5 + 0.38 * len(table))) as (axes,):
        names = [f"{row['operator']}  {row['case']}" for row in table][::-1]
        values = [row["ours is faster by"] for row in table][::-1]
        axes.barh(names, values, color=[BLUE if value >= 1 else GREY for value in values], height=0.6)
        for i, (value, row) in enumerate(zip(values, table[::-1], strict=True)):
            axes.text(max(value, 1.0), i, f"  {value:.2f}x  {row['best peer']}", va="center", fontsize=8.5)
        axes.axvline(1, color=INK, linewidth=1)
        axes.set(xlabel="peer's time / ours", xlim=(0, max([*values, 1.0]) * 1.45))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", labelsize=8.5)
