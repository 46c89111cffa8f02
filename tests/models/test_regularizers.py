"""Concept regularisers: known values, populations, exact trees, and what the weighting may and may not do."""

import math

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import pdist, squareform
from torch import Tensor
from torch.nn import functional as F

from conceptron.models import regularizers
from conceptron.models.regularizers import TERMS, WITHIN_TEXT, GradientCap, Regularization, Regularizer
from conceptron.models.similarity import unit


def concepts(B=4, C=6, d=16, seed=0, dtype=torch.float64) -> Tensor:
    return 4 * torch.randn(B, C, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthogonal(B=3, C=6, d=16) -> Tensor:
    torch.manual_seed(0)
    return torch.stack([torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0][:C] * 4 for _ in range(B)])


def identical(B=3, C=6, d=16) -> Tensor:
    return concepts(B, 1, d).expand(B, C, d)


@pytest.mark.parametrize(
    "name, of_orthogonal, of_identical",
    [
        ("orthogonality", 0.0, 1.0),
        ("soft_orthogonality", 0.0, 0.81),
        ("uniformity", math.exp(-4), 1.0),
        ("t_regs", -math.sqrt(2), 0.0),
        ("nearest_neighbor", -math.sqrt(2), 0.0),
        ("entropy_rank", 0.0, 1.0),
        # eigenvalues of the Gram matrix: six times 1, and once 6
        ("log_det", -math.log(1 + 16 / (6 * 0.25)) / 2, -math.log(1 + 16 / 0.25) / 12),
    ],
)
def test_known_values_within_a_text(name, of_orthogonal, of_identical):
    assert float(TERMS[name](orthogonal())) == pytest.approx(of_orthogonal, abs=1e-5)
    assert float(TERMS[name](identical())) == pytest.approx(of_identical, abs=1e-5)


def test_means_over_pairs_against_a_loop():
    z = concepts()
    cosines = [float(F.cosine_similarity(z[b, i], z[b, j], dim=0)) for b in range(4) for i in range(6) for j in range(6)
               if i != j]  # fmt: skip
    cosines = np.array(cosines)
    assert float(regularizers.orthogonality(z)) == pytest.approx((cosines**2).mean(), rel=1e-6)
    soft = np.maximum(np.abs(cosines) - 0.1, 0) ** 2
    assert float(regularizers.soft_orthogonality(z)) == pytest.approx(soft.mean(), rel=1e-6)
    assert float(regularizers.uniformity(z)) == pytest.approx(np.exp(-2 * (2 - 2 * cosines)).mean(), rel=1e-6)


@pytest.mark.parametrize("shape", [(9, 3, 4), (4, 3, 9), (5, 3, 5)])
def test_variance_and_covariance_against_numpy(shape):
    """Each concept by itself, over the batch; both ways of summing the covariance."""
    z = concepts(*shape) / 5
    variance, covariance = [], []
    for c in range(shape[1]):
        cov = np.cov(z[:, c].numpy(), rowvar=False)
        variance.append(np.maximum(1 - np.sqrt(np.diag(cov) + 1e-4), 0).mean())
        covariance.append(((cov - np.diag(np.diag(cov))) ** 2).sum() / shape[2])
    assert float(regularizers.variance(z)) == pytest.approx(np.mean(variance), rel=1e-6)
    assert float(regularizers.covariance(z)) == pytest.approx(np.mean(covariance), rel=1e-6)
    assert float(regularizers.vicreg(z)) == pytest.approx(np.mean(variance) + np.mean(covariance), rel=1e-6)


def test_static_concepts_do_not_satisfy_the_batch_terms():
    """Concepts that differ from each other in the same way in every text: diverse, and empty."""
    static = orthogonal(1).expand(8, 6, 16)
    assert float(regularizers.variance(static)) == pytest.approx(0.99, abs=1e-3)
    flattened = F.relu(1 - torch.sqrt(static.reshape(-1, 16).var(0) + 1e-4)).mean()  # the population this replaces
    assert flattened < 0.5
    assert float(regularizers.orthogonality(static)) == pytest.approx(0, abs=1e-6)


def test_log_det_and_entropy_against_eigenvalues():
    for shape in ((2, 5, 12), (2, 12, 5)):
        z = concepts(*shape)
        _, C, d = shape
        values = np.stack([np.linalg.svd(F.normalize(x, dim=-1).numpy(), compute_uv=False) for x in z])
        rate = np.log1p(values**2 * d / (C * 0.25)).sum(1) / 2
        assert float(regularizers.log_det(z)) == pytest.approx(-rate.mean() / C, rel=1e-6)
        share = values / values.sum(1, keepdims=True)
        entropy = -(share * np.log(share)).sum(1).mean()
        assert float(regularizers.entropy_rank(z)) == pytest.approx(1 - entropy / math.log(min(C, d)), rel=1e-6)


@pytest.mark.parametrize("n, d", [(2, 3), (7, 2), (40, 5)])
def test_spanning_tree_against_scipy(n, d):
    z = concepts(5, n, d)
    edges = regularizers.spanning_tree(z)
    assert edges.shape == (5, n - 1, 2)
    for points, of_text, found in zip(z.numpy(), edges.numpy(), regularizers.lengths(z, edges), strict=True):
        tree = minimum_spanning_tree(squareform(pdist(points)))
        expected = {frozenset(edge) for edge in zip(*tree.nonzero(), strict=True)}
        assert {frozenset(edge.tolist()) for edge in of_text} == expected
        assert float(found.sum()) == pytest.approx(tree.sum(), rel=1e-9)


def test_t_regs_is_the_mean_edge_on_the_sphere():
    z = concepts(3, 9, 4)
    expected = [minimum_spanning_tree(squareform(pdist(F.normalize(x, dim=-1).numpy()))).sum() / 8 for x in z]
    assert float(regularizers.t_regs(z)) == pytest.approx(-np.mean(expected), rel=1e-6)
    nearest = [np.sort(squareform(pdist(F.normalize(x, dim=-1).numpy())), axis=1)[:, 1].mean() for x in z]
    assert float(regularizers.nearest_neighbor(z)) == pytest.approx(-np.mean(nearest), rel=1e-6)


def test_nearest_neighbours_are_content_with_pairs_and_the_tree_is_not():
    """Two tight clusters, drawn apart: only the tree has an edge between them."""
    a, b = torch.eye(4, dtype=torch.float64)[:2]
    near, far = (
        torch.stack([a, a + 0.01 * b, turned, turned + 0.01 * torch.eye(4, dtype=torch.float64)[2]])[None]
        for turned in (a + 0.3 * b, b)
    )
    assert abs(float(regularizers.nearest_neighbor(near) - regularizers.nearest_neighbor(far))) < 2e-3
    assert float(regularizers.t_regs(near) - regularizers.t_regs(far)) > 0.3


@pytest.mark.parametrize("name", sorted(TERMS))
def test_gradients_by_finite_differences(name):
    z = concepts(3, 4, 5) / 4
    assert torch.autograd.gradcheck(TERMS[name], z.requires_grad_())


def test_t_regs_gradient_by_hand_made_finite_differences():
    z = concepts(2, 5, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(regularizers.t_regs(z), z)
    for index in ((0, 0, 0), (0, 3, 2), (1, 4, 1)):
        step = torch.zeros_like(z)
        step[index] = 1e-5
        with torch.no_grad():
            difference = float(regularizers.t_regs(z + step) - regularizers.t_regs(z - step)) / 2e-5
        assert abs(difference) > 1e-4 and float(gradient[index]) == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("name", sorted(TERMS))
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", [(1, 6, 8), (4, 1, 8), (1, 1, 8), (0, 6, 8), (4, 6, 1), (3, 9, 4)])
def test_small_and_degenerate_populations_are_finite(name, dynamic, shape):
    """Duplicates and zeros too, and no gradient grows out of hand at them."""
    options = Regularization(terms=(name,), weight=1.0, warmup_steps=0, dynamic=dynamic)
    for z in (concepts(*shape), torch.ones(shape), torch.zeros(shape), identical(*shape) * 1.0):
        if z.numel():
            z[0, 0] = 0.0  # a dead concept
        z = z.float().requires_grad_()
        added = Regularizer(options)(z, 5)
        added.loss.backward()
        assert added.loss.shape == () and torch.isfinite(added.loss)
        assert torch.isfinite(z.grad).all() and (z.numel() == 0 or z.grad.abs().max() < 1e5)
    if shape[0] == 0 or (shape[0] == 1 and (dynamic or name not in WITHIN_TEXT)):
        assert added.loss == 0


@pytest.mark.parametrize("name", sorted(WITHIN_TEXT))
def test_the_dynamic_form_sees_differences_between_texts_only(name):
    z, static = concepts(5), 3 * orthogonal(1)
    options = Regularization(terms=(name,), weight=1.0, warmup_steps=0, dynamic=True)
    values = [float(Regularizer(options)(x, 0).loss) for x in (z, z + static)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    plain = [float(TERMS[name](x)) for x in (z, z + static)]
    assert abs(plain[0] - plain[1]) > 1e-3
    assert values[0] == pytest.approx(float(TERMS[name](z - z.mean(0))), rel=1e-6)


def test_bfloat16_and_autocast_are_computed_in_float32():
    z = concepts(dtype=torch.bfloat16)
    for name, term in TERMS.items():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = term(z)
        assert value.dtype == torch.float32 and float(value) == pytest.approx(float(term(z.double())), rel=1e-4), name


def test_fixed_shares_sum_to_the_weight_and_parts_are_reported():
    names = ("vicreg", "t_regs", "orthogonality")
    z = concepts()
    added = Regularizer(Regularization(terms=names, weight=0.06, warmup_steps=0))(z, 0)
    assert sum(map(float, added.weights.values())) == pytest.approx(0.06)
    assert set(added.terms) == set(names) and len({float(w) for w in added.weights.values()}) == 1
    for name in names:
        assert float(added.terms[name]) == pytest.approx(float(TERMS[name](z)), rel=1e-6)
        assert not added.terms[name].requires_grad
    assert float(added.loss) == pytest.approx(sum(float(added.terms[n] * added.weights[n]) for n in names), rel=1e-6)


def test_warm_up_is_a_straight_line_from_0_to_1():
    regularizer = Regularizer(Regularization(weight=0.5, warmup_steps=200))
    values = [float(regularizer(concepts(), step).loss) for step in (0, 50, 100, 200, 5000)]
    assert values[0] == 0 and values[3] == values[4] > 0
    assert values[1] / values[3] == pytest.approx(0.25) and values[2] / values[3] == pytest.approx(0.5)


def train(regularizer: Regularizer, scale: float, steps: int = 300):
    """Trains the weighting alone, on concepts that stay as they are: every term times ``scale``."""
    z = concepts()
    terms = torch.stack([TERMS[name](z) for name in regularizer.options.terms]) * scale
    optimizer = torch.optim.Adam(regularizer.parameters(), lr=0.05)
    for _ in range(steps):
        share, penalty = regularizer.shares(terms)
        optimizer.zero_grad()
        ((share * terms).sum() + penalty).backward()
        optimizer.step()
    return regularizer.shares(terms)[0].detach(), terms


def test_kendall_never_outweighs_the_task_however_small_its_terms():
    """The form without a floor would weigh a term of 1e-3 a thousandfold."""
    for scale in (1e-3, 1.0, 50.0):
        options = Regularization(terms=("orthogonality", "uniformity"), weight=1.0, weighting="kendall_gal")
        regularizer = Regularizer(options)
        share, terms = train(regularizer, scale)
        assert 1 / (1 + float(share.sum())) >= 0.5 - 1e-9  # the task's part of all weight
        assert (share <= 0.5).all()
        expected = torch.clamp(1 / terms, max=1) / 2  # exp(-s) = 1 / L where L > 1
        assert torch.allclose(share, expected, rtol=0.1)
    down = train(regularizer, 1e-3)[0]  # from large terms back to small ones: it has not got stuck
    assert torch.allclose(down, torch.full_like(down, 0.5), rtol=0.1)


def test_learnable_shares_sum_to_one_and_move():
    options = Regularization(terms=("orthogonality", "uniformity", "log_det"), weight=0.3, weighting="learnable")
    regularizer = Regularizer(options)
    before = regularizer(concepts(), 10**6)
    assert sum(map(float, before.weights.values())) == pytest.approx(0.3)
    before.loss.backward()
    assert regularizer.logits.grad.abs().max() > 0
    share, terms = train(regularizer, 1.0)
    assert float(share.sum()) == pytest.approx(1.0) and int(share.argmax()) == int(terms.argmin())


@pytest.mark.parametrize("task, bound", [(1e-4, True), (1e4, False)])
def test_gradient_ratio_cap_holds(task, bound):
    z, target = concepts().requires_grad_(), concepts(seed=1)
    regularizer = Regularizer(Regularization(terms=("uniformity",), weight=1.0, warmup_steps=0, gradient_ratio=0.1))
    (of_task,) = torch.autograd.grad(task * (z * target).sum(), z)
    (of_terms,) = torch.autograd.grad(regularizer(z, 0).loss, z)
    assert (of_terms.norm() > 0.1 * of_task.norm()) == bound
    for loss_scale in (1.0, 1024.0):
        for_task, for_terms = regularizer.cap(z)
        loss = task * (for_task * target).sum() + regularizer(for_terms, 0).loss
        (total,) = torch.autograd.grad(loss_scale * loss, z)
        added = total / loss_scale - of_task
        assert added.norm() <= 0.1 * of_task.norm() * (1 + 1e-6)
        expected = of_terms * (0.1 * of_task.norm() / of_terms.norm() if bound else 1.0)
        assert torch.allclose(added, expected, rtol=1e-5, atol=float(expected.abs().max()) * 1e-5)
        assert float(regularizer.cap.scale) == pytest.approx(min(1, float(0.1 * of_task.norm() / of_terms.norm())))


def test_the_cap_lets_nothing_through_without_a_task_and_nothing_is_changed_without_terms():
    z = concepts().requires_grad_()
    first, second = GradientCap(0.1)(z)
    (alone,) = torch.autograd.grad(second.square().sum(), z)
    assert torch.count_nonzero(alone) == 0
    first, _ = GradientCap(0.1)(z)
    (alone,) = torch.autograd.grad(first.square().sum(), z)
    assert torch.equal(alone, 2 * z)
    assert all(x is z for x in GradientCap(None)(z))


def test_unit_has_norm_one_and_a_bounded_gradient():
    z = concepts(dtype=torch.float32)
    assert torch.allclose(unit(z), F.normalize(z, dim=-1), atol=1e-6)
    zero = torch.zeros(3, requires_grad=True)
    unit(zero).sum().backward()
    assert torch.equal(unit(zero), zero) and zero.grad.max() <= 1001


@pytest.mark.parametrize(
    "options, words",
    [
        ({"terms": ()}, ["terms", "one or several of", "()"]),
        ({"terms": ("orthogonal",)}, ["terms", "orthogonality", "orthogonal"]),
        ({"terms": ("vicreg", "vicreg")}, ["terms", "once"]),
        ({"terms": "vicreg"}, ["terms", "one or several", "vicreg"]),
        ({"weight": 0.0}, ["weight", "[1e-30, 1e+30]", "0.0"]),
        ({"weight": 2.0, "weighting": "kendall_gal"}, ["weight", "at most 1", "2.0"]),
        ({"weighting": "equal"}, ["weighting", "fixed, learnable, kendall_gal", "equal"]),
        ({"warmup_steps": -1}, ["warmup_steps", "from 0", "-1"]),
        ({"gradient_ratio": 0.0}, ["gradient_ratio", "[1e-30, 1e+30]", "0.0"]),
        ({"dynamic": "yes"}, ["dynamic", "true or false", "yes"]),
    ],
)
def test_wrong_options_are_refused_by_name(options, words):
    with pytest.raises(ValueError) as error:
        Regularization(**options)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
