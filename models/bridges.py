"""Fewer layers of a pretrained module: which of them, and linear maps in the place of the others. No label is used.

R rows of all windows, special tokens included, e width of states.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Backbone, keep_layers
from .backbone_config import LAYERS
from .packing import Packed

RIDGE = 1e-2  # beside the mean variance of what comes in


@torch.no_grad()
def choose_layers(whole: Backbone, count: int, packed: Packed) -> list[int]:
    """The ``count`` layers of a module with all of its own that stand best for it, in order.

    The first and the last stay. Of those between, one goes at a time: the one without which the mean states of texts
    turn least, by the mean of 1 - cos over texts. (Removal of layers by the change of the output: Men et al. 2024,
    arXiv:2403.03853, who look at each layer alone.)

    Raises:
        ValueError: count is not 1 to the number of layers.
    """
    kept = list(range(len(whole.layers)))
    if not 1 <= count <= len(kept):
        raise ValueError(f"count: expected 1 to {len(kept)} layers, got {count}")
    if count == 1:
        return kept[-1:]
    expected = text_means(whole, packed)

    def turned(numbers: list[int]) -> float:
        with only(whole, numbers):
            return float((1 - F.cosine_similarity(text_means(whole, packed), expected)).mean())

    while len(kept) > count:
        kept.remove(min(kept[1:-1], key=lambda number: turned([i for i in kept if i != number])))
    return kept


def text_means(backbone: Backbone, packed: Packed) -> Tensor:
    """[B, e], of texts that have a token each."""
    states_Te = backbone(packed).float()
    means = [part.mean(0) for part in states_Te.split(packed.cu_seqlens.diff().tolist())]
    return torch.stack(means)


@contextmanager
def only(whole: Backbone, numbers: Sequence[int]) -> Iterator[None]:
    """Inside, the module has these of its layers."""
    model, inner = whole.model, whole.model.config
    parent, _, name = LAYERS[inner.model_type].rpartition(".")
    before = whole.layers, inner.num_hidden_layers, getattr(inner, "layer_types", None)
    keep_layers(model, list(numbers))
    try:
        yield
    finally:
        layers, inner.num_hidden_layers, types = before
        setattr(model.get_submodule(parent), name, layers)
        if types:
            inner.layer_types = types


@torch.no_grad()
def fit_bridges(backbone: Backbone, whole: Backbone, numbers: Sequence[int], packed: Packed) -> None:
    """Fits every bridge of a backbone that has the layers ``numbers`` of ``whole``, in order, by ridge regression: from
    what comes to it, the bridges before it in place, to what comes into that layer of the whole module."""
    places = [i for i, layer in enumerate(backbone.layers) if hasattr(layer, "bridge")]
    wanted = inputs_of(whole, [whole.layers[numbers[i]] for i in places], packed)
    for i, target_Re in zip(places, wanted, strict=True):
        layer = backbone.layers[i]
        (given_Re,) = inputs_of(backbone, [layer], packed)
        given, change = given_Re.double(), (target_Re - given_Re).double()
        given_mean, change_mean = given.mean(0), change.mean(0)
        given, change = given - given_mean, change - change_mean
        products = given.T @ given
        products.diagonal().add_(RIDGE * products.diagonal().mean())
        map_ee = torch.linalg.solve(products, given.T @ change)
        layer.bridge.weight.copy_(map_ee.T)
        layer.bridge.bias.copy_(change_mean - given_mean @ map_ee)


def inputs_of(backbone: Backbone, layers: Sequence[nn.Module], packed: Packed) -> list[Tensor]:
    """[R, e] what comes into each of these layers, before its bridge."""
    found: list[list[Tensor]] = [[] for _ in layers]
    masks: list[Tensor | None] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict, store: list[Tensor]) -> None:
        store.append(args[0] if args else kwargs["hidden_states"])

    handles = [
        backbone.model.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    ]
    for layer, store in zip(layers, found, strict=True):
        handles.append(
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, store=store: keep(module, args, kwargs, store),
                with_kwargs=True, prepend=True,
            )
        )  # fmt: skip
    try:
        backbone(packed)
    finally:
        for handle in handles:
            handle.remove()
    return [
        torch.cat([x.flatten(0, 1) if mask is None else x[mask.bool()] for x, mask in zip(store, masks, strict=True)])
        for store in found
    ]
