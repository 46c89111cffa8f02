"""How the layers of a model run in training: what they keep for the backward pass, and whether they are compiled."""

import torch
from torch import nn

from . import compat
from .backbone import checkpoint_activations
from .compiled import check_compiler, compile_layers
from .recipe.schema import Train


def set_up(network: nn.Module, train: Train, device: torch.device) -> None:
    """``network``: any model with a ``ConceptEncoder`` under ``encoder``, before ZeRO has it.

    Compiled layers are given whole keys and values, since what streams tokens in chunks is no graph.

    Raises:
        InputError: ``train.keep``, ``checkpoint_backbone`` or ``compile`` ask for what this model or machine cannot do.
    """
    if train.checkpoint_backbone:
        checkpoint_activations(network)
    network.encoder.keep = "keys" if train.compile else train.keep
    if train.recompute:
        compat.recompute_layers(network)
    if train.compile:
        check_compiler(device.type)
        compile_layers(network)
