"""Figures of what concepts do: the NLL without some of them, with fewer, with more tokens each; and of the probes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..analysis.does import SURE, Does
from ..analysis.probes import Probe
from . import plot

WIDE = (6.4, 4.6)
ORDERS = {  # of Does.kept -> name, colour
    "nested": ("evenly over the text", plot.BLUE), "norm": ("largest norm first", plot.ORANGE),
    "attention": ("most tokens read first", plot.GREEN), "gradient": ("largest gradient first", plot.PURPLE),
}  # fmt: skip


def dropped_figure(found: Does, path: Path) -> None:
    """How much worse the model answers without each concept, with two standard errors."""
    increase = np.array([slot.increase for slot in found.slots])
    error = np.array([slot.error for slot in found.slots])
    sure = increase > SURE * error
    note = (
        f"{int(sure.sum())} of {len(increase)} are missed beyond two standard errors; functional rank "
        f"{found.figures['functional_rank']:.1f}; {found.view}, {found.num_targets:,} targets"
    )
    with plot.canvas(path, "What is lost without each concept?", note, size=WIDE) as (axes,):
        colours = [plot.BLUE if each else plot.GREY for each in sure]
        bars = SURE * np.where(np.isfinite(error), error, 0)
        axes.bar(range(len(increase)), increase, width=0.86, color=colours)
        axes.errorbar(range(len(increase)), increase, yerr=bars, fmt="none", ecolor=plot.INK, elinewidth=0.8)
        axes.axhline(0, color=plot.INK, linewidth=0.8)
        axes.set(xlabel="concept left out", ylabel="more nats per token", xlim=(-0.7, len(increase) - 0.3))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def kept_figure(found: Does, path: Path) -> None:
    """The NLL against the number of concepts kept: best first, and with the best left out."""
    nested = "trained for any first k" if found.is_nested else "not trained with fewer concepts"
    shown = [value for row in found.kept for name, value in row.items() if name != "kept" and value is not None]
    with plot.canvas(path, "How many concepts does it take?", f"{found.view}; {nested}", size=WIDE) as (axes,):
        for name, (label, colour) in ORDERS.items():
            rows = [row for row in found.kept if row.get(name) is not None]
            if not rows:
                continue
            axes.plot([row["kept"] for row in rows], [row[name] for row in rows], "o-", color=colour, markersize=4,
                      label=label)  # fmt: skip
            rows = [row for row in found.kept if row.get(f"{name} dropped") is not None]
            if rows:
                axes.plot([row["kept"] for row in rows], [row[f"{name} dropped"] for row in rows], "o:", color=colour,
                          markersize=3, linewidth=1.3, label=f"{label}, those left out")  # fmt: skip
        plot.level(axes, found.nll["other"], "all, but of another text", plot.GREY)
        plot.span(axes, [*shown, found.nll["other"]])
        counts = [int(row["kept"]) for row in found.kept]
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set(xlabel="concepts kept", ylabel="nats per token")
        plot.legend_below([axes], columns=2)


def ratio_figure(found: Does, path: Path) -> None:
    """The NLL against the number of tokens a concept stands for, beside that with another text's concepts."""
    kinds = (("shorter", "shorter texts", plot.BLUE), ("concepts", "another number of concepts", plot.ORANGE))
    note = f"{found.view}; dotted: the same from the concepts of another text"
    with plot.canvas(path, "How much can a concept hold?", note, size=WIDE) as (axes,):
        shown = []
        for name, label, colour in kinds:
            for key, style, text in ((name, "o-", label), (f"{name}_other", "o:", f"{label}, another text's")):
                rows = [row for row in found.ratios if row[key] is not None]
                if rows:
                    values = [row[key] for row in rows]
                    axes.plot([row["tokens_per_concept"] for row in rows], values, style, color=colour, markersize=4,
                              label=text)  # fmt: skip
                    shown += values
        if shown:
            plot.span(axes, shown)
        ratio_axis(axes, [row["tokens_per_concept"] for row in found.ratios])
        axes.set_ylabel("nats per token")
        plot.legend_below([axes], columns=2)


def ratio_axis(axes: Axes, ratios: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axes.minorticks_off()
    axes.set_xlabel("tokens a concept, N / C")


def probes_figure(found: Sequence[Probe], path: Path) -> None:
    """What a linear map reads off the concepts, beside its floors."""
    note = "held-out documents; share of the variance, of places the share found"
    kinds = (("this model", plot.BLUE), ("untrained", plot.ORANGE), ("answers shuffled", plot.GREY))
    with plot.canvas(path, "What can be read off the concepts?", note, size=(6.4, 4.4)) as (axes,):
        for i, (label, colour) in enumerate(kinds):
            values = [(probe.score, probe.untrained, probe.shuffled)[i] for probe in found]
            places = [k + 0.27 * (i - 1) for k in range(len(found))]
            if any(value is not None for value in values):
                axes.barh(places, [value if value is not None else 0 for value in values], height=0.25, color=colour,
                          label=label)  # fmt: skip
        axes.set_yticks(range(len(found)), [probe.name for probe in found])
        axes.invert_yaxis()
        axes.axvline(0, color=plot.INK, linewidth=0.8)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        axes.set_xlabel("share explained, or found")
        plot.legend_below([axes])
