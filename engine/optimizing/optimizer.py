"""AdamW, or Muon beside it, and which parameters decay."""

import torch
from torch import nn

from ...models.queries import ConceptQueries
from ..recipe.schema import Optim
from .muon import build_muon

NO_DECAY = (nn.Embedding, ConceptQueries)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; biases, norms, embeddings (and what is tied to them) and the learned concepts do not."""
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, NO_DECAY)
        for parameter in module.parameters(recurse=False)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decay = [parameter for parameter in trained if parameter.ndim >= 2 and id(parameter) not in embeddings]
    rest = [parameter for parameter in trained if parameter.ndim < 2 or id(parameter) in embeddings]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, recipe: Optim) -> torch.optim.Optimizer:
    groups = parameter_groups(model, recipe.weight_decay)
    if recipe.muon is not None:
        return build_muon(model, groups, recipe)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)
