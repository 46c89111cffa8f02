"""The training module: its loss against its parts computed one by one, its gradients against a plain sum."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from conceptron.models.config import ConceptConfig
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.objectives import TSDAE, MaskedLM, NoTask, SampleKey, SpecialTokens, View
from conceptron.models.packing import Packed, join, pack
from conceptron.models.pretraining import Compared, ContrastiveTerm, Pretraining, Totals, cache
from conceptron.models.regularizers import Regularization, orthogonality

TOKENS = SpecialTokens(1, frozenset({0, 1}), 60)
SHAPE = dict(
    vocab_size=60, hidden_size=24, num_concepts=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20,
    num_decoder_layers=1, mask_token_id=1,
)  # fmt: skip
LENGTHS = (9, 14, 30, 5, 22)


def batch(lengths=LENGTHS, seed=0) -> tuple[Packed, list[SampleKey]]:
    g = torch.Generator().manual_seed(seed)
    texts = [torch.randint(2, 60, (n,), generator=g) for n in lengths]
    return pack(texts), [SampleKey(0, 0, i + 100 * seed) for i in range(len(lengths))]


def view(objective, term: ContrastiveTerm | None, **options) -> View:
    packed, keys = batch(**options)
    made = objective.view(packed, keys, TOKENS)
    return made if term is None else replace(made, pair=term.pair(packed, keys, TOKENS, objective=objective))


def module(*added, dropout=0.0, **options) -> Pretraining:
    torch.manual_seed(0)
    return Pretraining(ConceptForMaskedLM(ConceptConfig(**SHAPE, dropout=dropout)).double(), *added, **options).double()


def totals(*views: View) -> Totals:
    pairs = sum(int((v.pair.ids >= 0).sum()) for v in views if v.pair is not None)
    texts = sum(v.encoder.num_sequences for v in views)
    return Totals(*(torch.tensor(float(x)) for x in (sum(v.divisor for v in views), pairs or 1, texts)))


def gradient(net: Pretraining, loss: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("objective", [TSDAE(), MaskedLM()])
@pytest.mark.parametrize("pairs", ["adjacent", "deletion"])
def test_the_loss_is_the_sum_of_its_parts(objective, pairs):
    term = ContrastiveTerm(pairs=pairs, weight=0.3, similarity="slots", temperature=0.2)
    net = module(term, Regularization(("orthogonality",), weight=0.5, warmup_steps=10, gradient_ratio=None))
    made = view(objective, term)
    assert made.pair.shares_encoder == (pairs == "deletion" and isinstance(objective, TSDAE))
    out = net(view=made, totals=totals(made), step=5)

    packed, keys = batch()
    a, b, ids = term.views(packed, keys, TOKENS)
    z = net.model.encoder(packed=made.encoder).last_hidden_state
    task = net.model(view=made).loss
    contrast = term.loss(*(net.model.encoder(packed=x).last_hidden_state for x in (a, b)), ids)
    expected = task + 0.3 * contrast + 0.5 * 0.5 * orthogonality(z)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(gradient(net, out.loss), gradient(net, expected))
    assert set(out.figures) == {
        "loss", "task", "contrastive", "temperature", "regularization", "terms/orthogonality", "weights/orthogonality",
    }  # fmt: skip
    assert float(out.figures["weights/orthogonality"]) == 0.25
    assert float(out.figures["temperature"]) == pytest.approx(0.2)


def parts_of(term: ContrastiveTerm, objective) -> tuple[View, list[View]]:
    """Five texts at once, and as two micro-batches of three and two."""
    whole = view(objective, term)
    packed, keys = batch()
    bounds = packed.cu_seqlens.tolist()
    texts = [packed.input_ids[s:e] for s, e in pairwise(bounds)]
    cut = []
    for rows in (slice(0, 3), slice(3, 5)):
        own = pack(texts[rows])
        made = objective.view(own, keys[rows], TOKENS)
        cut.append(replace(made, pair=term.pair(own, keys[rows], TOKENS, objective=objective)))
    return whole, cut


@pytest.mark.parametrize("objective", [TSDAE(), NoTask()])
def test_micro_batches_with_cached_gradients_are_the_whole_batch(objective):
    term = ContrastiveTerm(pairs="deletion", weight=0.7, learnable_temperature=True)
    has_task = not isinstance(objective, NoTask)
    net = module(term, Regularization(("t_regs",), gradient_ratio=None), has_task=has_task)
    whole, cut = parts_of(term, objective)
    direct = net(view=whole, totals=totals(whole), step=9)
    expected = gradient(net, direct.loss)
    assert torch.count_nonzero(expected["temperature.log_excess"]) == 1

    with torch.no_grad():
        compared = [net(pair=part.pair, encoder=part.encoder) for part in cut]
    ahead = cache(compared, [part.pair.ids for part in cut], term, totals(*cut))
    outs = [net(view=p, totals=totals(*cut), step=9, cached=c) for p, c in zip(cut, ahead, strict=True)]
    torch.testing.assert_close(gradient(net, sum(out.loss for out in outs)), expected)
    for name in direct.figures:
        torch.testing.assert_close(sum(out.figures[name] for out in outs), direct.figures[name])


@pytest.mark.parametrize("objective", [TSDAE(), MaskedLM()])
def test_the_pass_ahead_draws_the_same_dropout(objective):
    term = ContrastiveTerm(pairs="deletion")
    net, made = module(term, dropout=0.5), view(objective, term)
    torch.manual_seed(3)
    with torch.no_grad():
        ahead = net(pair=made.pair, encoder=made.encoder)
    seen: list[Compared] = []
    keep = net.contrast
    net.contrast = lambda compared, *rest: (seen.append(compared), keep(compared, *rest))[1]
    torch.manual_seed(3)
    net(view=made, totals=totals(made))
    assert torch.equal(seen[0].a, ahead.a) and torch.equal(seen[0].b, ahead.b)
    with torch.no_grad():
        assert not torch.equal(net(pair=made.pair, encoder=made.encoder).a, ahead.a)


def test_the_cap_holds_against_the_task():
    """The concepts' gradient by the terms is at most a tenth of the task's, and points where it pointed."""
    heavy = Regularization(("orthogonality",), weight=1e3, warmup_steps=0, gradient_ratio=0.1)
    made = view(MaskedLM(), None)
    grads = {}
    for name, options in {"plain": None, "capped": heavy, "free": replace(heavy, gradient_ratio=None)}.items():
        net = module(None, options)
        grads[name] = gradient(net, net(view=made, totals=totals(made), step=1).loss)["model.encoder.concepts.weight"]
        assert (net.cap_scale is not None) == (name == "capped")
    added, free = grads["capped"] - grads["plain"], grads["free"] - grads["plain"]
    assert free.norm() > 10 * grads["plain"].norm()
    assert torch.nn.functional.cosine_similarity(added.flatten(), free.flatten(), dim=0) > 0.99


def test_without_a_task_only_the_encoder_is_trained():
    term = ContrastiveTerm(weight=1.0)
    net, made = module(term, has_task=False), view(NoTask(), term)
    out = net(view=made, totals=totals(made))
    assert set(out.figures) == {"loss", "contrastive", "temperature"}
    assert set(gradient(net, out.loss)) == {f"model.encoder.{name}" for name, _ in net.model.encoder.named_parameters()}
    assert not any(p.requires_grad for p in net.model.decoder.branches.parameters())


@pytest.mark.parametrize("objective", [MaskedLM(), TSDAE(), NoTask()])
def test_a_micro_batch_without_texts_has_no_part_in_anything(objective):
    term = ContrastiveTerm(pairs="deletion")
    has_task = not isinstance(objective, NoTask)
    net = module(term, Regularization(("vicreg", "t_regs", "log_det")), has_task=has_task)
    empty = view(objective, term, lengths=())
    out = net(view=empty, totals=Totals(*torch.ones(3)), step=1)
    assert float(out.loss.detach()) == 0
    assert all(torch.count_nonzero(g) == 0 for g in gradient(net, out.loss).values())


def test_joined_batches_are_packed_as_one():
    (a, _), (b, _) = batch((3, 0, 7)), batch((2, 5), seed=1)
    texts = [x[s:e] for packed in (a, b) for x, bounds in [(packed.input_ids, packed.cu_seqlens.tolist())]
             for s, e in pairwise(bounds)]  # fmt: skip
    whole, joined = pack(texts), join(a, b)
    for one, other in zip(joined[:3], whole[:3], strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype
    assert joined.max_seqlen == 7 and joined.num_positions().tolist() == [3, 0, 7, 2, 5]


@pytest.mark.parametrize("options, word", [
    (dict(weight=0), "weight"), (dict(start=1), "start"), (dict(negatives="all"), "negatives"),
    (dict(learnable_temperature=True, temperature=0.01), "temperature"), (dict(pairs="sentences"), "pairs"),
    (dict(temperature_floor=0), "temperature_floor"),
])  # fmt: skip
def test_wrong_options_are_refused_by_name(options, word):
    with pytest.raises(ValueError, match=f"^{word}: expected"):
        ContrastiveTerm(**options)
