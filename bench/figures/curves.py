"""Figures of a training run: its loss, and what it makes of text that it has not seen."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import plot


def loss_figure(
    history: Sequence[Mapping[str, Any]], path: Path, note: str = "", *,
    unigram_entropy: float | None = None, smoothing_floor: float = 0.0,
) -> None:  # fmt: skip
    """The training loss of every step, its running median, and the held-out NLL at each evaluation.

    ``history``: the lines of metrics.jsonl; ``smoothing_floor``: the smallest training loss under label smoothing.
    """
    train = [(line["step"], line["loss"]) for line in history if line["kind"] == "train" and line["loss"] is not None]
    evals = [line for line in history if line["kind"] == "eval"]
    unseen = [(line["step"], line["nll_unseen"]) for line in evals if line.get("nll_unseen") is not None]
    seen = [(line["step"], line["nll_seen"]) for line in evals if line.get("nll_seen") is not None]
    with plot.canvas(path, "Training", note, size=(7.6, 4.8)) as (axes,):
        shown: list[float] = []
        if train:
            steps, losses = (np.array(column, dtype=float) for column in zip(*train, strict=True))
            smooth = running_median(losses)
            axes.plot(steps, losses, color=plot.GREY, linewidth=0.7, alpha=0.45)
            floor = f", at least {smoothing_floor:.2f} for its label smoothing" if smoothing_floor else ""
            axes.plot(steps, smooth, color=plot.GREY, label=f"training loss (thin: each step){floor}")
            shown += [*smooth, *np.quantile(losses, [0.01, 0.99])]
        for points, color, marker, name in ((unseen, plot.BLUE, "o", "did not see"), (seen, plot.ORANGE, "s", "saw")):
            if points:
                label = f"held-out text, tokens the encoder {name}: {points[-1][1]:.2f}"
                axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=5, label=label)
                shown += [value for _, value in points]
        if unigram_entropy is not None and unseen:
            label = f"unigram entropy of the held-out text: {unigram_entropy:.2f}"
            plot.level(axes, unigram_entropy, label, plot.GREEN)
            shown.append(unigram_entropy)
        axes.set(xlabel="step", ylabel="nats per token")
        if shown:
            plot.span(axes, shown)
        axes.margins(x=0.02)
        plot.thousands(axes)
        plot.legend_below([axes], columns=1)


def running_median(values: np.ndarray) -> np.ndarray:
    """Median over a window of 2 % of the values (at least 5) around each."""
    half = max(2, len(values) // 100)
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def nll_figure(
    by_view: Mapping[str, float], levels: Mapping[str, float], path: Path, note: str = "", *, is_seen: bool = False,
) -> None:  # fmt: skip
    """Held-out nats per token against the share of the text that is hidden.

    ``by_view``: names such as "t=0.30" or "mask=0.15" -> NLL; ``levels``: name -> nats per token of predictors that do
    without the text.
    """
    points = sorted((100 * float(name.split("=")[1]), value) for name, value in by_view.items() if value is not None)
    color = plot.ORANGE if is_seen else plot.BLUE
    verb = "copied" if is_seen else "predicted"
    with plot.canvas(path, f"How well is held-out text {verb}?", note, size=(7.6, 4.8)) as (axes,):
        shares, values = zip(*points, strict=True)
        label = "this model, copying" if is_seen else "this model"
        axes.plot(shares, values, color=color, marker="o", markersize=6, label=label)
        styles = ((plot.GREEN, (0, (5, 3))), (plot.PURPLE, (0, (1, 1.5))), (plot.INK, (0, (5, 1, 1, 1))))
        for (name, value), (shade, style) in zip(levels.items(), styles, strict=False):
            plot.level(axes, value, f"{name}: {value:.2f}", shade, style)
        plot.span(axes, [*values, *levels.values()])
        plot.name_points(axes, points, levels.values(), color)
        what = "asked for" if is_seen else "hidden"
        axes.set(xlabel=f"share of the text that is {what} (%)", ylabel="nats per token")
        axes.set(xlim=(0, 1.06 * max(shares)))
        plot.legend_below([axes], columns=1)
