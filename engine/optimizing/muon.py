"""Muon for the matrices of layers, AdamW for everything else; gradient norms of both, since Muon hides its own.

DeepSpeed orthogonalises gradients where ZeRO has them whole. The norm that it reports then is of orthogonal updates, as
large as the square root of their rank, and clipping by it would slow AdamW down. So its clipping is off; here is ours.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ...models.decoder import ConceptDecoder
from ...models.encoder import ConceptEncoder
from .. import compat
from ..launching.launch import World
from ..recipe.schema import Optim


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights of linear maps inside the encoder, its backbone and the decoder, that are trained: no embeddings, no
    heads, no learned concepts, nothing of one dimension."""
    parts = [part for part in model.modules() if isinstance(part, ConceptEncoder | ConceptDecoder)]
    found = {
        id(module.weight): module.weight
        for part in parts for module in part.modules() if isinstance(module, nn.Linear) and module.weight.requires_grad
    }  # fmt: skip
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [weight for key, weight in found.items() if key not in embeddings]


def build_muon(model: nn.Module, groups: list[dict[str, Any]], recipe: Optim) -> torch.optim.Optimizer:
    """``groups``: of AdamW, with all parameters; the matrices leave them. The rate of matrices follows the schedule of
    the others, ``lr_ratio`` times theirs (`schedule.py`)."""
    matrices = hidden_matrices(model)
    by_muon = {id(weight) for weight in matrices}
    for parameter in model.parameters():
        parameter.use_muon = id(parameter) in by_muon  # where DeepSpeed looks
    adam = [{**group, "params": [p for p in group["params"] if id(p) not in by_muon]} for group in groups]
    options = {"lr": recipe.lr, "betas": recipe.betas, "eps": recipe.eps, "use_muon": False}
    muon = {
        "params": matrices, "use_muon": True, "lr": recipe.muon.lr, "momentum": recipe.muon.momentum,
        "weight_decay": recipe.weight_decay, "lr_ratio": recipe.muon.lr / recipe.lr, "clip": recipe.clip,
    }  # fmt: skip
    return compat.plain_muon()(
        [*([muon] if matrices else []), *({**group, **options} for group in adam if group["params"])],
        adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True},
    )  # fmt: skip


@torch.no_grad()
def clip(engine: Any, world: World) -> dict[str, Tensor]:
    """Between the last backward pass and the step: clips what AdamW will take to ``optim.clip``, by its own norm, and
    measures the gradient before it is orthogonalised. Collective.

    Returns "grad_norm" of all of it, "grad_norm_matrices" and "grad_norm_rest"; nothing without Muon. Where a
    gradient is not finite they mean nothing, and DeepSpeed skips the step.
    """
    zero = engine.optimizer
    if not any(group.get("use_muon") for group in zero.param_groups):
        return {}
    of_muon = compat.muon_groups(engine)
    largest = next(group["clip"] for group in zero.param_groups if "clip" in group)
    rest = [g for i, is_muon in enumerate(of_muon) if not is_muon for g in zero.averaged_gradients[i]]
    squares = torch.stack([square([g for _, g in compat.muon_gradients(engine)], world), square(rest, world)])
    norms = torch.tensor(world.sum(squares).tolist(), dtype=torch.float64, device=world.device).sqrt()
    if 0 < largest < norms[1] < float("inf"):
        torch._foreach_mul_(rest, largest / float(norms[1]))
    return {"grad_norm": norms.norm(), "grad_norm_matrices": norms[0], "grad_norm_rest": norms[1]}


def square(tensors: list[Tensor], world: World) -> Tensor:
    return sum((t.double().square().sum() for t in tensors), torch.zeros((), dtype=torch.float64, device=world.device))
