"""Sampling: each round reveals exactly what the schedule says, nothing special, the same text for the same seed."""

import math

import pytest
import torch

from conceptron.models.config import ConceptConfig
from conceptron.models.generation import (
    Sampling,
    blank_canvas,
    continue_canvas,
    draw,
    fill,
    fill_steps,
    rank_within,
    restrict,
)  # fmt: skip
from conceptron.models.heads import ConceptForMaskedLM
from conceptron.models.objectives import SpecialTokens
from conceptron.models.packing import Packed, pack

TOKENS = SpecialTokens(3, frozenset({0, 1, 2, 3}), 40)


def model(**options) -> ConceptForMaskedLM:
    torch.manual_seed(0)
    config = ConceptConfig(
        vocab_size=40, hidden_size=16, num_concepts=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        num_decoder_layers=1, mask_token_id=3, timestep_conditioning=False, initializer_range=0.5, **options,
    )  # fmt: skip
    built = ConceptForMaskedLM(config)
    with torch.no_grad():
        built.lm_head.bias[:4] = 50.0  # what must never be drawn is what the model likes best
    return built


def canvas() -> Packed:
    """A partly filled text with special tokens, one that is full, an empty one, and a blank one."""
    return pack([[1, 9, 3, 3, 12, 3, 3, 3, 2], [5, 6], [], [3] * 11])


def num_hidden(packed: Packed) -> list[int]:
    return (packed.select(packed.input_ids == 3).cu_seqlens.diff()).tolist()


@pytest.mark.parametrize("unmask", ["confidence", "random"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 4, 30])
@pytest.mark.parametrize("hidden_tokens", ["drop", "mask"])
def test_every_round_reveals_what_the_schedule_says(schedule, unmask, steps, hidden_tokens):
    built, start = model(hidden_tokens=hidden_tokens), canvas()
    before, given = start.input_ids, start.input_ids != 3
    rounds = list(fill_steps(built, start, TOKENS, Sampling(steps=steps, schedule=schedule, unmask=unmask)))
    assert len(rounds) == steps
    for k, now in enumerate(rounds, start=1):
        share = 1 - k / steps if schedule == "linear" else math.cos(math.pi / 2 * k / steps)
        assert num_hidden(now) == [math.floor(n * share + 1e-9) for n in (5, 0, 0, 11)]
        assert torch.equal(now.input_ids[given], start.input_ids[given])  # what was given stays
        fixed = before != 3
        assert torch.equal(now.input_ids[fixed], before[fixed])  # what was revealed stays
        before = now.input_ids
    assert not set(before[~given].tolist()) & TOKENS.special_ids


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    built = model()
    first, again, other = (fill(built, canvas(), TOKENS, Sampling(seed=s)).input_ids for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(99)  # the global generator plays no part
    assert torch.equal(fill(built, canvas(), TOKENS, Sampling(seed=1)).input_ids, first)


def test_without_temperature_it_is_greedy_one_by_one():
    """As many rounds as positions, highest confidence first: against a loop that asks the padded door."""
    built = model().eval()
    start = pack([[5, 3, 3, 9, 3, 3]])
    got = fill(built, start, TOKENS, Sampling(steps=4, schedule="linear", temperature=0.0)).input_ids
    ids = start.input_ids.clone()[None]
    for _ in range(4):
        with torch.no_grad():
            logits = built(ids).logits[0]
        logits[:, :4] = -torch.inf
        confidence, best = logits.softmax(-1).max(-1)
        at = int(torch.where(ids[0] == 3, confidence, -1.0).argmax())
        ids[0, at] = best[at]
    assert torch.equal(got, ids[0])


def test_sequences_of_a_batch_do_not_meet():
    built, greedy = model(), Sampling(steps=3, temperature=0.0)
    together = fill(built, canvas(), TOKENS, greedy)
    alone = fill(built, blank_canvas([11], TOKENS), TOKENS, greedy)
    assert torch.equal(together.input_ids[-11:], alone.input_ids)


def test_the_source_decides_the_text():
    """Conditioned on concepts of A or of B; the canvas itself is then never encoded."""
    built, blank, greedy = model(), blank_canvas([8, 8], TOKENS), Sampling(steps=2, temperature=0.0)
    calls = []
    built.encoder.register_forward_hook(lambda module, args, out: calls.append(1))
    a, b = ([7, 9, 11, 30, 22, 5], [33, 4, 18])
    text = fill(built, blank, TOKENS, greedy, source=pack([a, b])).input_ids
    assert len(calls) == 1
    swapped = fill(built, blank, TOKENS, greedy, source=pack([b, a])).input_ids
    assert torch.equal(text, swapped.view(2, 8).flip(0).flatten()) and not torch.equal(text[:8], text[8:])


def test_a_prefix_is_kept_and_continued():
    start = continue_canvas([[7, 8], [9]], 3, TOKENS)
    done = fill(model(), start, TOKENS, Sampling(steps=2))
    assert done.cu_seqlens.tolist() == [0, 5, 9]
    assert done.input_ids[:2].tolist() == [7, 8] and done.input_ids[5] == 9 and (done.input_ids != 3).all()


def test_a_conditioned_model_is_told_the_share_that_is_hidden():
    built = model()
    timed = ConceptForMaskedLM(ConceptConfig(**{**built.config.to_dict(), "timestep_conditioning": True}))
    times = []
    timed.decoder.time.register_forward_hook(lambda module, args, out: times.append(args[0].tolist()))
    fill(timed, canvas(), TOKENS, Sampling(steps=2, schedule="linear"))
    assert times[0] == pytest.approx([5 / 9, 1e-3, 1e-3, 1.0]) and times[1] == pytest.approx(
        [2 / 9, 1e-3, 1e-3, 5 / 11]
    )


def test_training_mode_is_left_as_it_was():
    built = model(dropout=0.5).train()
    first, again = (fill(built, canvas(), TOKENS, Sampling()).input_ids for _ in range(2))
    assert built.training and torch.equal(first, again)


def test_draws_follow_the_probabilities_and_confidence_ignores_temperature():
    logits = torch.log(torch.tensor([0.5, 0.2, 0.2, 0.1])).expand(40000, 4)
    generator = torch.Generator().manual_seed(0)
    tokens, confidence = draw(logits, torch.tensor([1]), Sampling(temperature=0.5), generator)
    expected = torch.tensor([0.25, 0.0, 0.04, 0.01]) / 0.3
    assert torch.allclose(torch.bincount(tokens, minlength=4) / 40000, expected, atol=0.01)
    assert torch.allclose(confidence, (torch.tensor([0.5, 0.0, 0.2, 0.1]) / 0.8)[tokens])


def test_top_k_and_top_p_keep_the_most_probable():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]]))

    def kept(**options) -> list[int]:
        return restrict(logits, Sampling(**options))[0].isfinite().nonzero().flatten().tolist()

    assert kept() == [0, 1, 2, 3] and kept(top_k=2) == [1, 3] and kept(top_k=9) == [0, 1, 2, 3]
    assert kept(top_p=0.4) == [1] and kept(top_p=0.6) == [1, 3] and kept(top_p=0.8) == [1, 2, 3]
    assert kept(top_k=1, top_p=0.9) == [1]


def test_ranks_are_within_each_sequence():
    rows = pack([[0, 0, 0], [], [0, 0]])
    assert rank_within(torch.tensor([0.1, 0.9, 0.5, 0.3, 0.3]), rows).tolist() == [2, 0, 1, 0, 1]


def test_nothing_to_fill_and_nothing_at_all():
    for start in (pack([[5, 6], [7]]), pack([[]]), pack([])):
        assert torch.equal(fill(model(), start, TOKENS, Sampling(steps=2)).input_ids, start.input_ids)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"steps": 0}, ["steps", "at least 1", "0"]),
        ({"schedule": "cubic"}, ["schedule", "linear", "cubic"]),
        ({"unmask": "best"}, ["unmask", "confidence", "best"]),
        ({"temperature": -1.0}, ["temperature", "at least 0", "-1.0"]),
        ({"top_p": 0.0}, ["top_p", "(0, 1]", "0.0"]),
        ({"top_k": -2}, ["top_k", "at least 0", "-2"]),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError) as error:
        Sampling(**options)
    assert all(word in str(error.value) for word in words)


def test_a_foreign_tokenizer_is_refused():
    with pytest.raises(ValueError, match="model's mask id 3, got 5"):
        fill(model(), canvas(), SpecialTokens(5, frozenset({5}), 40), Sampling())
    with pytest.raises(ValueError, match="mask_id = 3 among special_ids"):
        fill(model(), canvas(), SpecialTokens(3, frozenset(), 40), Sampling())
    with pytest.raises(ValueError, match="source: expected 4 sequences, as the canvas, got 1"):
        fill(model(), canvas(), TOKENS, Sampling(), source=pack([[5]]))
