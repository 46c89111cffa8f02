"""Held-out loss: fixed text, fixed corruption, no label smoothing, copied and generated positions told apart."""

from typing import Any

import torch

from .data.loader import Loader
from .launch import World

# sums kept for each view of the grid
LOSS, DIVISOR, NLL_SEEN, NUM_SEEN, NLL_UNSEEN, NUM_UNSEEN = range(6)


@torch.no_grad()
def evaluate(engine: Any, loader: Loader, max_tokens: int, world: World) -> dict[str, Any]:
    """Reads up to `max_tokens` held-out tokens through every view of the objective's grid. Collective.

    Returns nats per token:
        loss: the objective's own weighted loss, averaged over the grid (for MDLM weights, a bound on the NLL).
        nll_seen, nll_unseen: mean over target tokens that the encoder did, and did not, see; None where there are none.
            Only nll_unseen may be compared with the entropy of the text.
        nll_by_t: the same mean of each view of the grid, over unseen targets where it has any.
        num_targets, num_unseen: how many tokens the means are over.
    """
    engine.eval()
    sums: dict[str, torch.Tensor] = {}
    for views in loader.evaluation(max_tokens):
        for name, view in views.items():
            view = view.to(world.device)
            nll = engine(view=view, return_nll=True).nll.double()
            seen, weights = view.seen.double(), view.weights.double()
            parts = [(weights * nll).sum(), view.divisor.double(), (seen * nll).sum(), seen.sum(),
                     ((1 - seen) * nll).sum(), (1 - seen).sum()]  # fmt: skip
            sums[name] = sums.get(name, 0) + torch.stack(parts)
    engine.train()
    table = world.sum(torch.stack(list(sums.values()))).cpu()  # [views, 6]
    total = table.sum(0)
    return {
        "loss": float((table[:, LOSS] / table[:, DIVISOR].clamp(min=1e-12)).mean()),
        "nll_seen": mean(total[NLL_SEEN], total[NUM_SEEN]),
        "nll_unseen": mean(total[NLL_UNSEEN], total[NUM_UNSEEN]),
        "nll_by_t": {name: _of_view(row) for name, row in zip(sums, table, strict=True)},
        "num_targets": int(total[NUM_SEEN] + total[NUM_UNSEEN]),
        "num_unseen": int(total[NUM_UNSEEN]),
    }


def _of_view(row: torch.Tensor) -> float | None:
    return mean(row[NLL_UNSEEN], row[NUM_UNSEEN]) or mean(row[NLL_SEEN], row[NUM_SEEN])


def mean(total: torch.Tensor, count: torch.Tensor) -> float | None:
    return float(total / count) if count > 0 else None
