"""How much room the concepts use, and how much of it depends on the input.

Every function takes concepts ``z [B, C, d]`` (B texts, C concepts, width d; any float dtype, the arithmetic is float64)
or a matrix made from them. M = mean over the texts of z, [C, d], is the part that does not depend on the input
("prototypes"); z_b - M is the part that does. A number about M alone says nothing about content: frozen orthogonal
prototypes have the best possible rank of M and carry no text at all. So ``geometry`` always returns both kinds.
"""

import math

import torch
from torch import Tensor

DUPLICATE_COSINE = 0.95
DEAD_SLOT_SHARE = 0.01  # of the mean between-text variance
NO_ENERGY = 1e-10  # a part with less than this share of the energy is rounding
MIN_TWONN_POINTS = 20


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


def equicosine_rank(cosine: float, num_concepts: int) -> float:
    """``document_rank`` of C unit vectors with one pairwise cosine: 1 + (C-1) sqrt((1-rho) / (1 + (C-1) rho)).

    Their Gram matrix (1-rho) I + rho 11^T has the eigenvalue 1 + (C-1) rho once and 1-rho C-1 times.
    """
    others = num_concepts - 1
    return 1 + others * math.sqrt((1 - cosine) / (1 + others * cosine))


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


def slot_variances(concepts: Tensor) -> Tensor:
    """Variance between texts of each concept, summed over d: mean_b ||z_bc - M_c||^2, [C]."""
    return input_dependent(concepts).square().sum(-1).mean(0)


def dead_slots(concepts: Tensor) -> int:
    """Concepts whose variance between texts is below 1 % of the mean over concepts; all of them when nothing varies."""
    variances = slot_variances(concepts)
    if float(variances.sum()) == 0:
        return len(variances)
    return int((variances < DEAD_SLOT_SHARE * variances.mean()).sum())


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
