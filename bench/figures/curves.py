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
    with plot.canvas(path, "Training", note) as (axes,):
        if train:
            steps, losses = (np.array(column, dtype=float) for column in zip(*train, strict=True))
            axes.plot(steps, losses, color=plot.GREY, linewidth=0.7, alpha=0.45)
            axes.plot(steps, running_median(losses), color=plot.GREY, label="training loss (thin: each step)")
        for points, color, name in ((unseen, plot.BLUE, "did not see"), (seen, plot.ORANGE, "saw")):
            if points:
                label = f"held-out text, tokens the encoder {name}"
                axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=5, label=label)
        if unigram_entropy is not None and unseen:
            label = f"unigram entropy of the held-out text: {unigram_entropy:.2f}"
            plot.level(axes, unigram_entropy, label, plot.GREEN)
        if smoothing_floor:
            plot.level(axes, smoothing_floor, f"floor of the smoothed training loss: {smoothing_floor:.2f}")
        axes.set(xlabel="step", ylabel="nats per token")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.02)
        plot.thousands(axes)
        axes.legend(loc="best")


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
    with plot.canvas(path, f"How well is held-out text {verb}?", note) as (axes,):
        shares, values = zip(*points, strict=True)
        label = "this model, copying" if is_seen else "this model"
        axes.plot(shares, values, color=color, marker="o", markersize=6, label=label)
        top = max([*values, *levels.values()])
        for share, value in points:
            plot.name_point(axes, share, value, f"{value:.2f}", color, below=value > 0.15 * top)
        for (name, value), shade in zip(levels.items(), (plot.GREEN, plot.PURPLE, plot.GREY), strict=False):
            plot.level(axes, value, f"{name}: {value:.2f}", shade)
        what = "asked for" if is_seen else "hidden"
        axes.set(xlabel=f"share of the text that is {what} (%)", ylabel="nats per token")
        axes.set(xlim=(0, 1.06 * max(shares)), ylim=(0, top * 1.12))
        if levels:
            axes.legend(loc="best")
