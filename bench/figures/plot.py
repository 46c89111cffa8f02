"""One look for every figure: drawn off screen, titled at the left, few lines, units on every axis."""

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...engine.files import write_bytes

BLUE, ORANGE, GREEN, PURPLE, GREY, INK = "#2364aa", "#d1632a", "#2f855a", "#7b4fa3", "#8b929c", "#22262b"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, GREY)  # told apart in print and by the colour-blind
DIVERGING = "RdBu_r"

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
    """Axes to draw in; written to ``path`` (.png or .svg) at the end. ``note`` is a line in grey under the title."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        top = 1 - (0.62 if note else 0.40) / size[1]
        figure.get_layout_engine().set(rect=(0, 0, 1, top), w_pad=0.08, h_pad=0.06)
        axes = figure.subplots(1, columns, squeeze=False, width_ratios=widths)[0]
        yield list(axes)
        left = 0.08 / size[0]
        figure.text(left, 1 - 0.10 / size[1], title, fontsize=13, fontweight="bold", va="top")
        figure.text(left, 1 - 0.38 / size[1], note, fontsize=9.5, color="#5b636e", va="top")
        content = io.BytesIO()
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(content, format=path.suffix[1:], dpi=200, metadata=metadata)
    write_bytes(path, content.getvalue())


def level(axes: Axes, value: float, label: str, color: str = GREY) -> None:
    """A dashed line over the whole width, named in the legend, where it collides with nothing."""
    axes.axhline(value, color=color, linewidth=1.4, linestyle=(0, (5, 3)), zorder=1.5, label=label)


def name_point(axes: Axes, x: float, y: float, text: str, color: str = INK, *, below: bool = True) -> None:
    """Text under or over a point, readable on top of lines."""
    axes.annotate(
        text, (x, y), xytext=(0, -8 if below else 8), textcoords="offset points", ha="center",
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
    if unit == "ms" and len(inside) < 3:
        marks = [step * mark for mark in marks for step in (1, 2, 5)]
        inside = [mark for mark in marks if low <= mark <= high]
    axes.set_yticks(inside, [in_units(mark, unit) for mark in inside])
    axes.minorticks_off()


def length_axis(axes: Axes, lengths: Iterable[int]) -> None:
    """A logarithmic axis of text lengths, each marked as people say it: 512, 1K, 16K."""
    marks = sorted(set(lengths))
    axes.set_xscale("log", base=2)
    axes.set_xticks(marks, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in marks])
    axes.minorticks_off()
    axes.set_xlabel("N, tokens of a text")
