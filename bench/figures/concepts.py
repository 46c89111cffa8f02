"""Figures of single concepts: what each reads, and which of them are alike.

C concepts, N tokens of a text.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor

from ..analysis.geometry import metrics
from ..analysis.reads import Reads
from . import plot

WIDE = (6.4, 4.4)


def reading_figure(found: Reads, path: Path) -> None:
    """The attention map of the pictured text: what each concept reads, mean over the heads of the last layer."""
    weights = found.picture.weights
    scaled = weights / weights.max(1, keepdims=True).clip(1e-30)
    note = f"one text of {weights.shape[1]} tokens, last layer, mean over heads; dark: the concept's strongest token"
    with plot.canvas(path, "What each concept reads", note, size=WIDE) as (axes,):
        axes.imshow(scaled, cmap="Blues", aspect="auto", interpolation="nearest", vmin=0, vmax=1)
        axes.grid(False)
        axes.set(xlabel="token", ylabel="concept")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))


def usage_figure(found: Reads, path: Path) -> None:
    """How the tokens are shared out: the share that each concept reads more than any other does."""
    usage = 100 * np.array([slot.usage for slot in found.slots])
    C = len(usage)
    note = (
        f"{found.num_tokens:,} tokens of {found.num_texts} texts; as if {found.figures['usage_perplexity']:.1f} of {C} "
        "shared them evenly"
    )
    with plot.canvas(path, "Which concepts read the text?", note, size=WIDE) as (axes,):
        axes.bar(range(C), usage, width=0.86, color=plot.BLUE)
        plot.level(axes, 100 / C, f"all alike: {100 / C:.3g} %", plot.INK, (0, (1, 3)))
        axes.set(xlabel="concept", ylabel="tokens that it reads most (%)", xlim=(-0.7, C - 0.3))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        plot.legend_below([axes])


def cluster_order(concepts: Tensor) -> list[int]:
    """The concepts of [B, C, d] in an order in which those that are alike stand side by side.

    Average linkage over 1 - cosine, mean over the texts; leaves ordered optimally (Bar-Joseph et al. 2001).
    """
    distance = (1 - metrics.cosines(concepts).mean(0)).clamp_min(0)
    distance = ((distance + distance.T) / 2).fill_diagonal_(0).numpy()
    if len(distance) < 3:
        return list(range(len(distance)))
    flat = squareform(distance, checks=False)
    return hierarchy.leaves_list(hierarchy.optimal_leaf_ordering(hierarchy.linkage(flat, "average"), flat)).tolist()


def clusters_figure(concepts: Tensor, path: Path) -> None:
    """Cosines of the concepts of a text, mean over the texts, with those that are alike side by side."""
    order = torch.tensor(cluster_order(concepts))
    gram = metrics.cosines(concepts).mean(0)[order][:, order]
    note = f"{len(order)} concepts, mean over {len(concepts)} held-out texts; 1: copies, 0: unrelated"
    with plot.canvas(path, "Which concepts are alike?", note, size=(5.8, 5.2)) as (axes,):
        image = axes.imshow(gram.numpy(), cmap=plot.DIVERGING, vmin=-1, vmax=1, interpolation="nearest")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        places = np.unique(np.linspace(0, len(order) - 1, min(len(order), 9)).round().astype(int))
        names = [str(int(order[place])) for place in places]
        axes.set_xticks(places, names)
        axes.set_yticks(places, names)
        axes.set(xlabel="concept, ordered by cluster", ylabel="concept")
        bar = axes.figure.colorbar(image, ax=axes, shrink=0.85, aspect=28, ticks=[-1, -0.5, 0, 0.5, 1])
        bar.outline.set_visible(False)
