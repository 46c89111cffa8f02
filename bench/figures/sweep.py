"""The figure of a sweep over computation at test time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ..measure.timing import Timing
from . import plot

KINDS = {"K": ("iterations K", plot.BLUE), "C": ("concepts C that the decoder gets", plot.ORANGE)}


def sweep_figure(rows: Sequence[Mapping[str, Any]], path: Path, name: str) -> None:
    """Quality, convergence and time against K and C, one panel each; the trained K or C is ringed.

    ``rows``: of ``bench compute``.
    """
    kinds = [kind for kind in KINDS if any(row["what"] == kind for row in rows)]
    with plot.canvas(path, "What does more computation buy?", f"{name}; ringed: as it was trained",
                     size=(10.8, 4.6), columns=3) as (quality, change, time):  # fmt: skip
        for kind in kinds:
            label, colour = KINDS[kind]
            mine = [row for row in rows if row["what"] == kind]
            draw(quality, mine, "nll", colour, label)
            draw(quality, mine, "nll_other", colour, f"{label}, another text's", ":")
            draw(change, [row for row in mine if row["change"] is not None], "change", colour, None)
            timed = [{**row, "ms": row["ms"].median_ms} for row in mine if isinstance(row["ms"], Timing)]
            draw(time, timed, "ms", colour, None)
        titles = ("nats per token", "last iteration's change of the concepts", "encoding (K) or answering (C), ms")
        values = sorted({row["value"] for row in rows})
        for axes, title in zip((quality, change, time), titles, strict=True):
            axes.set_title(title, fontsize=10.5)
            axes.set_xscale("log", base=2)
            axes.set_xticks(values, [str(value) for value in values], fontsize=8.5)
            axes.minorticks_off()
            axes.set_xlabel(" or ".join(KINDS[kind][0].split()[0] + f" {kind}" for kind in kinds))
        time.set_ylim(bottom=0)
        plot.legend_below([quality], columns=2)


def draw(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, colour: str, label: str | None,
         style: str = "-") -> None:  # fmt: skip
    axes.plot([row["value"] for row in rows], [row[key] for row in rows], style, marker="o", markersize=4, color=colour,
              label=label)  # fmt: skip
    for row in rows:
        if row["value"] == row["trained"]:
            axes.plot([row["value"]], [row[key]], "o", markersize=10, markerfacecolor="none", color=colour)
