"""Prefix diffusion: the split, its directions and positions, targets and their weights."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from conceptron.models.config import ConceptConfig
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.objectives import OBJECTIVES, PrefixDiffusion, SampleKey, SpecialTokens, View
from conceptron.models.objectives.prefix import DIRECTIONS
from conceptron.models.packing import pack

VOCAB = 60
TOKENS = SpecialTokens(3, frozenset({0, 1, 2, 3}), VOCAB)
EVERY = [
    PrefixDiffusion(), PrefixDiffusion("backward"), PrefixDiffusion("infill", context=True), PrefixDiffusion("mixed"),
    PrefixDiffusion(positions="restart"), PrefixDiffusion("backward", positions="restart", weighting="selfnorm"),
]  # fmt: skip


def keys(count: int, epoch: int = 0) -> list[SampleKey]:
    return [SampleKey(3, epoch, i) for i in range(count)]


def texts(lengths=(40, 0, 1, 97, 2, 3, 10), seed=0) -> list[np.ndarray]:
    g = np.random.default_rng(seed)
    return [g.integers(4, VOCAB, size=n) for n in lengths]


def at_one(objective: PrefixDiffusion, sequences: list, names: list[SampleKey] | None = None) -> View:
    """Everything that is not read is asked for."""
    return objective.view_at(np.ones(len(sequences)), pack(sequences), names or keys(len(sequences)), TOKENS)


def parts(view: View, b: int) -> tuple[list, ...]:
    """What is read, and where; what is asked: where, which tokens, with which weight, seen or not."""
    reads = slice(*view.encoder.cu_seqlens[b : b + 2].tolist())
    start, stop = view.decoder_cu_seqlens[b : b + 2].tolist()
    rows = torch.arange(len(view.targets)) if view.target_rows is None else view.target_rows
    asks = (rows >= start) & (rows < stop)
    columns = (view.decoder_position_ids[rows], view.targets, view.weights, view.seen)
    read = view.encoder.input_ids[reads].tolist(), view.encoder.position_ids[reads].tolist()
    return (*read, *(column[asks].tolist() for column in columns))


@pytest.mark.parametrize("direction", [*DIRECTIONS, "mixed"])
def test_what_is_read_and_what_is_asked_make_up_the_text(direction):
    sequences = texts((40, 97, 2, 3, 10, 64, 333) * 8)
    view = at_one(PrefixDiffusion(direction), sequences)
    found = Counter()
    for b, ids in enumerate(sequences):
        read, read_at, asked_at, targets, _, seen = parts(view, b)
        n, N = len(read), len(ids)
        assert sorted(read_at + asked_at) == list(range(N)) and not any(seen)
        assert read == ids[read_at].tolist() and targets == ids[asked_at].tolist()
        assert asked_at == list(range(asked_at[0], asked_at[0] + N - n))  # one piece is missing
        assert 0.3 * N <= n <= 0.5 * N
        kind = "forward" if asked_at[-1] == N - 1 else "backward" if asked_at[0] == 0 else "infill"
        if n > 1:
            assert direction in ("mixed", kind)
            found[kind] += 1
    assert direction != "mixed" or min(found[name] for name in DIRECTIONS) > 5
    assert view.encoder.num_positions().tolist() == [len(ids) for ids in sequences]


def test_splits_are_spread_evenly():
    read = at_one(PrefixDiffusion(), texts((200,) * 3000)).encoder.cu_seqlens.diff().numpy()
    share = np.bincount(read, minlength=101)[60:101] / 3000
    assert read.min() == 60 and read.max() == 100
    assert np.abs(share - 1 / 41).max() < 5 * math.sqrt(1 / 41 / 3000)
    infill = PrefixDiffusion("infill", shortest=0.5)  # four of eight tokens, one to three of them before the gap
    begins = at_one(infill, texts((8,) * 3000)).decoder_position_ids.view(3000, 4)[:, 0]
    share = np.bincount(begins.numpy(), minlength=4) / 3000
    assert share[0] == 0 and np.abs(share[1:] - 1 / 3).max() < 4 * math.sqrt(0.25 / 3000)


def test_short_texts():
    """One token: read, and nothing is asked. Two and three: one is read."""
    view = at_one(PrefixDiffusion(), texts((1, 2, 3, 0)))
    assert view.encoder.cu_seqlens.diff().tolist() == [1, 1, 1, 0]
    assert view.decoder_cu_seqlens.diff().tolist() == [0, 1, 2, 0]
    narrow = at_one(PrefixDiffusion(shortest=0.33, longest=0.34), texts((2, 5, 10)))  # no whole number fits
    assert narrow.encoder.cu_seqlens.diff().tolist() == [1, 2, 3]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_restarted_positions(direction):
    sequences = texts()
    kept, restarted = (at_one(PrefixDiffusion(direction, positions=p), sequences) for p in ("text", "restart"))
    for b in range(len(sequences)):
        read, _, asked_at, targets, _, _ = parts(kept, b)
        assert parts(restarted, b)[:4] == (read, list(range(len(read))), list(range(len(asked_at))), targets)
    assert restarted.encoder.num_positions().tolist() == restarted.encoder.cu_seqlens.diff().tolist()


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_a_view_depends_on_its_own_key_only(objective):
    sequences, names = texts(), keys(7)
    first = objective.view(pack(sequences), names, TOKENS)
    order = [3, 6, 0]
    part = objective.view(pack([sequences[i] for i in order]), [names[i] for i in order], TOKENS)
    assert [parts(part, b) for b in range(3)] == [parts(first, i) for i in order]
    assert parts(objective.view(pack(sequences), keys(7, epoch=1), TOKENS), 3) != parts(first, 3)


def test_weights_and_divisors():
    sequences, names = texts((80, 64)), keys(2)
    hidden = at_one(PrefixDiffusion(), sequences).num_targets
    view = PrefixDiffusion().view(pack(sequences), names, TOKENS)
    t = view.timesteps.repeat_interleave(view.decoder_cu_seqlens.diff())
    assert 0 < view.num_targets < hidden and view.divisor == hidden
    assert torch.allclose(view.weights, 1 / t) and not view.seen.any()
    assert (view.decoder_input_ids == TOKENS.mask_id).all()
    floored = PrefixDiffusion(weighting="selfnorm", t_floor=0.8).view(pack(sequences), names, TOKENS)
    assert torch.allclose(floored.weights, 1 / t.clamp_min(0.8))
    assert floored.divisor == pytest.approx(float(floored.weights.sum()))


def test_the_uniform_predictor_has_a_bound_of_ln_v_on_what_is_hidden():
    """The weights of a text's targets sum to the number of its hidden tokens, in expectation."""
    count = 2000
    view = PrefixDiffusion("mixed").view(pack(texts((64,) * count)), keys(count), TOKENS)
    owner = torch.repeat_interleave(torch.arange(count), view.decoder_cu_seqlens.diff())
    hidden = 64 - view.encoder.cu_seqlens.diff().double()
    share = torch.zeros(count, dtype=torch.float64).index_add(0, owner, view.weights.double()) / hidden
    error = float(share.std()) / math.sqrt(count)
    assert 0 < error < 0.1 and abs(float(share.mean()) - 1) < 4 * error
    assert view.divisor == float(hidden.sum())


def test_context_rows_are_the_visible_rest_and_no_targets():
    sequences, names = texts((80, 1, 64)), keys(3)
    plain, view = (PrefixDiffusion(context=c).view(pack(sequences), names, TOKENS) for c in (False, True))
    everything = at_one(PrefixDiffusion(), sequences, names)
    assert view.decoder_position_ids.tolist() == everything.decoder_position_ids.tolist()
    asked = torch.zeros(len(view.decoder_input_ids), dtype=torch.bool).index_fill(0, view.target_rows, True)
    assert 0 < view.num_targets == asked.sum() < len(asked) and plain.target_rows is None
    for name in ("targets", "weights", "seen", "divisor"):
        assert torch.equal(getattr(view, name), getattr(plain, name))
    assert torch.equal(view.decoder_position_ids[asked], plain.decoder_position_ids)
    assert (view.decoder_input_ids[asked] == TOKENS.mask_id).all()
    assert torch.equal(view.decoder_input_ids[~asked], everything.targets[~asked])


def test_special_tokens_are_never_asked_for():
    ids = [1, *range(4, 30), 2, *range(30, 50), 2]
    view = at_one(PrefixDiffusion("mixed"), [ids] * 20)
    assert not set(view.targets.tolist()) & TOKENS.special_ids
    assert view.divisor == view.num_targets > 0


def test_evaluation_grids():
    batch, names = pack(texts((80, 64))), keys(2)
    times = [f"t={t:.2f}" for t in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)]
    assert list(PrefixDiffusion("infill").evaluation_views(batch, names, TOKENS)) == times
    views = PrefixDiffusion("mixed").evaluation_views(batch, names, TOKENS)
    assert list(views) == [f"{name} t={t}" for name in DIRECTIONS for t in ("0.50", "1.00")]
    alone = PrefixDiffusion("backward").evaluation_views(batch, names, TOKENS)["t=1.00"]
    assert torch.equal(views["backward t=1.00"].targets, alone.targets)


def test_a_model_takes_its_views():
    torch.manual_seed(0)
    config = ConceptConfig(
        vocab_size=VOCAB, hidden_size=16, num_concepts=3, num_attention_heads=2, intermediate_size=24, mask_token_id=3,
        num_hidden_layers=1, num_decoder_layers=1,
    )  # fmt: skip
    model = ConceptForMaskedLM(config)
    for objective in (*EVERY, OBJECTIVES["prefix_diffusion"]()):
        loss = model(view=objective.view(pack(texts()), keys(7), TOKENS)).loss
        loss.backward()
        assert torch.isfinite(loss) and loss > 0
        empty = objective.view(pack([[4], []]), keys(2), TOKENS)
        assert empty.num_targets == 0 and model(view=empty).loss == 0


@pytest.mark.parametrize(
    "options, words",
    [
        ({"direction": "left"}, ["direction: ", "forward, backward, infill, mixed", "left"]),
        ({"shortest": 0.0}, ["shortest: ", "[1e-30, 1)", "0.0"]),
        ({"shortest": 0.6}, ["longest: ", "[shortest = 0.6, 1)", "0.5"]),
        ({"positions": "restart", "direction": "mixed"}, ["positions: ", "'text' with direction mixed", "restart"]),
        ({"positions": "zero"}, ["positions: ", "text, restart", "zero"]),
        ({"context": 1}, ["context: ", "true or false", "1"]),
        ({"weighting": "elbo"}, ["weighting: ", "mdlm", "elbo"]),
        ({"eps": 2.0}, ["eps: ", "[1e-30, 1)", "2.0"]),
    ],
)
def test_wrong_options_are_refused_by_name(options, words):
    with pytest.raises(ValueError) as error:
        PrefixDiffusion(**options)
    assert str(error.value).startswith(words[0]) and all(word in str(error.value) for word in words)
