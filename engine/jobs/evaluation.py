"""Held-out loss: fixed text, fixed corruption, no label smoothing, copied and generated positions told apart."""

from typing import Any

import torch

from ...models import geometry
from ...models.objectives import Mixed
from ..data.loader import Loader
from ..launching.launch import World

MAX_TEXTS = 64  # over all ranks, whose concepts are looked at

# sums kept for each view of the grid
LOSS, DIVISOR, NLL_SEEN, NUM_SEEN, NLL_UNSEEN, NUM_UNSEEN, NLL_OTHERS, NUM_OTHERS = range(8)


@torch.no_grad()
def evaluate(
    engine: Any, loader: Loader, max_tokens: int, world: World, *, of_others: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Reads up to `max_tokens` held-out tokens through every view of the objective's grid. Collective.

    Args:
        engine: a DeepSpeed engine, or the bare model.
        of_others: also decode each text from the concepts of its neighbour in the batch; it is encoded once for both.
            The engine is then a bare ``ConceptForMaskedLM``.

    Returns nats per token, none where nothing is asked for:
        loss: the objective's own weighted loss, averaged over the grid (for MDLM weights, a bound on the NLL).
        nll_by_t: for each view of the grid, the mean over its target tokens: those that the encoder did not see, if
            there are any.
        nll_seen, nll_unseen: the mean over the tokens that the encoder did, and did not, see, averaged over the grid:
            each t counts the same, however many tokens it hides. None where there are none. For diffusion, nll_unseen
            is the bound on the NLL of the text; only it may be compared with the text's entropy.
        num_targets, num_unseen: how many tokens were asked for.
        nll_of_others: with ``of_others``, the mean over the targets of batches of two texts or more, averaged over the
            grid, each text decoded from the concepts of another; what it lies above the NLL of the same targets is what
            the concepts say about their text. None when no batch has two.
        parts: of a mixture, loss, nll_seen and nll_unseen of each part by itself; the figures above are then over the
            grids of all parts, and mean little.
        concepts: ``geometry.health`` of the concepts of 64 of the texts in the first view of the grid, and where they
            carry next to no content ``collapse``, why; absent with fewer than two texts, and where the loader says how
            many concepts there are, which then differ from batch to batch.
    and with a contrastive loss:
        contrastive: the loss of each text among all the others.
        retrieval: the share of texts whose other view is the most similar of all; chance is 1 / num_pairs.
    and with a teacher:
        alignment, alignment_of_stretches: mean cosine with the teacher's vectors of whole texts, and of stretches (None
            where none is asked for or long enough).
    """
    was_training = engine.training
    engine.eval()
    figures = _of_targets(engine, loader, max_tokens, world, of_others)
    if loader.contrastive is not None:
        figures |= _of_pairs(engine, loader, max_tokens, world)
    if loader.lessons is not None:
        figures |= _of_lessons(engine, loader, max_tokens, world)
    engine.train(was_training)
    return figures


def _of_targets(engine: Any, loader: Loader, max_tokens: int, world: World, of_others: bool) -> dict[str, Any]:
    sums: dict[str, torch.Tensor] = {}
    concepts, wanted = [], -(-MAX_TEXTS // world.data_size)  # of this rank, if no other has the same
    is_witness = world.sequence_rank == 0
    for views in loader.evaluation(max_tokens):
        for name, view in views.items():
            view = view.to(world.device)
            known = {"encoded": engine.encode(view.encoder)} if of_others else {}
            result = engine(view=view, return_nll=True, **known)
            nll = result.nll.double()
            if loader.concepts is None and name == next(iter(views)) and wanted > 0:
                found = result.concepts[:wanted].float().cpu()
                wanted -= len(found)
                concepts.append(found if is_witness else found[:0])
            seen, weights = view.seen.double(), view.weights.double()
            parts = [(weights * nll).sum(), view.divisor.double(), (seen * nll).sum(), seen.sum(),
                     ((1 - seen) * nll).sum(), (1 - seen).sum()]  # fmt: skip
            parts += [nll.new_zeros(())] * 2
            if of_others and view.encoder.num_sequences > 1:
                others = engine(view=view, return_nll=True, ablate="shuffle", **known).nll.double()
                parts[NLL_OTHERS:] = [others.sum(), others.new_tensor(len(others))]
            sums[name] = sums.get(name, 0) + torch.stack(parts)
    if not sums:
        none = {"loss": None, "nll_seen": None, "nll_unseen": None, "nll_by_t": {}, "num_targets": 0, "num_unseen": 0}
        return none | ({"nll_of_others": None} if of_others else {})
    table = world.sum(torch.stack(list(sums.values()))).cpu()  # [views, 8]
    total = table.sum(0)
    figures = {
        **means(table),
        "nll_by_t": {name: of_view(row) for name, row in zip(sums, table, strict=True)},
        "num_targets": int(total[NUM_SEEN] + total[NUM_UNSEEN]),
        "num_unseen": int(total[NUM_UNSEEN]),
    }
    if of_others:
        figures["nll_of_others"] = over_grid(table[:, NLL_OTHERS], table[:, NUM_OTHERS])
    if isinstance(loader.objective, Mixed):
        rows = {part: [name.startswith(f"{part}/") for name in sums] for part in loader.objective.names}
        figures["parts"] = {part: means(table[rows[part]]) for part in rows}
    return figures | (_of_concepts(torch.cat(concepts), world) if loader.concepts is None else {})


def _of_concepts(concepts: torch.Tensor, world: World) -> dict[str, Any]:
    """``concepts``: [B, C, d] of this rank. The same on every rank."""
    z = torch.cat(world.gather(concepts))
    if len(z) < 2 or not bool(torch.isfinite(z).all()):
        return {}
    found = geometry.health(z)
    reason = geometry.collapse(found, z.shape[1])
    return {"concepts": found, **({"collapse": reason} if reason else {})}


def _of_pairs(engine: Any, loader: Loader, max_tokens: int, world: World) -> dict[str, Any]:
    counted = [(pair.to(world.device), C) for pair, C in loader.evaluation_pairs(max_tokens)]
    compared, pairs = [engine(pair=pair, num_concepts=C) for pair, C in counted], [pair for pair, _ in counted]
    a, b = torch.cat([each.a for each in compared]), torch.cat([each.b for each in compared])
    ids = torch.cat([pair.ids for pair in pairs])
    of_rank = loader.contrastive.loss_of(a, b, ids, compared[0].temperature).double() / world.size
    loss, num_texts, num_found = world.sum(torch.stack([of_rank, *loader.contrastive.num_found(a, b, ids)])).tolist()
    return {"contrastive": loss, "retrieval": num_found / max(num_texts, 1), "num_pairs": int(num_texts)}


def _of_lessons(engine: Any, loader: Loader, max_tokens: int, world: World) -> dict[str, Any]:
    lessons = ((lesson.to(world.device), C) for lesson, C in loader.evaluation_lessons(max_tokens))
    sums = sum(engine(lesson=lesson, num_concepts=C) for lesson, C in lessons)
    whole, num_texts, stretches, num_stretches = world.sum(sums).tolist()
    of_stretches = stretches / num_stretches if num_stretches else None
    return {"alignment": whole / max(num_texts, 1), "alignment_of_stretches": of_stretches}


@torch.no_grad()
def of_states(engine: Any, loader: Loader, max_tokens: int, world: World) -> dict[str, float]:
    """How well the states of a backbone are read back from concepts, over the same text. Collective.

    Returns the mean squared error of states that are centred and of mean square 1 (state_error), and the same by the
    same decoder from concepts that are zero (state_error_without).
    """
    was_training = engine.training
    engine.eval()
    views = (view.to(world.device) for views in loader.evaluation(max_tokens) for view in views.values())
    error, without, count = world.sum(sum(engine(view=view, return_states=True) for view in views)).tolist()
    engine.train(was_training)
    return {"state_error": error / max(count, 1), "state_error_without": without / max(count, 1)}


def means(table: torch.Tensor) -> dict[str, float | None]:
    """Of rows [views, 8] of a grid."""
    return {
        "loss": float((table[:, LOSS] / table[:, DIVISOR].clamp(min=1e-12)).mean()),
        "nll_seen": over_grid(table[:, NLL_SEEN], table[:, NUM_SEEN]),
        "nll_unseen": over_grid(table[:, NLL_UNSEEN], table[:, NUM_UNSEEN]),
    }


def over_grid(totals: torch.Tensor, counts: torch.Tensor) -> float | None:
    """The mean over the views that have such tokens of their mean over these."""
    has_some = counts > 0
    return float((totals[has_some] / counts[has_some]).mean()) if has_some.any() else None


def of_view(row: torch.Tensor) -> float | None:
    total, count = (row[NLL_UNSEEN], row[NUM_UNSEEN]) if row[NUM_UNSEEN] > 0 else (row[NLL_SEEN], row[NUM_SEEN])
    return float(total / count) if count > 0 else None
