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

    Args:
        engine: a DeepSpeed engine, or the bare model.

    Returns nats per token:
        loss: the objective's own weighted loss, averaged over the grid (for MDLM weights, a bound on the NLL).
        nll_by_t: for each view of the grid, the mean over its target tokens: those that the encoder did not see, if
            there are any.
        nll_seen, nll_unseen: the mean over the tokens that the encoder did, and did not, see, averaged over the grid:
            each t counts the same, however many tokens it hides. None where there are none. For diffusion, nll_unseen
            is the bound on the NLL of the text; only it may be compared with the text's entropy.
        num_targets, num_unseen: how many tokens were asked for.
    """
    was_training = engine.training
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
    engine.train(was_training)
    table = world.sum(torch.stack(list(sums.values()))).cpu()  # [views, 6]
    total = table.sum(0)
    return {
        "loss": float((table[:, LOSS] / table[:, DIVISOR].clamp(min=1e-12)).mean()),
        "nll_seen": over_grid(table[:, NLL_SEEN], table[:, NUM_SEEN]),
        "nll_unseen": over_grid(table[:, NLL_UNSEEN], table[:, NUM_UNSEEN]),
        "nll_by_t": {name: of_view(row) for name, row in zip(sums, table, strict=True)},
        "num_targets": int(total[NUM_SEEN] + total[NUM_UNSEEN]),
        "num_unseen": int(total[NUM_UNSEEN]),
    }


def over_grid(totals: torch.Tensor, counts: torch.Tensor) -> float | None:
    """The mean over the views that have such tokens of their mean over these."""
    has_some = counts > 0
    return float((totals[has_some] / counts[has_some]).mean()) if has_some.any() else None


def of_view(row: torch.Tensor) -> float | None:
    total, count = (row[NLL_UNSEEN], row[NUM_UNSEEN]) if row[NUM_UNSEEN] > 0 else (row[NLL_SEEN], row[NUM_SEEN])
    return float(total / count) if count > 0 else None
