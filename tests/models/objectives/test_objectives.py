"""Objectives as functions: what is hidden, what is asked, with which weight; the likelihood bound by enumeration."""

import itertools
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from conceptron.models.config import ConceptConfig
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.objectives import OBJECTIVES, Diffusion, MaskedLM, SampleKey, SpecialTokens, View
from conceptron.models.objectives.view import low_discrepancy_t
from conceptron.models.packing import Packed, pack

VOCAB = 50
TOKENS = SpecialTokens(mask_id=3, special_ids=frozenset({0, 1, 2, 3}), vocab_size=VOCAB)
EVERY = [
    MaskedLM(), MaskedLM(random=0.1, unchanged=0.1, hidden="mask"), Diffusion(), Diffusion(weighting="selfnorm"),
    Diffusion(encoder_view="clean"), Diffusion(weighting="none", hidden="mask"),
]  # fmt: skip


def text(lengths=(17, 0, 1, 40, 5), seed=0) -> list[np.ndarray]:
    """Ordinary words, and a special token at each end of the longer sequences."""
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(4, VOCAB, size=n) for n in lengths]
    for ids in sequences:
        if len(ids) > 2:
            ids[0], ids[-1] = 1, 2
    return sequences


def keys(count: int, epoch: int = 0) -> list[SampleKey]:
    return [SampleKey(7, epoch, i) for i in range(count)]


def tensors(view: View) -> list[Tensor]:
    flat = []
    for field in fields(view):
        value = getattr(view, field.name)
        flat += [x for x in value if isinstance(x, Tensor)] if isinstance(value, Packed) else [value]
    return [x for x in flat if isinstance(x, Tensor)]


def by_sequence(view: View) -> list[tuple]:
    """For each sequence: what the encoder reads and what is asked, as plain lists."""
    result = []
    for b in range(view.encoder.num_sequences):
        reads = slice(*view.encoder.cu_seqlens[b : b + 2].tolist())
        asks = slice(*view.decoder_cu_seqlens[b : b + 2].tolist())
        result.append((
            view.encoder.input_ids[reads].tolist(), view.encoder.position_ids[reads].tolist(),
            view.decoder_position_ids[asks].tolist(), view.decoder_input_ids[asks].tolist(),
            view.targets[asks].tolist(), view.weights[asks].tolist(), view.seen[asks].tolist(),
            None if view.timesteps is None else float(view.timesteps[b]),
        ))  # fmt: skip
    return result


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_a_view_is_a_pure_function_of_text_and_key(objective):
    sequences = text()
    np.random.seed(0)
    torch.manual_seed(0)
    first = objective.view(pack(sequences), keys(5), TOKENS)
    np.random.seed(1)
    torch.manual_seed(1)
    again = objective.view(pack(sequences), keys(5), TOKENS)
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(again), strict=True))
    other = objective.view(pack(sequences), keys(5, epoch=1), TOKENS)
    assert by_sequence(first) != by_sequence(other)


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_a_sequence_is_corrupted_alike_in_every_batch(objective):
    sequences, names = text(), keys(5)
    whole = by_sequence(objective.view(pack(sequences), names, TOKENS))
    order = [3, 0, 4]
    part = objective.view(pack([sequences[i] for i in order]), [names[i] for i in order], TOKENS)
    assert by_sequence(part) == [whole[i] for i in order]


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_targets_are_the_clean_tokens_and_never_special(objective):
    sequences = text()
    view = objective.view(pack(sequences), keys(5), TOKENS)
    assert view.num_targets > 5
    for ids, (reads, read_at, asked_at, _, targets, _, seen, _) in zip(sequences, by_sequence(view), strict=True):
        assert targets == [int(ids[p]) for p in asked_at]
        assert not set(targets) & TOKENS.special_ids
        visible = dict(zip(read_at, reads, strict=True))
        for position, target, was_seen in zip(asked_at, targets, seen, strict=True):
            assert not was_seen or visible[position] == target
        if ids.size > 2:  # special tokens stay visible
            assert visible[0] == 1 and visible[len(ids) - 1] == 2
    assert view.encoder.num_positions().tolist() == [len(ids) for ids in sequences]


def test_noisy_targets_are_absent_or_masked_and_clean_ones_are_all_seen():
    batch = pack(text())
    drop, mask, clean = (
        Diffusion(**options).view(batch, keys(5), TOKENS)
        for options in ({}, {"hidden": "mask"}, {"encoder_view": "clean"})
    )
    assert not drop.seen.any() and not mask.seen.any() and clean.seen.all()
    assert drop.encoder.num_tokens == batch.num_tokens - drop.num_targets
    assert (mask.encoder.input_ids == TOKENS.mask_id).sum() == mask.num_targets
    assert mask.encoder.num_tokens == batch.num_tokens
    assert torch.equal(clean.encoder.input_ids, batch.input_ids)
    assert torch.equal(drop.targets, clean.targets) and (clean.decoder_input_ids == TOKENS.mask_id).all()


def test_bert_corruption_has_its_rates_and_labels():
    rng = np.random.default_rng(0)
    batch = pack([rng.integers(4, VOCAB, size=500) for _ in range(40)])
    view = MaskedLM(probability=0.3, random=0.1, unchanged=0.1, hidden="mask").view(batch, keys(40), TOKENS)
    n, m = batch.num_tokens, view.num_targets
    assert abs(m / n - 0.3) < 4 * math.sqrt(0.3 * 0.7 / n)
    hidden = view.decoder_input_ids == TOKENS.mask_id
    same = view.decoder_input_ids == view.targets
    assert abs(float(hidden.float().mean()) - 0.8) < 4 * math.sqrt(0.16 / m)
    chance = 0.1 / (VOCAB - 4)  # a random token may be the right one; it is not labelled seen
    assert abs(float(same.float().mean()) - 0.1 - chance) < 4 * math.sqrt(0.09 / m)
    assert (view.seen <= same).all() and abs(float(view.seen.float().mean()) - 0.1) < 4 * math.sqrt(0.09 / m)
    assert view.divisor == m and (view.weights == 1).all()
    assert not set(view.decoder_input_ids[~hidden].tolist()) & TOKENS.special_ids


def test_times_are_spread_evenly_in_every_run_of_indices():
    """Every stretch of B consecutive samples has one time in each of B / 2 equal bins, however it is cut."""
    for start, count in ((0, 32), (5, 32), (1000003, 256)):
        t = low_discrepancy_t([SampleKey(1, 0, start + i) for i in range(count)], eps=1e-3)
        assert t.min() > 1e-3 and t.max() <= 1
        bins = np.bincount(((t - 1e-3) / (1 - 1e-3) * (count // 2)).astype(int).clip(max=count // 2 - 1))
        assert bins.min() >= 1 and bins.max() <= 4
        assert abs(t.mean() - 0.5) < 1.5 / count
    assert low_discrepancy_t([SampleKey(1, 0, 5)], 1e-3) != low_discrepancy_t([SampleKey(2, 0, 5)], 1e-3)


def test_weights_and_divisors():
    batch, names = pack(text((40, 30, 25))), keys(3)
    mdlm, selfnorm, plain = (Diffusion(weighting=w, t_floor=0.3) for w in ("mdlm", "selfnorm", "none"))
    view = mdlm.view(batch, names, TOKENS)
    t = view.timesteps.repeat_interleave(view.decoder_cu_seqlens.diff())
    assert torch.allclose(view.weights, 1 / t) and view.divisor == 40 + 30 + 25 - 6  # all tokens that are not special
    view = selfnorm.view(batch, names, TOKENS)
    assert torch.allclose(view.weights, 1 / t.clamp_min(0.3)) and torch.isclose(view.divisor, view.weights.sum())
    view = plain.view(batch, names, TOKENS)
    assert (view.weights == 1).all() and view.divisor == view.num_targets


def test_divisors_add_up_over_parts_of_a_batch():
    sequences, names = text((40, 30, 25, 0)), keys(4)
    for objective in EVERY:
        whole = objective.view(pack(sequences), names, TOKENS).divisor
        parts = [objective.view(pack(sequences[i : i + 2]), names[i : i + 2], TOKENS).divisor for i in (0, 2)]
        assert torch.isclose(whole, sum(parts))


def test_evaluation_grids_are_fixed_and_nested():
    batch, names = pack(text((200, 100))), keys(2)
    views = Diffusion().evaluation_views(batch, names, TOKENS)
    assert list(views) == ["t=0.10", "t=0.30", "t=0.50", "t=0.70", "t=0.90", "t=1.00"]
    hidden = [set(view.decoder_position_ids[: view.decoder_cu_seqlens[1]].tolist()) for view in views.values()]
    assert all(a < b for a, b in itertools.pairwise(hidden)) and len(hidden[-1]) == 198
    views = MaskedLM(probability=0.2, random=0.1, unchanged=0.1).evaluation_views(batch, names, TOKENS)
    assert list(views) == ["mask=0.15", "mask=0.20", "mask=0.30", "mask=0.50"]
    assert not any(view.seen.any() for view in views.values())


def test_uniform_predictor_has_a_bound_of_ln_v():
    """Monte-Carlo over keys: sum(w * ln V) / divisor is ln V; when self-normalised, without any error."""
    rng = np.random.default_rng(0)
    batch, names = pack([rng.integers(4, VOCAB, size=64) for _ in range(2000)]), keys(2000)
    view = Diffusion().view(batch, names, TOKENS)
    share = view.weights.double().new_zeros(2000).index_add(
        0, torch.repeat_interleave(torch.arange(2000), view.decoder_cu_seqlens.diff()), view.weights.double()
    ) / 64  # fmt: skip
    estimate, error = float(share.mean()) * math.log(VOCAB), float(share.std() / math.sqrt(2000)) * math.log(VOCAB)
    assert 0 < error < 0.1
    assert abs(estimate - math.log(VOCAB)) < 4 * error
    view = Diffusion(weighting="selfnorm").view(batch, names, TOKENS)
    assert float(view.weights.double().sum() / view.divisor) == pytest.approx(1.0, rel=1e-6)


def tiny_model(**options) -> ConceptForMaskedLM:
    torch.manual_seed(0)
    config = ConceptConfig(
        vocab_size=8, hidden_size=16, num_concepts=2, num_attention_heads=2, intermediate_size=24,
        num_hidden_layers=1, num_decoder_layers=1, timestep_conditioning=False, mask_token_id=3, **options,
    )  # fmt: skip
    model = ConceptForMaskedLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that what is visible matters
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def test_the_bound_equals_its_enumeration():
    """Three tokens, seven ways to hide k of them, each with chance t^k (1-t)^(n-k), integrated over t on a grid."""
    model, words, n, eps = tiny_model(), [5, 7, 4], 3, 0.05
    exact, t = 0.0, eps + (1 - eps) * (np.arange(100000) + 0.5) / 100000
    for subset in itertools.product([False, True], repeat=n):
        k = sum(subset)
        if k == 0:
            continue
        shown = torch.tensor([[3 if hide else word for word, hide in zip(words, subset, strict=True)]])
        with torch.no_grad():
            nll = -model(shown).logits[0].log_softmax(-1)[range(n), words]
        measure = float(np.mean(t**k * (1 - t) ** (n - k) / t))
        exact += measure * float(nll[list(subset)].sum()) / n

    count = 6000
    tokens = SpecialTokens(3, frozenset({3}), 8)
    view = Diffusion(eps=eps).view(pack([words] * count), keys(count), tokens)
    with torch.no_grad():
        out = model(view=view, return_nll=True)
    owner = torch.repeat_interleave(torch.arange(count), view.decoder_cu_seqlens.diff())
    each = torch.zeros(count, dtype=torch.float64).index_add(0, owner, (view.weights * out.nll).double()) / n
    error = float(each.std() / math.sqrt(count))
    assert float(each.mean()) == pytest.approx(float(out.loss), rel=1e-5)
    assert error < 0.06 and abs(float(out.loss) - exact) < 4 * error
    visible = model(torch.tensor([[5, 7, 3]])).logits[0, 2] - model(torch.tensor([[6, 7, 3]])).logits[0, 2]
    assert visible.abs().max() > 0.05  # else the enumeration would hold for any mask


def test_a_hidden_token_depends_on_the_visible_ones_only():
    """The decoder mixes nothing: other rows of the canvas reach a row through the concepts alone."""
    model = tiny_model()
    batch, tokens = pack([[5, 6, 7, 4, 5, 6, 7, 4]]), SpecialTokens(3, frozenset({3}), 8)
    for encoder_view in ("noisy", "clean"):
        view = Diffusion(encoder_view=encoder_view).view_at(np.array([0.5]), batch, keys(1), tokens)
        base = model(view=view, return_nll=True).nll
        ids = view.decoder_input_ids.clone()
        ids[1:] = 4
        assert torch.equal(model(view=replace(view, decoder_input_ids=ids), return_nll=True).nll[0], base[0])
        hidden = set(view.decoder_position_ids.tolist())
        row = next(i for i, p in enumerate(view.encoder.position_ids.tolist()) if p not in hidden)
        ids = view.encoder.input_ids.clone()
        ids[row] = 4 if ids[row] != 4 else 5
        changed = replace(view, encoder=view.encoder._replace(input_ids=ids))
        assert (model(view=changed, return_nll=True).nll - base).abs().min() > 1e-4


@pytest.mark.parametrize("objective", [Diffusion(), Diffusion(encoder_view="clean"), MaskedLM()], ids=str)
def test_context_rows_are_all_that_is_not_asked(objective):
    """The same view, and in the decoder each text as it would be shown, with [MASK] where something is hidden."""
    batch, names = pack(text()), keys(5)
    plain, view = (replace(objective, context=c).view(batch, names, TOKENS) for c in (False, True))
    for name in ("targets", "weights", "seen", "timesteps", "divisor"):
        ours, theirs = getattr(view, name), getattr(plain, name)
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert all(torch.equal(*pair) for pair in zip(view.encoder[:3], plain.encoder[:3], strict=True))
    assert torch.equal(view.decoder_cu_seqlens, batch.cu_seqlens)
    assert torch.equal(view.decoder_position_ids, batch.position_ids)
    assert torch.equal(view.decoder_position_ids[view.target_rows], plain.decoder_position_ids)
    expected = batch.input_ids.clone()
    expected[view.target_rows] = TOKENS.mask_id
    assert 0 < view.num_targets < len(expected) and torch.equal(view.decoder_input_ids, expected)


@pytest.mark.parametrize("mixing", ["none", "local", "concepts"])
def test_a_known_token_reaches_a_target_directly_only_if_rows_are_mixed(mixing):
    """The encoder is kept as it is, and one context row says another word."""
    model = tiny_model(decoder_mixing=mixing)
    batch, tokens = pack([[5, 6, 7, 4, 5, 6, 7, 4]]), SpecialTokens(3, frozenset({3}), 8)
    view = Diffusion(context=True).view_at(np.array([0.5]), batch, keys(1), tokens)
    base = model(view=view, return_nll=True).nll
    row = next(i for i, token in enumerate(view.decoder_input_ids.tolist()) if token != 3)
    ids = view.decoder_input_ids.clone()
    ids[row] = 4 if ids[row] != 4 else 5
    moved = (model(view=replace(view, decoder_input_ids=ids), return_nll=True).nll - base).abs()
    assert 0 < len(moved) < 8 and ((moved == 0).all() if mixing == "none" else (moved > 1e-6).all())


def test_the_bound_of_a_perfect_denoiser_is_the_negative_log_likelihood():
    """Any joint distribution of three words: its own conditionals, weighted as diffusion does over all ways to hide,
    are -ln p(text) exactly, since hiding k of n has the weight int t^(k-1) (1-t)^(n-k) dt = (k-1)! (n-k)! / n!."""
    rng, n, V = np.random.default_rng(0), 3, 4
    joint = rng.dirichlet(np.full(V**n, 0.3)).reshape(V, V, V) + 1e-3
    joint /= joint.sum()
    words = (2, 0, 3)

    def nll(place: int, hidden: tuple[bool, ...]) -> float:  # -ln p(word at place | words that are not hidden)
        p = joint[tuple(slice(None) if h else word for h, word in zip(hidden, words, strict=True))]
        axis = sum(hidden[:place])
        return -math.log(p.sum(tuple(i for i in range(p.ndim) if i != axis))[words[place]] / p.sum())

    exact = 0.0
    for hidden in itertools.product([False, True], repeat=n):
        k = sum(hidden)
        if k:
            weight = math.factorial(k - 1) * math.factorial(n - k) / math.factorial(n)
            exact += weight * sum(nll(i, hidden) for i in range(n) if hidden[i])
    assert exact == pytest.approx(-math.log(joint[words]), rel=1e-12)

    count, tokens = 4000, SpecialTokens(4, frozenset({4}), 5)
    view = Diffusion(context=True).view(pack([list(words)] * count), keys(count), tokens)
    is_hidden = (view.decoder_input_ids == 4).view(count, n).tolist()
    places = (view.target_rows % n).tolist()
    owners = torch.div(view.target_rows, n, rounding_mode="floor")
    losses = torch.tensor([nll(i, tuple(is_hidden[b])) for i, b in zip(places, owners.tolist(), strict=True)])
    each = torch.zeros(count).index_add(0, owners, view.weights * losses)
    assert abs(float(each.mean()) - exact) < 4 * float(each.std()) / math.sqrt(count) < 0.6


def test_a_target_is_invisible_to_a_noisy_encoder_and_not_to_a_clean_one():
    model, tokens = tiny_model(), SpecialTokens(3, frozenset({3}), 8)
    text = [5, 6, 7, 4, 5, 6, 7, 4]
    for encoder_view, is_same in (("noisy", True), ("clean", False)):
        objective = Diffusion(encoder_view=encoder_view)
        view = objective.view_at(np.array([0.5]), pack([text]), keys(1), tokens)
        other = list(text)
        other[int(view.decoder_position_ids[0])] = 4 if view.targets[0] != 4 else 5
        changed = objective.view_at(np.array([0.5]), pack([other]), keys(1), tokens)
        concepts = [model(view=v).concepts for v in (view, changed)]
        assert torch.equal(*concepts) == is_same


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_a_batch_without_text_has_loss_zero_and_no_nan(objective):
    model = tiny_model()
    for sequences in ([], [[]], [[3], []]):
        view = objective.view(pack(sequences), keys(len(sequences)), SpecialTokens(3, frozenset({3}), 8))
        assert view.num_targets == 0
        loss = model(view=view).loss
        loss.backward()
        assert loss == 0 and all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("mlm", {"probability": 0.0}, ["probability", "[1e-30, 1]", "0.0"]),
        ("mlm", {"random": 0.6, "unchanged": 0.5}, ["unchanged", "0.4", "0.5"]),
        ("mlm", {"hidden": "blank"}, ["hidden", "drop", "blank"]),
        ("diffusion", {"weighting": "elbo"}, ["weighting", "mdlm", "elbo"]),
        ("diffusion", {"encoder_view": "dirty"}, ["encoder_view", "noisy", "dirty"]),
        ("diffusion", {"context": 1}, ["context", "true or false", "1"]),
        ("mlm", {"context": "yes"}, ["context", "true or false", "yes"]),
        ("diffusion", {"eps": 0.0}, ["eps", "[1e-30, 1)", "0.0"]),
        ("diffusion", {"t_floor": 1.5}, ["t_floor", "[1e-30, 1]", "1.5"]),
    ],
)
def test_wrong_options_are_refused_by_name(name, options, words):
    with pytest.raises(ValueError) as error:
        OBJECTIVES[name](**options)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="keys: expected one for each of the B = 2 sequences, got 1"):
        MaskedLM().view(pack([[4], [5]]), keys(1), TOKENS)
    with pytest.raises(ValueError, match=r"input_ids: expected ids in \[0, 50\), got 77"):
        MaskedLM().view(pack([[4, 77]]), keys(1), TOKENS)
