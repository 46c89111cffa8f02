"""How much room the concepts use, and how much of it depends on the input.

Every function takes concepts ``z [B, C, d]`` (B texts, C concepts, width d; any float dtype, the arithmetic is float64)
or a matrix made from them. M = mean over the texts of z, [C, d], is the part that does not depend on the input
("prototypes"); z_b - M is the part that does. A number about M alone says nothing about content: frozen orthogonal
prototypes have the best possible rank of M and carry no text at all. So ``geometry`` always returns both kinds.
"""

import math

import torch
from torch import Tensor

from ....models.geometry import (
    DUPLICATE_COSINE,
    checked,
    cosines,
    dead_slots,
    document_rank,
    entropy_rank,
    input_dependent,
    prototypes,
    similarity,
    singular_values,
    slot_variances,
    static_fraction,
)

__all__ = [
    "DUPLICATE_COSINE", "checked", "cosines", "dead_slots", "dimensions", "document_rank", "entropy_rank",
    "equicosine_rank", "geometry", "input_dependent", "participation_ratio", "prototypes", "retrieval", "similarity",
    "singular_values", "slot_variances", "spectrum", "static_fraction", "twonn",
]  # fmt: skip

MIN_TWONN_POINTS = 20


def equicosine_rank(cosine: float, num_concepts: int) -> float:
    """``document_rank`` of C unit vectors with one pairwise cosine: 1 + (C-1) sqrt((1-rho) / (1 + (C-1) rho)).

    Their Gram matrix (1-rho) I + rho 11^T has the eigenvalue 1 + (C-1) rho once and 1-rho C-1 times.
    """
    others = num_concepts - 1
    return 1 + others * math.sqrt((1 - cosine) / (1 + others * cosine))


def spectrum(matrix: Tensor) -> dict[str, float]:
    """Shares of the singular values S of M: variance shares are of S^2, dominance is S1 / sum(S).

    ``dims_95`` = 1 + #{k: cumulated variance share < 0.95}.
    """
    values = singular_values(matrix)
    variance = values.square() / values.square().sum().clamp_min(1e-300)
    return {
        "dims_95": int((variance.cumsum(0) < 0.95).sum()) + 1,
        "top1_variance": float(variance[0]),
        "top5_variance": float(variance[:5].sum()),
        "dominance": float(values[0] / values.sum().clamp_min(1e-300)),
        "top_singular_value": float(values[0]),
    }


def dimensions(concepts: Tensor) -> dict[str, float]:
    """Covariance of all concepts of all texts as one cloud of B*C points in d dimensions.

    ``participation_ratio`` = (sum lambda)^2 / sum lambda^2 of its eigenvalues. ``isotropy`` = min lambda / max lambda,
    both clamped at 1e-8: **0 by construction after a LayerNorm**, whose normalised output sums to zero, so that one
    eigenvalue vanishes; it is kept only for comparison with earlier documents. ``collapsed_dimensions`` counts
    dimensions of standard deviation below 1e-4.
    """
    z = checked(concepts)
    cloud = z.flatten(0, 1)
    values = torch.linalg.eigvalsh(torch.cov(cloud.T)).clamp_min(0)
    ratio = float(values.sum().square() / values.square().sum().clamp_min(1e-300))
    std, norms = cloud.std(0), cloud.norm(dim=1)
    floored = values.clamp_min(1e-8)
    return {
        "participation_ratio": ratio,
        "participation_ratio_normalized": ratio / cloud.shape[1],
        "isotropy": float(floored[0] / floored[-1]),
        "dimension_std_mean": float(std.mean()),
        "dimension_std_min": float(std.min()),
        "dimension_std_max": float(std.max()),
        "collapsed_dimensions": int((std < 1e-4).sum()),
        "collapsed_dimensions_share": float((std < 1e-4).double().mean()),
        "norm_mean": float(norms.mean()),
        "norm_std": float(norms.std()),
    }


def twonn(points: Tensor, *, discard: float = 0.1, method: str = "fit") -> float:
    """Intrinsic dimension of ``points`` [n, d] from the ratio mu = r2 / r1 of each point's two nearest distances.

    On a d-dimensional manifold of locally constant density P(mu) = 1 - mu^-d. "fit" is the slope through the origin of
    -log(1 - F(mu)) over log mu without the ``discard`` share of largest mu; "mle" is n / sum log mu over all points.
    Equal points count once. Biased low when n is small against the dimension (n = 300 cannot tell 30 from 50). NaN with
    fewer than 20 distinct points. Facco, d'Errico, Rodriguez, Laio 2017.
    """
    if method not in ("fit", "mle"):
        raise ValueError(f"method: expected 'fit' or 'mle', got {method!r}")
    distinct = torch.unique(points.double(), dim=0)
    n = len(distinct)
    if n < MIN_TWONN_POINTS:
        return math.nan
    nearest = torch.cat([
        torch.cdist(rows, distinct, compute_mode="donot_use_mm_for_euclid_dist").topk(3, largest=False).values
        for rows in distinct.split(1024)
    ])  # fmt: skip
    log_mu = (nearest[:, 2] / nearest[:, 1]).log().sort().values  # column 0 is the point itself
    if method == "mle":
        return float(n / log_mu.sum())
    kept = int(n * (1 - discard))
    empirical = torch.arange(1, kept + 1, dtype=torch.float64) / n
    x, y = log_mu[:kept], -torch.log1p(-empirical)
    return float((x * y).sum() / x.square().sum())


def geometry(concepts: Tensor) -> dict[str, float]:
    """Every metric above for concepts [B, C, d] of B >= 2 texts, as one flat mapping; NaN where it cannot be measured.

    ``effective_rank`` is the earlier documents' metric (M, sum over max). ``rank_*`` are entropy ranks: of M, of M
    centred over its concepts, and the means over texts of z_b, of z_b centred over its concepts, and of z_b - M
    (``rank_dynamic``, which tells whether the concepts carry content). ``twonn_slots`` is the mean over about 16
    concepts of the dimension of one concept over the texts; ``twonn_pooled`` that of the mean concept. Memory: about
    4 copies of z in float64.
    """
    z = checked(concepts)
    num_texts, num_concepts, width = z.shape
    if num_texts < 2:
        raise ValueError(f"concepts: expected at least 2 texts to tell content from prototypes, got {list(z.shape)}")
    mean = z.mean(0)
    rank = document_rank(mean)
    twonn_slots = [twonn(z[:, c]) for c in range(0, num_concepts, max(1, num_concepts // 16))]
    return {
        "num_texts": num_texts,
        "num_concepts": num_concepts,
        "width": width,
        "effective_rank": rank,
        "effective_rank_normalized": rank / min(num_concepts, width),
        "rank_mean": float(entropy_rank(mean)),
        "rank_mean_centered": float(entropy_rank(mean - mean.mean(0))),
        "rank_text": float(entropy_rank(z).mean()),
        "rank_text_centered": float(entropy_rank(z - z.mean(1, keepdim=True)).mean()),
        "rank_dynamic": float(entropy_rank(input_dependent(z)).mean()),
        "static_fraction": static_fraction(z),
        "dead_slots": dead_slots(z),
        **similarity(z),
        **spectrum(mean),
        **dimensions(z),
        "participation_ratio_pooled": participation_ratio(z.mean(1)),
        "twonn_pooled": twonn(z.mean(1)),
        "twonn_slots": sum(twonn_slots) / len(twonn_slots),
    }


def retrieval(queries: Tensor, candidates: Tensor) -> float:
    """R@1: how often row i of [n, e] is nearest to row i of the other, both ways; chance is 1/n.

    Rows have norm 1; of candidates that are equally near, one is right by chance.
    """
    scores = queries.double() @ candidates.double().T
    own = scores.diagonal()
    found = 0.0
    for others in (scores, scores.T):
        nearer, equal = (others > own[:, None] + 1e-9).sum(1), ((others - own[:, None]).abs() <= 1e-9).sum(1)
        found += float(((nearer == 0) / equal).mean())
    return found / 2


def participation_ratio(points: Tensor) -> float:
    """(sum lambda)^2 / sum lambda^2 of the covariance of ``points`` [n, d]; 0 when nothing varies."""
    values = singular_values(points - points.mean(0)).square()
    return float(values.sum().square() / values.square().sum().clamp_min(1e-300))
