"""Figures of one model on held-out text that do not ask what it was trained on, so that objectives can be compared.

B texts, C concepts, d model width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ...engine.data.loader import Loader
from ...models.objectives import TSDAE, Contrastive, Diffusion
from . import heldout
from .geometry import metrics
from .subject import Subject, reader

DELETED = 0.6  # share of the tokens, of the reconstruction
BATCH_TOKENS = 8192


def measure(subject: Subject, num_tokens: int, num_texts: int) -> dict[str, float | None]:
    """Every yardstick over the first ``num_tokens`` held-out tokens, or ``num_texts`` held-out windows.

        heldout_nll             nats per token that the encoder did not see, mean of t = 0.1 .. 1.0; a bound on the NLL
        nll_of_other_concepts   the same targets from the concepts of another text
        concept_nats            the difference: what the concepts say about their text
        unigram_entropy         of the same text
        accuracy_kept, _deleted share of tokens written right when 60 % are deleted and all are asked for
        retrieval_pooled        R@1 of the second half of a window by its first, cosine of the mean concepts
        retrieval_slots         the same by the mean cosine of concept c with concept c
        chance                  R@1 of a guess
        effective_rank, ...     of ``geometry.metrics``, over whole windows
    """
    model, windows, tokens = subject.model.eval(), subject.loader.windows, subject.loader.tokens
    context = model.config.decoder_mixing != "none"  # such a decoder is told what is known, as in training
    noisy = Diffusion(weighting="none", hidden=model.config.hidden_tokens, context=context)
    losses = heldout.losses(model, reader(windows, noisy, tokens), None, num_tokens)
    others = losses.nll_of_other_concepts
    kept, deleted = reconstruction(model, reader(windows, TSDAE(probability=DELETED), tokens), num_tokens)
    rows = subject.loader.evaluation_rows(windows.num_tokens)
    texts = [windows[int(row)] for row in rows[windows.lengths[rows] >= half_length(model) * 2][:num_texts]]
    geometry = metrics.geometry(heldout.concepts(model.encoder, subject.loader, num_texts).values)
    return {
        "heldout_nll": losses.heldout_nll,
        "nll_of_other_concepts": others,
        "concept_nats": None if others is None else others - losses.heldout_nll,
        "unigram_entropy": losses.unigram_entropy,
        "accuracy_kept": kept,
        "accuracy_deleted": deleted,
        **adjacent_retrieval(model.encoder, texts),
        **geometry,
    }


def half_length(model: nn.Module) -> int:
    """Shortest half of a window that is searched for: with fewer tokens than half the concepts, most read nothing."""
    return max(8, model.config.num_concepts // 2)


@torch.no_grad()
def reconstruction(model: nn.Module, loader: Loader, max_tokens: int) -> tuple[float | None, float | None]:
    """Shares of the kept and of the deleted tokens at which the most probable token is the right one.

    The decoder is given [MASK] everywhere: to a model that asks for a time, that is t = 1.
    """
    device = next(model.parameters()).device
    right, count = np.zeros(2), np.zeros(2)
    for views in loader.evaluation(max_tokens):
        view = views[f"delete={DELETED:.2f}"].to(device)
        view = replace(view, timesteps=torch.ones(view.encoder.num_sequences, device=device))
        hidden = model.decode_view(model.encoder(packed=view.encoder), view)
        chunks = zip(hidden.split(2048), view.targets.split(2048), strict=True)  # [2048, V] logits at a time
        is_right = torch.cat([model.lm_head(rows).argmax(-1) == targets for rows, targets in chunks])
        for i, asked in enumerate((view.seen, ~view.seen)):
            right[i] += int(is_right[asked].sum())
            count[i] += int(asked.sum())
    kept, deleted = (float(r / n) if n else None for r, n in zip(right, count, strict=True))
    return kept, deleted


def adjacent_retrieval(encoder: nn.Module, texts: Sequence[np.ndarray]) -> dict[str, float | None]:
    """R@1 over the two halves of each text, encoded apart; None for fewer than two texts."""
    if len(texts) < 2:
        return {"retrieval_pooled": None, "retrieval_slots": None, "chance": None}
    halves = [ids[: len(ids) // 2] for ids in texts], [ids[len(ids) // 2 :] for ids in texts]
    first, second = (heldout.encode(encoder, half, BATCH_TOKENS) for half in halves)
    found = {}
    for similarity in ("pooled", "slots"):
        embed = Contrastive(similarity=similarity).embed
        found[f"retrieval_{similarity}"] = metrics.retrieval(embed(first), embed(second))
    return {**found, "chance": 1 / len(texts)}
