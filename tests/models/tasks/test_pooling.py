"""Pools: against loops, at C = 1, and as they start."""

import math

import pytest
import torch

from conceptron.models.config import ConceptConfig
from conceptron.models.layers import ZeroLinear
from conceptron.models.pretrained import ConceptPreTrainedModel
from conceptron.models.tasks.pooling import concept_pool, mean_of_rows

D, H, HKV, I, Q = 32, 4, 2, 48, 3
POOLS = ("mean", "weighted", "attention", "cls_query", "multi_query")


class Only(ConceptPreTrainedModel):
    """A pool by itself, initialised as in a model."""

    def __init__(self, config: ConceptConfig):
        super().__init__(config)
        self.pool = concept_pool(config)
        self.post_init()


def pool(kind: str, seed: int = 0, opened: bool = True) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = ConceptConfig(
        vocab_size=60, hidden_size=D, num_attention_heads=H, num_key_value_heads=HKV, intermediate_size=I,
        num_pool_queries=Q, pool=kind,
    )  # fmt: skip
    module = Only(config).pool.double()
    for part in module.modules():
        if opened and isinstance(part, ZeroLinear):
            torch.nn.init.normal_(part.weight)
        if opened and isinstance(part, torch.nn.Embedding):
            torch.nn.init.normal_(part.weight)
    return module


def concepts(B: int = 3, C: int = 7) -> torch.Tensor:
    return torch.randn(B, C, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind, num_scores", [("weighted", 1), ("attention", H)])
def test_weighted_means_equal_a_loop(kind, num_scores):
    module, c = pool(kind).requires_grad_(False), concepts()
    expected, width = torch.zeros(3, D, dtype=torch.float64), D // num_scores
    for b in range(3):
        for s in range(num_scores):
            scores = [float(concept @ module.score.weight[s]) for concept in c[b]]
            total = sum(math.exp(score) for score in scores)
            channels = slice(s * width, (s + 1) * width)
            for score, concept in zip(scores, c[b], strict=True):
                expected[b, channels] += math.exp(score) / total * concept[channels]
    assert torch.allclose(module(c), expected, atol=1e-12)


@pytest.mark.parametrize("kind, num_queries", [("cls_query", 1), ("multi_query", Q)])
def test_query_pools_equal_a_loop(kind, num_queries):
    module, c = pool(kind), concepts()
    width, expected = D // H, torch.zeros(3, D, dtype=torch.float64)
    for b in range(3):
        for query in module.queries.weight:
            heads = []
            for h in range(H):
                rows = slice(h // (H // HKV) * width, (h // (H // HKV) + 1) * width)
                keys, values = c[b] @ module.key.weight[rows].T, c[b] @ module.value.weight[rows].T
                weights = (keys @ query[h * width : (h + 1) * width] / math.sqrt(width)).softmax(0)
                heads.append(weights @ values)
            read = module.out.weight @ torch.cat(heads)
            normal = read / (read.square().mean() + 1e-6).sqrt() * module.feed_norm.weight
            gate, up = (module.feed.gate_up.weight @ normal).chunk(2)
            expected[b] += (read + module.feed.down.weight @ (gate * gate.sigmoid() * up)) / num_queries
    assert module.queries.num_embeddings == num_queries
    assert torch.allclose(module(c), expected, atol=1e-10)


def test_one_concept_is_pooled_alike():
    """C = 1: means of any weights are that concept; queries all read it, so their number and content do not matter."""
    c = concepts(C=1)
    for kind in ("mean", "weighted", "attention"):
        assert torch.allclose(pool(kind)(c), c[:, 0], atol=1e-12)
    one, many = pool("cls_query", seed=1), pool("multi_query", seed=2)
    weights = {name: value for name, value in one.state_dict().items() if name != "queries.weight"}
    many.load_state_dict(weights, strict=False)
    assert torch.allclose(one(c), many(c), atol=1e-12)
    assert not torch.allclose(one(concepts()), many(concepts()), atol=1e-3)


def test_weighted_pools_start_as_the_mean_and_queries_near_it():
    c = concepts()
    for kind in ("weighted", "attention"):
        assert torch.allclose(pool(kind, opened=False)(c), c.mean(1), atol=1e-12)
    module = pool("multi_query", opened=False)
    blind = pool("multi_query", opened=False)
    torch.nn.init.zeros_(blind.queries.weight)  # scores of zero: the mean of the values
    assert torch.allclose(module(c), blind(c), rtol=0, atol=0.05 * float(blind(c).detach().std()))
    assert len(set(module.queries.weight[:, 0].tolist())) == Q  # but no two alike


@pytest.mark.parametrize("kind", POOLS)
def test_order_and_batch_do_not_matter(kind):
    module, c = pool(kind), concepts()
    assert torch.allclose(module(c[:, torch.randperm(7)]), module(c), atol=1e-12)
    assert torch.allclose(module(c[1:2]), module(c)[1:2], atol=1e-12)
    assert module(c[:0]).shape == (0, D)


@pytest.mark.parametrize("kind, expected", [
    ("mean", 0), ("weighted", D), ("attention", H * D),
    ("cls_query", D + 2 * D * HKV * D // H + D * D + D + 3 * D * I),
    ("multi_query", Q * D + 2 * D * HKV * D // H + D * D + D + 3 * D * I),
])  # fmt: skip
def test_parameters_equal_their_closed_form(kind, expected):
    assert sum(parameter.numel() for parameter in pool(kind).parameters()) == expected


@pytest.mark.parametrize("kind", POOLS)
def test_gradients_are_those_of_finite_differences(kind):
    module, c = pool(kind), concepts(B=2, C=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: module(x), (c,), fast_mode=True)
    module(c).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in module.parameters())


def test_mean_of_rows_of_ragged_and_empty_texts():
    rows = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 0, 5, 5, 6, 9], dtype=torch.int32)
    out = mean_of_rows(rows, cu_seqlens)
    expected = [torch.zeros(4), rows[:5].mean(0), torch.zeros(4), rows[5], rows[6:9].mean(0)]
    assert torch.allclose(out, torch.stack([part.double() for part in expected]), atol=1e-12)
    out.sum().backward()
    assert torch.allclose(rows.grad[:, 0], torch.tensor([0.2] * 5 + [1.0] + [1 / 3] * 3, dtype=torch.float64))
    half = mean_of_rows(rows.detach().bfloat16(), cu_seqlens)
    assert half.dtype == torch.bfloat16 and mean_of_rows(rows[:0], torch.zeros(3, dtype=torch.int32)).shape == (2, 4)
