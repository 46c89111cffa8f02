"""Contrast: two views of one text should have similar concepts, views of different texts should not.

An auxiliary loss beside any objective: ``views`` makes two packed batches, the encoder turns each into concepts, and
``loss`` compares them.

B texts of this rank, R ranks, C concepts, d model width, e width of what is compared.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ..packing import Packed, join, pack
from ..ranges import check, one_of, portion, positive, switch
from ..similarity import product, unit, wide
from .tsdae import CHOICE, TSDAE, deletions
from .view import Pair, SampleKey, SpecialTokens, check_option, clean_text, keep_rows, per_sequence

PAIR, OTHER_DELETION = 16, 17  # streams of a key, above those of the objectives
NO_PAIR = -1  # the id of a text that is too short for two views
PAIRS = ("adjacent", "overlapping", "deletion", "dropout")


@dataclass(frozen=True)
class Contrastive:
    """Symmetric InfoNCE over all texts of all ranks:

        loss = mean over i of  1/2 * ( CE(s(a_i, b_.) / temperature, i) + CE(s(b_i, a_.) / temperature, i) )

    ``pairs``, the two views of a text of N tokens:
        "adjacent"     what is before and after a cut between N/3 and 2N/3.
        "overlapping"  two spans of more than N/2 and up to 3N/4 tokens, wherever they fall.
        "deletion"     two deletions of the text, each of a share ``deletion``; positions keep their gaps. The first is
                       what ``TSDAE`` of that probability lets the encoder read, so its concepts can serve both losses.
        "dropout"      the text twice; the model's dropout makes the difference.
    ``similarity``:
        "pooled"       s = cosine of the means over the concepts.
        "slots"        s = mean over the concepts of the cosine of concept c of one view with concept c of the other.
    Texts with the same id (the same document, or the same tokens) are not each other's negatives.

    Source: van den Oord et al. 2018 (InfoNCE), arXiv:1807.03748; Gao et al. 2021 (SimCSE), arXiv:2104.08821; Giorgi et
    al. 2021 (DeCLUTR, spans), arXiv:2006.03659.
    """

    pairs: str = one_of(*PAIRS)
    similarity: str = one_of("pooled", "slots")
    temperature: float = positive(0.05)
    deletion: float = portion(0.6)
    across_ranks: bool = switch(True)  # negatives from all ranks, where there are several

    def __post_init__(self):
        check(self)

    def views(
        self, batch: Packed, keys: Sequence[SampleKey], tokens: SpecialTokens, documents: Sequence[int] | None = None
    ) -> tuple[Packed, Packed, Tensor]:
        """Two batches of B texts, and their ids [B] int64. A pure function of its arguments.

        Args:
            documents: [B] a number of at least 0 for the document of each text; by default a hash of its tokens.
        """
        text = clean_text(batch, keys, tokens)
        bounds = np.concatenate([[0], np.cumsum(text.lengths)])
        texts = [text.ids[begin:end] for begin, end in pairwise(bounds)]
        shortest = 2 if self.pairs in ("adjacent", "overlapping") else 1
        names = [fingerprint(words) for words in texts] if documents is None else documents
        names = [name if len(words) >= shortest else NO_PAIR for name, words in zip(names, texts, strict=True)]
        ids = torch.tensor(names, dtype=torch.int64)
        if self.pairs == "dropout":
            return batch, batch, ids
        if self.pairs == "deletion":
            a, b = (deletions(text, keys, tokens, stream, self.deletion) for stream in (CHOICE, OTHER_DELETION))
            return keep_rows(text, ~a), keep_rows(text, ~b), ids
        draw = cut if self.pairs == "adjacent" else overlap
        spans = per_sequence(text, keys, PAIR, draw).reshape(-1, 2, 2).astype(np.int64)
        a, b = ([words[slice(*span)] for words, span in zip(texts, spans[:, i], strict=True)] for i in range(2))
        return pack(a), pack(b), ids

    def pair(
        self, batch: Packed, keys: Sequence[SampleKey], tokens: SpecialTokens,
        documents: Sequence[int] | None = None, objective: object = None,
    ) -> Pair:  # fmt: skip
        """``views`` in one batch. Where ``objective`` reads the very first views, it only holds the second."""
        a, b, ids = self.views(batch, keys, tokens, documents)
        is_shared = self.pairs == "deletion" and isinstance(objective, TSDAE) and (
            (objective.units, objective.positions, objective.probability) == ("token", "kept", self.deletion)
        )  # fmt: skip
        return Pair(b if is_shared else join(a, b), ids, is_shared)

    def loss(
        self, concepts_a: Tensor, concepts_b: Tensor, ids: Tensor, temperature: Tensor | float | None = None,
        divisor: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The part of the loss that belongs to this rank's texts, 0-d; in float32 or wider, whatever the autocast.

        Its *mean over ranks* is the mean over all texts of all ranks, also where ranks have different numbers of them,
        so gradients that are averaged over ranks are right. With ``across_ranks`` every rank must call it, and run its
        backward, even with B = 0; it then costs one host synchronisation and [R * B, e] of memory for each view, with
        e = d ("pooled") or C * d ("slots").

        Args:
            concepts_a, concepts_b: [B, C, d] concepts of the two views.
            ids: [B] int64 as ``views`` returned them; below 0: leave this text out.
            temperature: instead of the option, such as the output of a ``Temperature``.
            divisor: 0-d, of the sum over this rank's texts; by default the number of all texts over that of the ranks.
        """
        if concepts_a.shape != concepts_b.shape:
            raise ValueError(
                f"concepts_b: expected the shape of concepts_a, {list(concepts_a.shape)}, got {list(concepts_b.shape)}"
            )
        return self.loss_of(self.embed(concepts_a), self.embed(concepts_b), ids, temperature, divisor)

    def embed(self, concepts: Tensor) -> Tensor:
        """[B, C, d] -> [B, e] of norm 1, whose inner products are the similarity."""
        if self.similarity == "pooled":
            return unit(wide(concepts).mean(1))
        return (unit(concepts) / math.sqrt(concepts.shape[1])).flatten(1)

    def loss_of(
        self, a_Be: Tensor, b_Be: Tensor, ids: Tensor, temperature: Tensor | float | None = None,
        divisor: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """``loss`` of what ``embed`` made of the concepts."""
        temperature = self.temperature if temperature is None else temperature
        scores, blocked, own, num_texts = self.scores(a_Be, b_Be, ids)
        total = 0.0
        for score in scores:
            # after the division: the temperature gets no gradient from what is blocked
            nll_B = F.cross_entropy((score / temperature).masked_fill(blocked, -torch.inf), own, reduction="none")
            total = total + (nll_B * (ids >= 0).to(nll_B)).sum() / 2
        return total / (num_texts if divisor is None else divisor)

    @torch.no_grad()
    def num_found(self, a_Be: Tensor, b_Be: Tensor, ids: Tensor) -> Tensor:
        """[2] float64: how many of this rank's texts count, and how many of them are found. Collective, as ``loss``.

        A text counts as found by half for each of its views to which the other is the most similar of all.
        """
        scores, blocked, own, _ = self.scores(a_Be, b_Be, ids)
        found_B = sum((score.masked_fill(blocked, -torch.inf).argmax(1) == own).double() for score in scores) / 2
        counts_B = (ids >= 0).to(found_B)
        return torch.stack([counts_B.sum(), (found_B * counts_B).sum()])

    def scores(
        self, a_Be: Tensor, b_Be: Tensor, ids: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:  # fmt: skip
        """Similarities of this rank's texts with those of all ranks.

        Returns:
            [B, R * B] of each a with every b, and of each b with every a;
            [B, R * B] bool: these are not each other's negatives;
            [B] the column of the text itself;
            0-d the number of all texts that count, over that of the ranks.
        """
        pair_B2e, ids_B = torch.stack([a_Be, b_Be], dim=1), ids.to(a_Be.device, torch.int64)
        everyone, all_ids, rank, num_ranks = pair_B2e, ids_B, 0, 1
        if self.across_ranks and dist.is_initialized() and dist.get_world_size() > 1:
            rank, num_ranks = dist.get_rank(), dist.get_world_size()
            everyone, all_ids = gather(pair_B2e, ids_B)
        places = torch.arange(len(ids_B), device=ids_B.device)
        own = places + rank * (len(all_ids) // num_ranks)  # where this rank's texts stand among all
        blocked = (ids_B[:, None] == all_ids) | (all_ids < 0)
        blocked[places, own] = False
        scores = product(pair_B2e[:, 0], everyone[:, 1].T), product(pair_B2e[:, 1], everyone[:, 0].T)
        return scores, blocked, own, (all_ids >= 0).sum().clamp_min(1) / num_ranks


class Temperature(nn.Module):
    """A learnable temperature that never falls below ``floor``, for ``Contrastive.loss``. 0-d float32."""

    def __init__(self, initial: float = 0.05, floor: float = 0.01):
        super().__init__()
        check_option("floor", floor, "a number above 0", floor > 0)
        check_option("initial", initial, f"a number above floor = {floor:g}", initial > floor)
        self.floor = floor
        self.log_excess = nn.Parameter(torch.tensor([math.log(initial - floor)]))  # [1]: DeepSpeed refuses 0-d

    def forward(self) -> Tensor:
        return self.floor + self.log_excess.float().exp().squeeze()


def cut(g: np.random.Generator, num_tokens: int) -> np.ndarray:
    """Two spans (begin, end), flat: what is before a cut and what is after it."""
    middle = g.integers(-(-num_tokens // 3), 2 * num_tokens // 3 + 1) if num_tokens > 1 else num_tokens
    return np.array([0, middle, middle, num_tokens])


def overlap(g: np.random.Generator, num_tokens: int) -> np.ndarray:
    """Two spans (begin, end), flat; each is longer than half of the text, so that they share a token."""
    if num_tokens < 2:
        return np.array([0, num_tokens, 0, num_tokens])
    shortest = num_tokens // 2 + 1
    sizes = g.integers(shortest, max(shortest, 3 * num_tokens // 4) + 1, size=2)
    begins = g.integers(0, num_tokens - sizes + 1)
    return np.stack([begins, begins + sizes], axis=1).ravel()


def fingerprint(ids: np.ndarray) -> int:
    """A hash of token ids, at least 0 and below 2**63, the same in every process."""
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(ids).tobytes(), digest_size=8).digest(), "little") >> 1


class Gather(torch.autograd.Function):
    """[B, ...] of each rank -> [R * B, ...] of all; B is the same everywhere. Gradients are added up over ranks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of all ranks in rank order; ranks with fewer than the most are filled up with rows of id ``NO_PAIR``."""
    most = torch.tensor(len(ids), device=ids.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    missing = max(int(most), 1) - len(ids)  # at least one row, so that the gradient always passes every rank
    filled = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
    return Gather.apply(filled), Gather.apply(torch.cat([ids, ids.new_full((missing,), NO_PAIR)]))
