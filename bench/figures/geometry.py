"""Figures of the concepts: how alike they are, and how many directions they use."""

import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..analysis.geometry import metrics
from . import plot


def similarity_figure(concepts: Tensor, path: Path) -> None:
    """Cosines of the concepts of one text, averaged over the texts: a map, and all of them as a histogram.

    concepts [B, C, d].
    """
    gram = metrics.cosines(concepts)
    mean = gram.mean(0)
    num_texts, num_concepts = gram.shape[:2]
    off = ~torch.eye(num_concepts, dtype=torch.bool)
    numbers = metrics.similarity(concepts)
    note = (
        f"{num_concepts} concepts, {num_texts} held-out texts; 0: unrelated, 1: copies\n"
        f"mean of |cosine| {numbers['similarity_mean']:.3f}; largest cosine {numbers['similarity_max']:.3f}; "
        f"pairs of a text above {metrics.DUPLICATE_COSINE}: {numbers['duplicate_pairs_per_text']:.1f}"
    )
    with plot.canvas(path, "How alike are the concepts?", note, size=(9.2, 4.7), columns=2, widths=[1.12, 1]) as axes:
        image = axes[0].imshow(mean.numpy(), cmap=plot.DIVERGING, vmin=-1, vmax=1, interpolation="nearest")
        axes[0].grid(False)
        axes[0].set(xlabel="concept", ylabel="concept", title="cosine, mean over texts")
        for axis in (axes[0].xaxis, axes[0].yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))
        axes[0].spines[:].set_visible(False)
        bar = axes[0].figure.colorbar(image, ax=axes[0], shrink=0.85, aspect=28, ticks=[-1, -0.5, 0, 0.5, 1])
        bar.outline.set_visible(False)
        values = gram[:, off].flatten().numpy()
        low = max(-1.0, math.floor(4 * min(0.0, float(values.min()))) / 4)
        shares, edges = np.histogram(values, bins=60, range=(low, 1))
        axes[1].stairs(100 * shares / len(values), edges, fill=True, color=plot.BLUE)
        axes[1].set(xlim=(low, 1), xlabel="cosine of two concepts of one text", title="all pairs of all texts")
        axes[1].set_ylabel("share of pairs (%)")
        for each in axes:
            each.title.set_fontsize(10.5)


def spectrum_figure(concepts: Tensor, path: Path) -> None:
    """Shares of the singular values of the mean concepts, of the concepts of a text, and of what depends on the text.

    concepts [B, C, d].
    """
    mean = metrics.prototypes(concepts)
    dynamic = metrics.input_dependent(concepts)
    curves = [
        ("the same for every text (mean)", metrics.singular_values(mean)[None], metrics.entropy_rank(mean)[None]),
        ("of one text", metrics.singular_values(concepts), metrics.entropy_rank(concepts)),
        ("what the text changes", metrics.singular_values(dynamic), metrics.entropy_rank(dynamic)),
    ]
    num_directions = min(mean.shape)
    even = 100 / num_directions
    note = f"{num_directions} directions at most; entropy rank: how many directions an even spectrum of it would have"
    with plot.canvas(path, "How many directions do the concepts use?", note, size=(7.6, 5.0)) as (axes,):
        index = torch.arange(1, num_directions + 1)
        looks = ((plot.GREY, (0, (5, 2))), (plot.ORANGE, (0, (3, 1, 1, 1))), (plot.BLUE, "-"))
        shown = [even]
        for (name, values, ranks), (color, style) in zip(curves, looks, strict=True):
            total = values.sum(-1, keepdim=True)
            share = 100 * torch.where(total > 0, values / total.clamp_min(1e-300), 0).mean(0)
            label = f"{name}: entropy rank {float(ranks.mean()):.1f}"
            axes.plot(index, share, color=color, linestyle=style, label=label)
            shown += share.tolist()
        plot.level(axes, even, f"all directions alike: {even:.3g} %", plot.INK, (0, (1, 3)))
        axes.set_yscale("log")
        low = max(min(value for value in shown if value > 0), 1e-3 * even)  # what is below is rounding
        axes.set_ylim(low / 1.25, min(100.0, 1.25 * max(shown)))
        marks = [step * 10.0**k for k in range(-4, 3) for step in (1, 2, 5)]
        if axes.get_ylim()[1] / axes.get_ylim()[0] > 300:
            marks = [10.0**k for k in range(-4, 3)]
        marks = [mark for mark in marks if axes.get_ylim()[0] <= mark <= axes.get_ylim()[1]]
        axes.set_yticks(marks, [f"{mark:g} %" for mark in marks])
        axes.minorticks_off()
        axes.set(xlabel="direction, strongest first", ylabel="share of the singular values")
        axes.set_xlim(1, max(num_directions, 2))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        plot.legend_below([axes], columns=1)
