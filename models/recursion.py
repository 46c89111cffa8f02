"""One layer applied K times, or L layers once each: how many, how far gradients flow, how much each still changes.

B sequences, C concepts, d model width, K iterations.
"""

import contextlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .config import ConceptConfig
from .encoder_layers import ConceptAngles, Tokens

SPREAD = 0.5  # of the logarithm of the rate of K


def draw_iterations(config: ConceptConfig, key: Sequence[int]) -> int | None:
    """K of one training step, a pure function of ``key``; None where the configuration does not want it drawn.

        K = min(1 + Poisson(rate), max_iterations),   rate ~ LogNormal of mean num_iterations - 1 and sigma 1/2

    K is ``num_iterations`` on average but for the cut. It is an argument of the forward pass, not drawn inside, since
    all ranks must take the same (their generators differ, and with ZeRO-3 they would wait for each other for ever),
    and a resumed run the same as an uninterrupted one: (seed of the run, step) is such a key.

    Source: Geiping et al. 2025, arXiv:2502.05171, section 3.3.
    """
    if config.iteration_sampling != "random":
        return None
    if config.iterations == 1:
        return 1
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(tuple(key))))
    rate = generator.lognormal(math.log(config.iterations - 1) - SPREAD**2 / 2, SPREAD)
    return min(1 + int(generator.poisson(rate)), config.max_iterations)


def apply_layers(
    layers: Sequence[nn.Module], c_BCd: Tensor, angles: ConceptAngles, tokens: Tokens, *,
    num_texts: int, num_frozen: int = 0, tolerance: float | None = None, with_changes: bool = False,
    watch: Callable[..., None] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Applies the layers one after the other.

    Args:
        num_texts: how many of the sequences count; a funnel leaves one more.
        num_frozen: how many of the first pass no gradient. What comes after them receives the gradient for the concepts
            and tokens that they started from, as if they had added a constant: learned concepts and embeddings are
            still trained (Jia et al. 2023, arXiv:2210.08990, call it bi-level optimisation).
        tolerance: stop after a layer that changed the concepts of every sequence by less than this. Synchronises.
        watch: called before each layer with all that it is given, see ``attention_maps.Watch``.

    Returns:
        The concepts [B, C, d] before each layer and after the last; with ``with_changes`` or ``tolerance`` for each
        layer |c' - c| / |c| [num_texts], without gradient.
    """
    start, start_tokens = c_BCd, tokens
    states, changes = [c_BCd], []
    for k, layer in enumerate(layers):
        if watch is not None:
            watch(layer, states[-1], angles, tokens)
        with torch.no_grad() if k < num_frozen else contextlib.nullcontext():
            c_BCd, tokens = layer(states[-1], angles, tokens, is_last=k == len(layers) - 1)
        if k == num_frozen - 1:
            c_BCd = pass_gradient(start, c_BCd)
            passed = pass_gradient(start_tokens.states, tokens.states)
            tokens = tokens._replace(states=passed, keys_values=None)  # those made so far pass no gradient
        if with_changes or tolerance is not None:
            changes.append(change(states[-1][:num_texts], c_BCd[:num_texts]))
        states.append(c_BCd)
        if tolerance is not None and bool((changes[-1] < tolerance).all()):
            break
    return states, changes


def pass_gradient(start: Tensor, end: Tensor) -> Tensor:
    """end, with the gradient going to start."""
    return end if end is start else end.detach() + (start - start.detach())


@torch.no_grad()
def change(before_BCd: Tensor, after_BCd: Tensor) -> Tensor:
    """[B] float32: |after - before| / |before| over all concepts of a sequence."""
    before, after = before_BCd.float(), after_BCd.float()
    size = torch.linalg.vector_norm(before, dim=(1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.linalg.vector_norm(after - before, dim=(1, 2)) / size
