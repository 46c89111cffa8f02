"""Figures of the concepts: how alike they are, and how many directions they use."""

from pathlib import Path

import torch
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
    note = f"{num_concepts} concepts, {num_texts} held-out texts; 0: unrelated, 1: copies"
    with plot.canvas(path, "How alike are the concepts?", note, size=(9.2, 4.5), columns=2, widths=[1.12, 1]) as axes:
        image = axes[0].imshow(mean.numpy(), cmap=plot.DIVERGING, vmin=-1, vmax=1, interpolation="nearest")
        axes[0].grid(False)
        axes[0].set(xlabel="concept", ylabel="concept", title="cosine, mean over texts")
        axes[0].spines[:].set_visible(False)
        bar = axes[0].figure.colorbar(image, ax=axes[0], shrink=0.85, aspect=28, ticks=[-1, -0.5, 0, 0.5, 1])
        bar.outline.set_visible(False)
        values = gram[:, off].flatten().numpy()
        axes[1].hist(values, bins=81, range=(-1, 1), color=plot.BLUE, weights=[100 / len(values)] * len(values))
        axes[1].set(xlim=(-1.02, 1.02), xlabel="cosine of two concepts of one text", title="all pairs")
        axes[1].set_ylabel("share of pairs (%)")
        lines = [
            f"mean |cos|  {numbers['similarity_mean']:.3f}",
            f"largest  {numbers['similarity_max']:.3f}",
            f"pairs above {metrics.DUPLICATE_COSINE}  {numbers['duplicate_pairs_per_text']:.1f} a text",
        ]
        left = values.mean() > -0.1  # the emptier side
        axes[1].text(
            0.02 if left else 0.98, 0.97, "\n".join(lines), transform=axes[1].transAxes, va="top",
            ha="left" if left else "right", fontsize=9.5, linespacing=1.5,
        )  # fmt: skip
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
    note = f"{num_directions} directions at most; a flat line would use them all equally"
    with plot.canvas(path, "How many directions do the concepts use?", note) as (axes,):
        index = torch.arange(1, num_directions + 1)
        for (name, values, ranks), color in zip(curves, (plot.GREY, plot.ORANGE, plot.BLUE), strict=True):
            total = values.sum(-1, keepdim=True)
            share = 100 * torch.where(total > 0, values / total.clamp_min(1e-300), 0).mean(0)
            axes.plot(index, share, color=color, label=f"{name}: entropy rank {float(ranks.mean()):.1f}")
        axes.axhline(100 / num_directions, color=plot.GREY, linewidth=1, linestyle=(0, (1, 3)))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set(xlabel="direction, strongest first", ylabel="share of the singular values (%)")
        axes.set(xlim=(1, num_directions), ylim=(None, 100))
        axes.legend(loc="upper right")
