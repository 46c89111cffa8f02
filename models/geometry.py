"""How much room concepts use, and how much of it depends on the text: cheap enough for every evaluation.

Every function takes concepts ``z [B, C, d]`` (B texts, C concepts, width d; any float dtype, the arithmetic is float64)
or a matrix made from them. M = mean over the texts of z, [C, d], is the part that does not depend on the text
("prototypes"); z_b - M is the part that does. A number about M alone says nothing about content: frozen orthogonal
prototypes have the best possible rank of M and carry no text at all.
"""

import torch
from torch import Tensor

DUPLICATE_COSINE = 0.95
DEAD_SLOT_SHARE = 0.01  # of the mean between-text variance
NO_ENERGY = 1e-10  # a part with less than this share of the energy is rounding


def prototypes(concepts: Tensor) -> Tensor:
    """M = (1/B) sum_b z_b, [C, d]."""
    return checked(concepts).mean(0)


def document_rank(matrix: Tensor) -> float:
    """sum(S) / (max(S) + 1e-8) with S the singular values of ``matrix`` [C, d], not centred; between 0 and min(C, d).

    Applied to M, the "effective rank" of the project's earlier documents. C prototypes of one common cosine have the
    value of ``equicosine_rank``; one direction shared by all prototypes is enough to bring it down to a few.
    """
    values = singular_values(matrix)
    return float(values.sum() / (values.max() + 1e-8))


def entropy_rank(matrix: Tensor, eps: float = 1e-7) -> Tensor:
    """exp(-sum p log p) with p = S / sum(S) + eps, per matrix of [..., C, d]; a zero matrix has rank 0.

    Roy and Vetterli 2007 (effective rank); with this eps, RankMe of Garrido et al. 2023.
    """
    values = singular_values(matrix)
    total = values.sum(-1, keepdim=True)
    share = values / total.clamp_min(torch.finfo(torch.float64).tiny) + eps
    rank = torch.exp(-(share * share.log()).sum(-1))
    return torch.where(total.squeeze(-1) > 0, rank, torch.zeros_like(rank))


def input_dependent(concepts: Tensor) -> Tensor:
    """z_b - M, [B, C, d]; exactly zero where what is left is only the rounding of the input."""
    z = checked(concepts)
    rest = z - z.mean(0)
    energy, total = rest.square().sum((1, 2)), z.square().sum((1, 2))
    return rest * (energy > NO_ENERGY * total)[:, None, None]


def static_fraction(concepts: Tensor) -> float:
    """||M||^2 / mean_b ||z_b||^2: the share of the concepts' energy that does not depend on the input, in [0, 1].

    M is estimated from the same B texts, which adds about (1 - f) / B.
    """
    z = checked(concepts)
    return float(z.mean(0).square().sum() / z.square().sum((1, 2)).mean().clamp_min(1e-300))


def cosines(concepts: Tensor) -> Tensor:
    """G [B, C, C]: cosines of the concepts of one text."""
    unit = torch.nn.functional.normalize(checked(concepts), dim=-1, eps=1e-12)
    return unit @ unit.mT


def similarity(concepts: Tensor) -> dict[str, float]:
    """Cosines of different concepts of one text, over all texts and pairs.

    ``mean`` is of absolute values and ``max`` of signed ones, as the earlier documents define them; ``mean_signed`` and
    ``std`` are signed. ``uniformity`` is mean exp(-2 (2 - 2 cos)), without the logarithm of Wang and Isola 2020.
    ``duplicate_pairs`` counts pairs whose cosine, averaged over the texts, exceeds 0.95; ``duplicate_pairs_per_text``
    counts pairs within a text, averaged over the texts.
    """
    gram = cosines(concepts)
    upper = torch.triu_indices(gram.shape[1], gram.shape[1], offset=1)
    pairs = gram[:, upper[0], upper[1]]
    if pairs.shape[1] == 0:
        raise ValueError(f"concepts: expected at least 2 concepts to compare, got shape {list(concepts.shape)}")
    return {
        "similarity_mean": float(pairs.abs().mean()),
        "similarity_max": float(pairs.max()),
        "similarity_std": float(pairs.std(correction=0)),
        "similarity_mean_signed": float(pairs.mean()),
        "uniformity": float(torch.exp(-2 * (2 - 2 * pairs)).mean()),
        "duplicate_pairs": int((pairs.mean(0) > DUPLICATE_COSINE).sum()),
        "duplicate_pairs_per_text": float((pairs > DUPLICATE_COSINE).sum(1).double().mean()),
    }


def slot_variances(concepts: Tensor) -> Tensor:
    """Variance between texts of each concept, summed over d: mean_b ||z_bc - M_c||^2, [C]."""
    return input_dependent(concepts).square().sum(-1).mean(0)


def dead_slots(concepts: Tensor) -> int:
    """Concepts whose variance between texts is below 1 % of the mean over concepts; all of them when nothing varies."""
    variances = slot_variances(concepts)
    if float(variances.sum()) == 0:
        return len(variances)
    return int((variances < DEAD_SLOT_SHARE * variances.mean()).sum())


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values of [..., C, d] in float64, largest first."""
    return torch.linalg.svdvals(matrix.double())


def checked(concepts: Tensor) -> Tensor:
    """``concepts`` [B, C, d] in float64 on the CPU, finite."""
    if concepts.ndim != 3 or 0 in concepts.shape:
        raise ValueError(f"concepts: expected shape [B, C, d] without empty axes, got {list(concepts.shape)}")
    z = concepts.detach().to("cpu", torch.float64)
    if not torch.isfinite(z).all():
        raise ValueError("concepts: expected finite values, got NaN or infinity")
    return z


def health(concepts: Tensor) -> dict[str, float | int]:
    """The figures that tell early whether concepts [B, C, d] of B >= 2 texts carry content; names as in reports."""
    z = checked(concepts)
    found = {
        "num_texts": z.shape[0],
        "effective_rank": document_rank(z.mean(0)),
        "rank_dynamic": float(entropy_rank(input_dependent(z)).mean()),
        "static_fraction": static_fraction(z),
        "dead_slots": dead_slots(z),
    }
    if z.shape[1] == 1:
        return found
    pairs = similarity(z)
    return {**found, **{name: pairs[name] for name in ("similarity_mean", "duplicate_pairs")}}


STATIC, FEW, COPIES = 0.9, 1 / 16, 0.5  # of the energy, of the concepts, of the pairs
MIN_TEXTS = 8  # that fewer say nothing of


def collapse(figures: dict[str, float | int], num_concepts: int) -> str:
    """Why concepts with this ``health`` carry next to no content; empty where they may."""
    if figures["num_texts"] < MIN_TEXTS:
        return ""
    static, rank, pairs = figures["static_fraction"], figures["rank_dynamic"], num_concepts * (num_concepts - 1) // 2
    if static > STATIC:
        return f"{100 * static:.0f} % of the concepts' energy is the same for every text (static_fraction)"
    if rank < FEW * num_concepts:
        return f"what the texts change spans {rank:.1f} directions for {num_concepts} concepts (rank_dynamic)"
    if pairs and figures["duplicate_pairs"] > COPIES * pairs:
        return f"{figures['duplicate_pairs']} of {pairs} pairs of concepts are copies (duplicate_pairs)"
    return ""
