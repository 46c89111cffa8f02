"""One look for every figure: drawn off screen, titled at the left, every line named under the axes, units on each axis.

An axis spans what is drawn on it, and starts at 0 only under bars. Names stand under the axes and not in them, where
they would lie on a line.
"""

import io
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...engine.files import write_bytes
from ..measure.exponents import in_tokens

BLUE, ORANGE, GREEN, PURPLE, GREY, INK = "#0f4cc8", "#c9771a", "#1f7a48", "#8c2289", "#878d96", "#22262b"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, GREY, INK)  # told apart by the colour-blind: tests/bench/figures
DIVERGING = "RdBu_r"
SUFFIXES = ("png", "svg")  # of every figure

STYLE = {
    "font.family": "DejaVu Sans",  # matplotlib brings it along
    "font.size": 10.5,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "conceptron",  # the same figure gives the same file
}


@contextmanager
def canvas(
    path: Path, title: str, note: str = "", *, size: tuple[float, float] = (7.6, 4.3), columns: int = 1,
    widths: list[float] | None = None,
) -> Iterator[list[Axes]]:  # fmt: skip
    """Axes to draw in; written to ``path`` as PNG and as SVG at the end. ``note``: in grey under the title."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        lines = [line for part in note.splitlines() for line in textwrap.wrap(part, int(12.5 * size[0]))]
        top = 1 - (0.40 + 0.20 * len(lines)) / size[1]
        figure.get_layout_engine().set(rect=(0, 0, 1, top), w_pad=0.08, h_pad=0.06)
        axes = figure.subplots(1, columns, squeeze=False, width_ratios=widths)[0]
        yield list(axes)
        left = 0.08 / size[0]
        figure.text(left, 1 - 0.10 / size[1], title, fontsize=13, fontweight="bold", va="top")
        said = {"fontsize": 9.5, "color": "#5b636e", "va": "top", "linespacing": 1.4}
        figure.text(left, 1 - 0.38 / size[1], "\n".join(lines), **said)
        for suffix in SUFFIXES:
            content = io.BytesIO()
            figure.savefig(content, format=suffix, dpi=200, metadata={"Date": None} if suffix == "svg" else {})
            write_bytes(path.with_suffix(f".{suffix}"), content.getvalue())


def legend_below(panels: Sequence[Axes], columns: int | None = None) -> None:
    """One legend for all panels, under them."""
    found = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if found:
        figure = panels[0].figure
        room = 10.5 * figure.get_figwidth() / (8 + max(map(len, found)))  # columns that are as wide as the longest name
        fitting = max(1, min(len(found), int(room)))
        rows = -(-len(found) // fitting)
        figure.legend(
            found.values(), found, fontsize=9.5, loc="outside lower center", handlelength=3.4,
            ncols=columns or -(-len(found) // rows),
        )  # fmt: skip


def span(axes: Axes, values: Iterable[float], least: float = 0.1) -> None:
    """A linear y axis over these values and a margin; values that hardly differ get a span of ``least``."""
    low, high = min(values := list(values)), max(values)
    margin = max(0.10 * (high - low), (least - (high - low)) / 2)
    axes.set_ylim(low - margin, high + margin)


def level(axes: Axes, value: float, label: str, color: str = GREY, style: tuple = (0, (5, 3))) -> None:
    """A broken line over the whole width, named in the legend."""
    axes.axhline(value, color=color, linewidth=1.4, linestyle=style, zorder=1.5, label=label)


def name_points(axes: Axes, points: Sequence[tuple[float, float]], levels: Iterable[float], color: str) -> None:
    """The value of each point over it, or under it where a level line would run through the text; limits are set."""
    low, high = axes.get_ylim()
    text_height = 0.085 * (high - low)
    levels = [*levels, high + 0.4 * text_height]  # nor over the edge
    for x, y in points:
        below = any(0 < level - y < 1.6 * text_height for level in levels)
        below = below and not any(0 < y - level < 1.6 * text_height for level in levels)
        axes.annotate(
            f"{y:.2f}", (x, y), xytext=(0, -8 if below else 8), textcoords="offset points", ha="center",
            va="top" if below else "bottom", fontsize=9.5, color=color, zorder=5,
            path_effects=[patheffects.withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip


def thousands(axes: Axes, axis: str = "x") -> None:
    """Ticks 1,000 apart read 1,000 and not 1000."""
    which = axes.xaxis if axis == "x" else axes.yaxis
    which.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))


UNITS = {"ms": ((1e3, "s"), (1.0, "ms"), (1e-3, "µs")), "bytes": ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))}


def in_units(value: float, unit: str) -> str:
    """1500 "ms" -> 1.5 s; 2^20 "bytes" -> 1 MiB."""
    size, name = next(((size, name) for size, name in UNITS[unit] if value >= 0.999 * size), UNITS[unit][-1])
    return f"{value / size:,.3g} {name}"


def unit_axis(axes: Axes, unit: str) -> None:
    """A logarithmic y axis of "ms" or "bytes" whose marks read as people say them: 10 ms, 1 s, 100 MiB, 1 GiB."""
    axes.set_yscale("log", base=10 if unit == "ms" else 2)
    low, high = axes.get_ylim()
    marks = [10.0**k for k in range(-4, 9)] if unit == "ms" else [4.0**k for k in range(5, 24)]
    inside = [mark for mark in marks if low <= mark <= high]
    if len(inside) < 3:
        marks = [step * mark for mark in marks for step in ((1, 2, 5) if unit == "ms" else (1, 2))]
        inside = [mark for mark in marks if low <= mark <= high]
    axes.set_yticks(inside, [in_units(mark, unit) for mark in inside])
    axes.minorticks_off()


def length_axis(axes: Axes, lengths: Iterable[int]) -> None:
    """A logarithmic axis of text lengths, each marked as people say it: 512, 1K, 16K."""
    marks = sorted(set(lengths))
    marks = marks[:: -1][:: -(-len(marks) // 8)]  # more would touch; the longest is marked
    axes.set_xscale("log", base=2)
    axes.set_xticks(marks, [in_tokens(n) for n in marks])
    axes.minorticks_off()
    axes.set_xlabel("N, tokens of a text")
