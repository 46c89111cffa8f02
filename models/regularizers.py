"""Regularisers of the concepts: what keeps them apart and in use, and how much it may weigh beside the task.

B texts, C concepts, d model width. Every term is a function of z [B, C, d], computed in float32 or wider, and returns
a 0-d tensor that is to be made small. Two populations: *within a text*, the C concepts of one text, averaged over
texts; and *over the batch*, the B values that one concept takes, averaged over concepts. A population that is too small
to say anything (one concept, one text) gives 0, with gradient 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from .objectives.view import check_option
from .ranges import LEAST, Allowed, check, count, given, number, one_of, or_nothing, positive, switch
from .sharding import summed
from .similarity import product, unit, wide


def orthogonality(z: Tensor) -> Tensor:
    """Within a text: mean over pairs of concepts of cos^2. 0 for orthogonal concepts, 1 for identical ones."""
    return mean_of_pairs(z, Tensor.square)


def soft_orthogonality(z: Tensor, margin: float = 0.1) -> Tensor:
    """Within a text: mean over pairs of max(0, |cos| - margin)^2."""
    return mean_of_pairs(z, lambda cos: F.relu(cos.abs() - margin).square())


def uniformity(z: Tensor) -> Tensor:
    """Within a text: mean over pairs of exp(-2 |u_i - u_j|^2), u of norm 1. exp(-4) if orthogonal, 1 if identical.

    Wang and Isola 2020, arXiv:2005.10242, without their logarithm.
    """
    return mean_of_pairs(z, lambda cos: torch.exp(4 * cos - 4))


def variance(z: Tensor) -> Tensor:
    """Over the batch: mean over concepts and dimensions of max(0, 1 - sqrt(var + 1e-4)), var of B - 1 degrees.

    A concept that is the same in every text has the worst value, 0.99, however different the concepts are from each
    other. Bardes et al. 2022 (VICReg), arXiv:2105.04906.
    """
    if z.shape[0] < 2:
        return nothing(z)
    return F.relu(1 - torch.sqrt(wide(z).var(0) + 1e-4)).mean()


def covariance(z: Tensor) -> Tensor:
    """Over the batch: mean over concepts of sum_{h != h'} Cov_hh'^2 / d. Memory O(C * min(B, d)^2). VICReg as above."""
    B, _, d = z.shape
    if B < 2:
        return nothing(z)
    centred_CBd = (wide(z) - wide(z).mean(0)).transpose(0, 1)
    # the squares of X^T X and of X X^T have the same sum; with few texts the diagonal is never most of it
    left, right = (centred_CBd.mT, centred_CBd) if d <= B else (centred_CBd, centred_CBd.mT)
    every = product(left, right).square().sum((1, 2))
    diagonal = centred_CBd.square().sum(1).square().sum(1)
    return ((every - diagonal) / ((B - 1) ** 2 * d)).mean()


def vicreg(z: Tensor) -> Tensor:
    """variance + covariance, 1 : 1, both over the batch."""
    return variance(z) + covariance(z)


def t_regs(z: Tensor) -> Tensor:
    """Within a text: minus the mean edge of the exact minimum spanning tree of the concepts on the unit sphere.

    The tree is found without gradient; the gradient flows through its C - 1 edges, and is 0 where two concepts are
    equal. The norms are taken out, so the term for them that the source has is not needed.
    Source: Mordacq et al. 2025 (T-REGS), arXiv:2510.23484.
    """
    if few_pairs(z):
        return nothing(z)
    u = unit(z)
    return -lengths(u, spanning_tree(u)).mean()


def nearest_neighbor(z: Tensor) -> Tensor:
    """Within a text: minus the mean distance to the nearest other concept on the unit sphere.

    Cheaper than ``t_regs`` and weaker: pairs or clusters of concepts that are far from each other do not count as far.
    """
    if few_pairs(z):
        return nothing(z)
    u = unit(z)
    apart = distances(u)
    apart.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest = apart.argmin(2)
    itself = torch.arange(z.shape[1], device=z.device).expand_as(nearest)
    return -lengths(u, torch.stack([itself, nearest], dim=2)).mean()


def log_det(z: Tensor, eps: float = 0.5) -> Tensor:
    """Within a text: minus the coding rate, -1/(2C) * logdet(I + d / (C eps^2) * U U^T) in nats a concept.

    U [C, d] are the concepts on the unit sphere. Source: Yu et al. 2020 (MCR2), arXiv:2006.08558.
    """
    B, C, d = z.shape
    if few_pairs(z):
        return nothing(z)
    u = unit(z)
    gram = product(u.mT, u) if d < C else product(u, u.mT)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, _ = torch.linalg.cholesky_ex(eye + gram * (d / (C * eps**2)))  # eigenvalues >= 1: no check that would wait
    return -factor.diagonal(dim1=1, dim2=2).log().sum() / (B * C)


def entropy_rank(z: Tensor) -> Tensor:
    """Within a text: 1 - H(s) / ln min(C, d), H the entropy of the singular values of U divided by their sum.

    0 if all singular values are equal, 1 if there is one. U [C, d] are the concepts on the unit sphere. Synchronises
    with the host, as every decomposition into singular values does.
    Source: Roy and Vetterli 2007 (effective rank).
    """
    if few_pairs(z) or z.shape[2] < 2:
        return nothing(z)
    values = torch.linalg.svdvals(unit(z))
    share = values / values.sum(-1, keepdim=True).clamp_min(1)  # at least 1 unless all concepts are 0
    entropy = -torch.special.xlogy(share, share.clamp_min(1e-7)).sum(-1)
    return 1 - entropy.mean() / math.log(min(z.shape[1:]))


WITHIN_TEXT: dict[str, Callable[[Tensor], Tensor]] = {
    "orthogonality": orthogonality, "soft_orthogonality": soft_orthogonality, "uniformity": uniformity,
    "t_regs": t_regs, "nearest_neighbor": nearest_neighbor, "log_det": log_det, "entropy_rank": entropy_rank,
}  # fmt: skip
TERMS = {**WITHIN_TEXT, "variance": variance, "covariance": covariance, "vicreg": vicreg}
WEIGHTINGS = ("fixed", "learnable", "kendall_gal")


def are_terms(x: object) -> bool:
    is_list = isinstance(x, list | tuple) and len(x) > 0 and all(isinstance(name, str) for name in x)
    return is_list and len(x) == len(set(x)) and set(x) <= set(TERMS)


SEVERAL = Allowed(f"one or several of {', '.join(TERMS)}, each once", are_terms)


@dataclass(frozen=True)
class Regularization:
    """Which terms, and how they add up; the task has weight 1 beside them, always.

        loss = weight * min(1, step / warmup_steps) * sum over the n terms of share_i * term_i

    ``weighting``:
        "fixed"        share_i = 1 / n.
        "learnable"    share_i = softmax of n parameters. It moves to the terms that are small already: for ablations.
        "kendall_gal"  share_i = exp(-s_i) / n, and s_i / n is added, with learnable s_i >= 0 that begin at 0. Without
                       that floor s_i falls with the logarithm of its term, and a term that is nearly 0 takes all the
                       weight; with it the terms together never weigh more than the task.
    ``gradient_ratio``: the largest norm of their gradient at the concepts, relative to the task's, see ``GradientCap``;
        None: no limit. It may be combined with any weighting.
    ``dynamic``: the terms within a text see z - mean over the batch of z, what differs between texts, so that concepts
        which are merely different from each other in the same way in every text earn nothing.

    Source: Kendall, Gal and Cipolla 2018, arXiv:1705.07115 (of which this is the floored form).
    """

    terms: tuple[str, ...] = given(("orthogonality",), SEVERAL)
    weight: float = positive(0.02)
    weighting: str = one_of(*WEIGHTINGS)
    warmup_steps: int = count(2000, least=0)
    gradient_ratio: float | None = given(0.1, or_nothing(number(LEAST)))
    dynamic: bool = switch()

    def __post_init__(self):
        check(self)
        expected = "at most 1 with kendall_gal, so that the terms never outweigh the task"
        check_option("weight", self.weight, expected, self.weighting != "kendall_gal" or self.weight <= 1)

    @property
    def depends_on_batch(self) -> bool:
        """Whether a text's share in the loss depends on the texts beside it."""
        return self.dynamic or self.gradient_ratio is not None or not set(self.terms) <= set(WITHIN_TEXT)

    def warmup(self, step: int) -> float:
        """0 at step 0, 1 from ``warmup_steps`` on, a straight line between."""
        return min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0


class Regularized(NamedTuple):
    loss: Tensor  # 0-d, to be added to the task's loss
    terms: dict[str, Tensor]  # 0-d each, detached, without a weight
    weights: dict[str, Tensor]  # 0-d each, detached: what each term is multiplied by, warm-up included


class Regularizer(nn.Module):
    """Adds up the terms. Its parameters, if the weighting has any, are trained with the model's.

        for_task, for_terms = regularizer.cap(concepts)
        added = regularizer(for_terms, step)
        loss = task_loss + added.loss

    where the decoder reads ``for_task``.
    """

    def __init__(self, options: Regularization):
        super().__init__()
        self.options = options
        self.cap = GradientCap(options.gradient_ratio)
        if options.weighting != "fixed":
            self.logits = nn.Parameter(torch.zeros(len(options.terms)))

    def forward(self, z: Tensor, step: int) -> Regularized:
        """z [B, C, d] concepts of a micro-batch; step counts from 0."""
        names, z = self.options.terms, wide(z)
        dynamic = z - z.mean(0, keepdim=True) if z.shape[0] > 1 else z[:0]  # one text says nothing about differences
        within = dynamic if self.options.dynamic else z
        terms = torch.stack([TERMS[name](within if name in WITHIN_TEXT else z) for name in names])
        share, penalty = self.shares(terms)
        scale = self.options.weight * self.options.warmup(step)
        loss = scale * ((share * terms).sum() + penalty)
        return Regularized(
            loss,
            dict(zip(names, terms.detach().unbind(), strict=True)),
            dict(zip(names, (scale * share).detach().unbind(), strict=True)),
        )

    def shares(self, terms: Tensor) -> tuple[Tensor, Tensor | float]:
        """[n] shares of the weight, at most 1 in sum; and what the weighting adds."""
        n = len(terms)
        if self.options.weighting == "fixed":
            return torch.full_like(terms, 1 / n), 0.0
        if self.options.weighting == "learnable":
            return self.logits.to(terms.dtype).softmax(0), 0.0
        # reflected at 0: clamped, a parameter that once fell below 0 would have no gradient to come back by
        s = torch.where(self.logits >= 0, self.logits, -self.logits).to(terms.dtype)
        return torch.exp(-s) / n, s.mean()


class GradientCap(nn.Module):
    """x -> (x, x); what flows back through the second is scaled down to at most ``ratio`` times the first's norm.

        grad x = g_1 + min(1, ratio * |g_1| / |g_2|) * g_2

    Both gradients meet in one backward pass, so loss scaling changes nothing, and no second pass is needed. The limit
    holds for every micro-batch of every rank, and so for their sum before it is taken further back. While the task
    has no gradient, the second gets none.

    ``group``: of devices that hold parts of the same texts (``sharding``), whose parts of g_1 add up to the task's.
    ``scale``: the factor of the last backward pass, 0-d, for the log; None before the first.
    """

    def __init__(self, ratio: float | None):
        super().__init__()
        self.ratio = ratio
        self.scale: Tensor | None = None
        self.group: ProcessGroup | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x, x) if self.ratio is None else Fork.apply(x, self)


class Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cap: GradientCap) -> tuple[Tensor, Tensor]:
        ctx.cap = cap
        return x.view_as(x), x.view_as(x)

    @staticmethod
    def backward(ctx, first: Tensor, second: Tensor) -> tuple[Tensor, None]:
        group = ctx.cap.group
        whole = wide(first) if group is None else summed(wide(first), group)
        allowed = ctx.cap.ratio * torch.linalg.vector_norm(whole)
        norm = torch.linalg.vector_norm(wide(second)) * (1 if group is None else group.size())
        scale = torch.where(norm > allowed, allowed / norm, 1.0)
        ctx.cap.scale = scale.detach()
        return first + (second * scale).to(first.dtype), None


def few_pairs(z: Tensor) -> bool:
    return z.shape[0] == 0 or z.shape[1] < 2


def nothing(z: Tensor) -> Tensor:
    """0, connected to z."""
    return wide(z).sum() * 0.0


def mean_of_pairs(z: Tensor, of_cosine: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean over texts and over i != j of a function of cos(z_i, z_j)."""
    B, C, _ = z.shape
    if few_pairs(z):
        return nothing(z)
    u = unit(z)
    values_BCC = of_cosine(product(u, u.mT))
    others = ~torch.eye(C, dtype=torch.bool, device=z.device)
    return (values_BCC * others).sum() / (B * C * (C - 1))


@torch.no_grad()
def distances(points: Tensor) -> Tensor:
    """[B, n, d] -> [B, n, n], by differences, so that points that are nearly equal are told apart."""
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


@torch.no_grad()
def spanning_tree(points: Tensor) -> Tensor:
    """[B, n, d] -> [B, n - 1, 2] int64: the edges of a Euclidean minimum spanning tree of each set of points.

    Prim's algorithm for all sets at once: n - 1 steps, O(B n^2) memory, no host synchronisation.
    """
    B, n, _ = points.shape
    apart = distances(points)
    rows = torch.arange(B, device=points.device)
    closest, parent = apart[:, 0].clone(), torch.zeros(B, n, dtype=torch.int64, device=points.device)
    outside = torch.ones(B, n, dtype=torch.bool, device=points.device)
    outside[:, 0] = False
    edges = torch.empty(B, n - 1, 2, dtype=torch.int64, device=points.device)
    for i in range(n - 1):
        new = closest.masked_fill(~outside, torch.inf).argmin(1)
        edges[:, i, 0], edges[:, i, 1] = parent[rows, new], new
        outside[rows, new] = False
        is_closer = apart[rows, new] < closest
        closest = torch.where(is_closer, apart[rows, new], closest)
        parent = torch.where(is_closer, new[:, None], parent)
    return edges


def lengths(points: Tensor, edges: Tensor) -> Tensor:
    """[B, n, d] and [B, m, 2] -> [B, m]; the gradient of an edge of length 0 is 0."""
    ends = points.gather(1, edges.flatten(1)[..., None].expand(-1, -1, points.shape[2]))
    a, b = ends.unflatten(1, (edges.shape[1], 2)).unbind(2)
    return torch.linalg.vector_norm(a - b, dim=-1)
