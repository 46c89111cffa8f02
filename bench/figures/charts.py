"""The figures of measured results, each drawn from the result files alone: ``conceptron bench report`` draws them anew.

    scaling.json    time.*, memory.*: log-log against N; speedup.*: how many times faster than each peer, against N
    two of them     overview.*: time and memory of training, of few encoders, over the lengths of both
    kernels.json    roofline.*: our operators under the run's ceilings; speedup.*: against the fastest accurate peer

``memory.py`` draws those of ``bench memory``.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axis import Axis
from matplotlib.ticker import NullFormatter, NullLocator

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
    in_tokens,
    points,
)
from ..measure.results import read_results
from .plot import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    canvas,
    in_units,
    legend_below,
    length_axis,
    unit_axis,
)

PHASE_TITLES = {"forward": "encoder, forward", "train": "encoder, forward and backward"}
LINES = {  # encoder -> marker, line, colour, and its name under a figure; what is not listed is a variant of ours
    OURS: ("o", "-", BLUE, "concept"),
    FROM_IDS: ("D", "-", PURPLE, "concept, of a token only its id is kept"),
    SHARED: ("P", (0, (6, 1.5)), BLUE, "concept, layers share keys and values"),
    WITH_KEYS: ("X", (0, (1, 1.2)), BLUE, "concept, keys and values kept"),
    GROWING: ("d", (0, (4, 1.5, 1, 1.5)), BLUE, "concept, C grows with N"),
    FULL: ("s", "-", ORANGE, "full attention (BERT-like)"),
    UNPADDED: ("h", (0, (4, 1.5)), ORANGE, "full attention without padding"),
    LOCAL: ("^", "-", GREEN, "local + full (ModernBERT-like)"),
    LLAMA: ("<", (0, (4, 1.5)), GREEN, "local + full (UltraBERT-like)"),
    PERCEIVER: ("v", "-", GREY, "plain Perceiver"),
}
FEW = (OURS, FROM_IDS, FULL, UNPADDED, PERCEIVER)  # of the overview
VARIANTS = (  # marker, line, colour
    ("H", "-", PURPLE), ("P", (0, (4, 1.5)), PURPLE), ("X", "-", GREEN), ("*", "-", ORANGE),
    ("d", (0, (4, 1.5)), ORANGE), ("p", (0, (1, 1.2)), ORANGE), ("h", "-", INK),
    ("<", (0, (4, 1.5)), GREEN), (">", (0, (4, 1.5)), INK),
)  # fmt: skip


def line_of(name: str, names: Sequence[str]) -> dict[str, Any]:
    variants = [each for each in names if each not in LINES]
    marker, line, colour = LINES[name][:3] if name in LINES else VARIANTS[variants.index(name) % len(VARIANTS)]
    return {"marker": marker, "linestyle": line, "color": colour, "markersize": 5}


def title_of(name: str) -> str:
    return LINES[name][3] if name in LINES else name


def height(num_names: int) -> float:
    """Of a figure with two panels and a legend in two columns under them."""
    return 4.5 + 0.22 * math.ceil(num_names / 2)


def sizes_of(environment: Mapping[str, Any]) -> str:
    width, layers = environment.get("width"), environment.get("layers")
    return f"d = {width}, {layers} layer{'s' * (layers != 1)}" if width else ""


def note_of(environment: Mapping[str, Any]) -> str:
    parts = (sizes_of(environment), "two texts of N and 3N/4 tokens", device_of(environment))
    return "; ".join(part for part in parts if part)


def draw_scaling(folder: Path) -> None:
    rows, environment = read_results(folder / "scaling.json")
    note = note_of(environment)
    plot_growth(folder / "time.png", rows, "time_ms", note)
    plot_growth(folder / "memory.png", rows, "peak_bytes", note)
    plot_speedup(folder / "speedup.png", rows, note)


def plot_growth(path: Path, rows: Rows, quantity: str, note: str) -> None:
    """Log-log, one panel a phase; each line is labelled with its exponents at large N."""
    title, label, unit = {
        "time_ms": ("Time against length", "time of a batch", "ms"),
        "peak_bytes": ("Memory against length", "peak memory of a batch", "bytes"),
    }[quantity]
    names = encoders_of(rows)
    exponent = {(row["encoder"], row["phase"], row["of"]): row["exponent at large N"] for row in fits(rows)}
    note = f"{note}\nlower is better; $N^a$, $N^b$: growth over the three longest, left and right"
    with canvas(path, title, note, size=(9.6, height(len(names))), columns=2) as panels:
        for axes, phase in zip(panels, PHASES, strict=True):
            for name in names:
                lengths, values = points(rows, name, phase, quantity)
                slopes = (exponent.get((name, phase, QUANTITIES[quantity])) for phase in PHASES)
                text = ", ".join("?" if slope is None else f"$N^{{{slope:.2f}}}$" for slope in slopes)
                if lengths:
                    axes.plot(lengths, values, label=f"{title_of(name)}  {text}", **line_of(name, names))
            axes.set_title(PHASE_TITLES[phase], fontsize=11)
            unit_axis(axes, unit)
            length_axis(axes, [row["N"] for row in rows])
        panels[0].set_ylabel(label)
        legend_below(panels, columns=min(2, len(names)))


def plot_speedup(path: Path, rows: Rows, note: str) -> None:
    """Each peer's time over ours, against N; below 1 is a loss."""
    peers = [name for name in encoders_of(rows) if name in PEERS]
    if not peers or not points(rows, OURS, "forward", "time_ms")[0]:
        return
    times = {(name, phase): dict(zip(*points(rows, name, phase, "time_ms"), strict=True))
             for name in (OURS, *peers) for phase in PHASES}  # fmt: skip
    ratios = {(name, phase): {n: ms / times[OURS, phase][n] for n, ms in times[name, phase].items()
                              if n in times[OURS, phase]} for name in peers for phase in PHASES}  # fmt: skip

    def last(name: str) -> str:
        found = [max(ratios[name, phase].items()) for phase in PHASES if ratios[name, phase]]
        return ", ".join(f"{ratio:.2f}x at {in_tokens(n)}" if ratio < 10 else f"{ratio:.0f}x at {in_tokens(n)}"
                         for n, ratio in found)  # fmt: skip

    note = f"peer's time / that of the concept encoder; {note}\nbehind each name: its last value, left and right"
    with canvas(path, "How many times faster than each peer", note, size=(9.6, height(len(peers))),
                columns=2) as panels:  # fmt: skip
        for axes, phase in zip(panels, PHASES, strict=True):
            for name in peers:
                if ratios[name, phase]:
                    axes.plot(*zip(*ratios[name, phase].items(), strict=True), label=f"{title_of(name)}: {last(name)}",
                              **line_of(name, peers))  # fmt: skip
            axes.axhline(1, color=INK, linewidth=1)
            shown = [ratio for name in peers for ratio in ratios[name, phase].values()]
            ratio_axis(axes.yaxis, (min(shown, default=1) / 1.15, 1.15 * max(shown, default=1)))
            axes.set_title(PHASE_TITLES[phase], fontsize=11)
            length_axis(axes, [row["N"] for row in rows])
        panels[0].set_ylabel("faster than the peer by")
        legend_below(panels, columns=min(2, len(peers)))


def ratio_axis(axis: Axis, limits: tuple[float, float]) -> None:
    """A logarithmic axis of ratios, at least from 0.8 to 1.25, with marks at 0.5x, 1x, 2x and so on."""
    axes, which = axis.axes, axis.axis_name
    low, high = min(limits[0], 0.8), max(limits[1], 1.25)
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    steps = (1, 1.2, 1.5, 2, 3, 5, 7, 8, 9) if high / low < 8 else (1, 2, 5)
    marks = [mark for mark in (step * 10.0**k for k in range(-3, 5) for step in steps) if low <= mark <= high]
    axis.set_ticks(marks, [f"{mark:g}x" for mark in marks])
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def draw_overview(folder: Path, short: Path, long: Path) -> None:
    """``overview`` in ``folder``: time and memory of a training step of few encoders, over the lengths of two result
    files; at a length that both have, the first is drawn. Nothing where they were measured in different settings."""
    rows, environment = read_results(short)
    if long.exists():
        more, other = read_results(long)
        settings = ("width", "layers", "heads", "gpu", "cpu", "threads", "dtype")
        if all(environment[key] == other[key] for key in settings if key in environment and key in other):
            known = {(row["encoder"], row["phase"], row["N"]) for row in rows if row["time_ms"] is not None}
            rows = rows + [row for row in more if (row["encoder"], row["phase"], row["N"]) not in known]
            environment = {**other, **environment}
    plot_overview(folder / "overview.png", rows, note_of(environment))


def plot_overview(path: Path, rows: Rows, note: str) -> None:
    names = [name for name in FEW if points(rows, name, "train", "time_ms")[0]]
    if OURS not in names:
        return
    rows = [row for row in rows if row["encoder"] in names]
    last = {}
    for name in names:
        (lengths, times), (_, sizes) = (points(rows, name, "train", quantity) for quantity in QUANTITIES)
        last[name] = f"{in_units(times[-1], 'ms')}, {in_units(sizes[-1], 'bytes')} at {in_tokens(lengths[-1])}"
    note = f"forward and backward of the encoder; {note}\nlower is better; behind each name: its longest text that ran"
    with canvas(path, "A training step against length", note, size=(9.6, height(len(names))), columns=2) as panels:
        for axes, (quantity, of) in zip(panels, QUANTITIES.items(), strict=True):
            for name in names:
                axes.plot(*points(rows, name, "train", quantity), label=f"{title_of(name)}: {last[name]}",
                          **line_of(name, names))  # fmt: skip
            axes.set_title({"time": "time of a batch", "memory": "peak memory of its tensors"}[of], fontsize=11)
            unit_axis(axes, {"time": "ms", "memory": "bytes"}[of])
            length_axis(axes, [row["N"] for row in rows])
        legend_below(panels, columns=1 if max(map(len, last.values())) + 30 > 70 else 2)


def draw_kernels(folder: Path, best: Rows) -> None:
    """``best``: the table of ``suite.best_peers``."""
    rows, environment = read_results(folder / "kernels.json")
    plot_roofline(folder / "roofline.png", rows, environment)
    plot_best(folder / "speedup.png", best, environment)


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
    with canvas(path, "Operators under the roofline", note, size=(8.2, 5.2)) as (axes,):
        intensity = [row["tflops"] * 1e3 / row["gb_s"] for row in ours]
        ridge = matmul * 1e3 / copy
        low, high = min([*intensity, ridge]) / 1.8, max([*intensity, ridge]) * 1.8
        axes.plot([low, ridge], [low * copy / 1e3, matmul], color=INK, linewidth=1.4, linestyle=(0, (5, 2)),
                  label=f"ceiling: copy, {copy:.0f} GB/s")  # fmt: skip
        axes.plot([ridge, high], [matmul, matmul], color=INK, linewidth=1.4,
                  label=f"ceiling: matmul, {matmul:.3g} TFLOP/s")  # fmt: skip
        for operator in operators:
            for mode, marker in (("forward", "o"), ("backward", "s"), ("both", "^")):
                kept = [(x, row["tflops"]) for x, row in zip(intensity, ours, strict=True)
                        if (row["operator"], row["mode"]) == (operator, mode)]  # fmt: skip
                if kept:
                    axes.plot(*zip(*kept, strict=True), marker, color=shades[operator], markersize=6.5, alpha=0.8,
                              linestyle="none")  # fmt: skip
        for operator in operators:
            axes.plot([], [], "o", color=shades[operator], label=operator)
        for mode, marker in (("forward", "o"), ("backward", "s"), ("forward + backward", "^")):
            axes.plot([], [], marker, color="none", markeredgecolor=INK, label=mode)
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s", xlim=(low, high))
        axes.set_ylim(0.7 * min(row["tflops"] for row in ours), 1.25 * matmul)
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            marks = [step * 10.0**k for k in range(-4, 6) for step in (1, 2, 5)]
            marks = [mark for mark in marks if limits[0] <= mark <= limits[1]]
            axis.set_ticks(marks, [f"{mark:g}" for mark in marks])
            axis.set_minor_locator(NullLocator())
        legend_below([axes], columns=3)


def plot_best(path: Path, best: Rows, environment: Mapping[str, Any]) -> None:
    """Our time against the fastest accurate peer's, one bar a case; left of 1 is a loss."""
    table = [row for row in best if row["ours is faster by"]]
    if not table:
        return
    note = f"forward and backward; {device_of(environment)}; peer's time / ours: right of 1x ours is faster"
    with canvas(path, "Against the fastest accurate peer", note, size=(9.6, 1.6 + 0.36 * len(table))) as (axes,):
        values = [row["ours is faster by"] for row in table]
        for i, (value, row) in enumerate(zip(values, table, strict=True)):
            axes.barh(i, value - 1, left=1, color=BLUE if value >= 1 else ORANGE, height=0.6)
            axes.text(1.015, i, f"{value:.2f}x  {row['best peer']}", va="center", fontsize=9.5,
                      transform=axes.get_yaxis_transform())  # fmt: skip
        axes.axvline(1, color=INK, linewidth=1)
        widest = 1.06 * max(1.2, *(max(value, 1 / value) for value in values))
        ratio_axis(axes.xaxis, (1 / widest, widest))
        axes.set_yticks(range(len(table)), [f"{row['operator']}  {row['case']}" for row in table])
        axes.set_ylim(len(table) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x")
        axes.tick_params(axis="y", labelsize=9.5, length=0)
