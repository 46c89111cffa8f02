"""Sampling: each round reveals exactly what the schedule says, nothing special, the same text for the same seed."""

import math

import numpy as np
import pytest
import torch

from conceptron.models.config import ConceptConfig
from conceptron.models.generation.canvas import (
    blank_canvas,
    continue_canvas,
    fill,
    fill_steps,
    given_text,
    infill_canvas,
)  # fmt: skip
from conceptron.models.generation.sampling import STRATEGIES, Sampling
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.objectives import PrefixDiffusion, SampleKey, SpecialTokens
from conceptron.models.packing import Packed, pack

TOKENS = SpecialTokens(3, frozenset({0, 1, 2, 3}), 40)
EXACT = [name for name in STRATEGIES if name != "mdlm"]  # those that reveal a fixed number


def model(**options) -> ConceptForMaskedLM:
    torch.manual_seed(0)
    config = dict(
        vocab_size=40, hidden_size=16, num_concepts=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        num_decoder_layers=1, mask_token_id=3, timestep_conditioning=False, initializer_range=0.5,
    )  # fmt: skip
    built = ConceptForMaskedLM(ConceptConfig(**{**config, **options}))
    with torch.no_grad():
        built.lm_head.bias[:4] = 50.0  # what must never be drawn is what the model likes best
    return built


def canvas() -> Packed:
    """A partly filled text with special tokens, one that is full, an empty one, and a blank one."""
    return pack([[1, 9, 3, 3, 12, 3, 3, 3, 2], [5, 6], [], [3] * 11])


def num_hidden(packed: Packed) -> list[int]:
    return (packed.select(packed.input_ids == 3).cu_seqlens.diff()).tolist()


@pytest.mark.parametrize("unmask", EXACT)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps, hidden_tokens", [(1, "drop"), (4, "mask"), (30, "drop")])
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
        if unmask != "remdm":
            assert torch.equal(now.input_ids[fixed], before[fixed])  # what was revealed stays
        before = now.input_ids
    assert not set(before[~given].tolist()) & TOKENS.special_ids


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ancestral_rounds_hide_what_is_hidden_with_the_probability_of_their_time(schedule):
    """After round k each position is still hidden with probability s_k, whatever the others are: its mean and the
    variance of a text's count, over 1500 texts of 6 tokens, are those of Binomial(6, s_k)."""
    built, start = model(num_concepts=1), blank_canvas([6] * 1500, TOKENS)
    before = start.input_ids
    rounds = list(fill_steps(built, start, TOKENS, Sampling(steps=4, schedule=schedule, unmask="mdlm")))
    for k, now in enumerate(rounds, start=1):
        s = 1 - k / 4 if schedule == "linear" else math.cos(math.pi / 8 * k)
        s = 0.0 if k == 4 else s
        hidden = (now.input_ids == 3).view(1500, 6).double()
        assert (hidden.mean(0) - s).abs().max() <= 5 * math.sqrt(s * (1 - s) / 1500)  # of each of the 6 places
        variance = float(hidden.sum(1).var())
        assert abs(variance - 6 * s * (1 - s)) <= 5 * 6 * s * (1 - s) * math.sqrt(2 / 1500)
        fixed = before != 3
        assert torch.equal(now.input_ids[fixed], before[fixed])
        before = now.input_ids
    assert not set(before.tolist()) & TOKENS.special_ids


def test_remasking_hides_again_what_it_says_and_only_what_it_wrote():
    """Half of what is revealed in each round, as far as the schedule leaves so many hidden; on average, exactly."""
    built, start = model(num_concepts=1), pack([[7, *[3] * 9, 8]] * 400)
    hidden, again_mean = torch.full((400,), 9), []
    before = start.input_ids
    sampling = Sampling(steps=4, schedule="linear", unmask="remdm", remask=0.5)
    for k, now in enumerate(fill_steps(built, start, TOKENS, sampling), start=1):
        again = ((before != 3) & (now.input_ids == 3)).view(400, 11)
        left = math.floor(9 * (1 - k / 4))
        exact = min(0.5 * (9 - int(hidden[0])), left)
        counts = again.sum(1)
        assert set(counts.tolist()) <= {math.floor(exact), math.ceil(exact)} and not again[:, [0, 10]].any()
        again_mean.append(abs(float(counts.double().mean()) - exact))
        hidden = (now.input_ids == 3).view(400, 11).sum(1)
        assert (hidden == left).all()
        before = now.input_ids
    assert max(again_mean) < 4 * 0.5 / math.sqrt(400)


@pytest.mark.parametrize("unmask", STRATEGIES)
def test_blocks_are_filled_strictly_from_left_to_right(unmask):
    start = canvas()
    sampling = Sampling(steps=10, block=4, unmask=unmask, schedule="linear")
    rounds = list(fill_steps(model(), start, TOKENS, sampling))
    assert len(rounds) == 10
    done = {4: [1, 0, 0, 7], 7: [0, 0, 0, 3], 10: [0, 0, 0, 0]}  # ten rounds for three blocks: 4, 3, 3
    for number, now in enumerate(rounds, start=1):
        if number in done:
            assert num_hidden(now) == done[number]
        for b in range(4):
            own = slice(*start.cu_seqlens[b : b + 2].tolist())
            hidden = (now.input_ids[own] == 3)[start.input_ids[own] == 3].tolist()  # of the wanted ones
            current = sum(number > last for last in done) * 4
            assert not any(hidden[:current]) and all(hidden[current + 4 :])
    with pytest.raises(ValueError, match="steps: expected at least 3, one for each block of 4, got 2"):
        fill(model(), start, TOKENS, Sampling(steps=2, block=4))


def test_a_round_that_reveals_nothing_asks_nothing_and_blind_ones_ask_for_what_they_reveal():
    built, calls, rows = model(), [], []
    built.encoder.register_forward_hook(lambda module, args, out: calls.append(1))
    built.decoder.register_forward_hook(lambda module, args, out: rows.append(out.shape[0]))
    fill(built, blank_canvas([3], TOKENS), TOKENS, Sampling(steps=30))
    assert len(calls) == 3
    rows.clear()
    fill(built, blank_canvas([40], TOKENS), TOKENS, Sampling(steps=8, unmask="mdlm"))
    assert sum(rows) == 40
    rows.clear()
    fill(built, blank_canvas([40], TOKENS), TOKENS, Sampling(steps=8, unmask="margin", schedule="linear"))
    assert rows == [40, 35, 30, 25, 20, 15, 10, 5]


def test_guidance_with_weight_zero_is_none_and_with_more_it_is_the_formula():
    built, blank = model(condition_dropout=0.1), blank_canvas([8, 5], TOKENS)
    source = pack([[7, 9, 11, 30, 22, 5], [33, 4, 18]])
    greedy = Sampling(steps=1, temperature=0.0)
    plain = fill(built, blank, TOKENS, greedy, source).input_ids
    assert torch.equal(fill(model(), blank, TOKENS, greedy, source).input_ids, plain)
    found = set()
    for w in (0.0, 1.5, 30.0):
        with torch.no_grad():
            encoded = built.encoder(packed=source)
            logits = [
                built.lm_head(built.decoder(concepts, encoded.anchors, blank.position_ids, blank.cu_seqlens, 8,
                                            input_ids=blank.input_ids)).double()
                for concepts in (encoded.last_hidden_state, built.exposure.null.weight.expand(2, 4, 16))
            ]  # fmt: skip
        given, without = (x.log_softmax(-1) for x in logits)
        expected = ((1 + w) * given - w * without)[:, 4:].argmax(-1) + 4
        got = fill(built, blank, TOKENS, Sampling(steps=1, temperature=0.0, guidance=w), source).input_ids
        assert torch.equal(got, expected)
        found.add(tuple(got.tolist()))
    assert len(found) > 1 and tuple(plain.tolist()) in found
    with pytest.raises(ValueError, match="guidance: expected 0 for a model without null concepts"):
        fill(model(), blank, TOKENS, Sampling(guidance=1.0), source)


@pytest.mark.parametrize("mixing", ["none", "local", "concepts"])
def test_a_decoder_that_mixes_rows_is_told_what_it_was_told_in_training(mixing):
    """Rows of the last round: the whole canvas where the canvas is read, all that is wanted where a source is."""
    built = model(decoder_mixing=mixing, hidden_tokens="mask")
    start, rows = pack([[7, 3, 9, 3, 3, 3]]), []
    built.decoder.register_forward_hook(
        lambda module, args, kwargs, out: rows.append((args[2].tolist(), kwargs["input_ids"].tolist())),
        with_kwargs=True,
    )
    sampling = Sampling(steps=2, schedule="linear", temperature=0.0)
    for source in (None, given_text(start, TOKENS)):
        rows.clear()
        done = fill(built, start, TOKENS, sampling, source).input_ids.tolist()
        positions, ids = rows[-1]
        hidden = [p for p, i in zip(positions, ids, strict=True) if i == 3]
        assert len(hidden) == 2 and positions == sorted(positions)
        expected = hidden if mixing == "none" else [0, 1, 2, 3, 4, 5] if source is None else [1, 3, 4, 5]
        assert positions == expected
        assert all(i in (3, done[p]) for p, i in zip(positions, ids, strict=True))


def test_a_source_and_its_time_are_those_of_training():
    """Prefix diffusion at t = 1 and the first round from the given text: the same encoder input, rows and time."""
    built = model(timestep_conditioning=True)
    ids = list(range(5, 25))
    view = PrefixDiffusion("infill").view_at(np.ones(1), pack([ids]), [SampleKey(0, 0, 0)], TOKENS)
    missing = view.decoder_position_ids.tolist()
    start = infill_canvas([ids[: missing[0]]], len(missing), [ids[missing[-1] + 1 :]], TOKENS)
    source = given_text(start, TOKENS)
    assert torch.equal(source.input_ids, view.encoder.input_ids)
    assert torch.equal(source.position_ids, view.encoder.position_ids) and source.num_positions().tolist() == [20]
    seen = []
    built.decoder.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((args[2].tolist(), kwargs["timesteps"].tolist())),
        with_kwargs=True,
    )
    fill(built, start, TOKENS, Sampling(steps=2, schedule="linear"), source)
    assert seen[0] == (missing, [1.0])
    assert seen[1][1] == pytest.approx([math.floor(len(missing) / 2) / len(missing)])


def test_the_last_round_may_take_the_most_probable_tokens():
    built, blank, wild = model(), blank_canvas([12] * 20, TOKENS), dict(steps=1, temperature=50.0)
    greedy = fill(built, blank, TOKENS, Sampling(steps=1, temperature=0.0)).input_ids
    assert torch.equal(fill(built, blank, TOKENS, Sampling(**wild, clean_up=True)).input_ids, greedy)
    assert not torch.equal(fill(built, blank, TOKENS, Sampling(**wild)).input_ids, greedy)
    sampling = Sampling(steps=2, temperature=50.0, schedule="linear", unmask="random", clean_up=True)
    first, last = fill_steps(built, blank, TOKENS, sampling)
    hidden = first.input_ids == 3
    with torch.no_grad():
        encoded = built.encoder(packed=built.encoder.visible(first))
        asked = first.select(hidden)
        states = built.decode(encoded, asked.position_ids, asked.cu_seqlens, 12, asked.input_ids, None)
    assert torch.equal(last.input_ids[hidden], built.lm_head(states)[:, 4:].argmax(-1) + 4)


@pytest.mark.parametrize("unmask", STRATEGIES)
def test_the_same_seed_gives_the_same_text_and_another_seed_another(unmask):
    built = model()
    first, again, other = (fill(built, canvas(), TOKENS, Sampling(seed=s, unmask=unmask)).input_ids for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(99)  # the global generator plays no part
    assert torch.equal(fill(built, canvas(), TOKENS, Sampling(seed=1, unmask=unmask)).input_ids, first)


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


def test_nothing_to_fill_and_nothing_at_all():
    for start in (pack([[5, 6], [7]]), pack([[]]), pack([])):
        assert torch.equal(fill(model(), start, TOKENS, Sampling(steps=2)).input_ids, start.input_ids)


def test_a_foreign_tokenizer_is_refused():
    with pytest.raises(ValueError, match="model's mask id 3, got 5"):
        fill(model(), canvas(), SpecialTokens(5, frozenset({5}), 40), Sampling())
    with pytest.raises(ValueError, match="mask_id = 3 among special_ids"):
        fill(model(), canvas(), SpecialTokens(3, frozenset(), 40), Sampling())
    with pytest.raises(ValueError, match="source: expected 4 sequences, as the canvas, got 1"):
        fill(model(), canvas(), TOKENS, Sampling(), source=pack([[5]]))
