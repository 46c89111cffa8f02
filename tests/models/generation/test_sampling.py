"""One draw from logits, guidance on hand-made logits, and how many positions a round may touch."""

import math

import pytest
import torch

from conceptron.models.generation.sampling import Sampling, draw, guide, restrict
from conceptron.models.generation.unmasking import blocks, budget, certainty, highest, rank_within
from conceptron.models.packing import pack


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_draws_follow_the_probabilities_and_temperature_leaves_those_alone():
    logits = torch.log(torch.tensor([0.5, 0.2, 0.2, 0.1])).expand(40000, 4)
    tokens, probabilities = draw(logits, torch.tensor([1]), Sampling(temperature=0.5), generator())
    expected = torch.tensor([0.25, 0.0, 0.04, 0.01]) / 0.3
    assert torch.allclose(torch.bincount(tokens, minlength=4) / 40000, expected, atol=0.01)
    assert probabilities.dtype == torch.float64
    assert torch.allclose(probabilities[0].float(), torch.tensor([0.5, 0.0, 0.2, 0.1]) / 0.8)
    greedy, _ = draw(logits[:5], torch.tensor([0]), Sampling(temperature=9.0), generator(), greedy=True)
    assert set(greedy.tolist()) <= {1, 2}


def test_top_k_and_top_p_keep_the_most_probable():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]]))

    def kept(**options) -> list[int]:
        return restrict(logits, Sampling(**options))[0].isfinite().nonzero().flatten().tolist()

    assert kept() == [0, 1, 2, 3] and kept(top_k=2) == [1, 3] and kept(top_k=9) == [0, 1, 2, 3]
    assert kept(top_p=0.4) == [1] and kept(top_p=0.6) == [1, 3] and kept(top_p=0.8) == [1, 2, 3]
    assert kept(top_k=1, top_p=0.9) == [1]


def test_guidance_is_its_formula():
    """p = (.6, .3, .1) given the concepts and (.2, .3, .5) given none: p^(1+w) / q^w, normalised by hand for w = 1."""
    p, q = torch.tensor([[0.6, 0.3, 0.1]]), torch.tensor([[0.2, 0.3, 0.5]])
    guided = guide(p.log() + 5.0, q.log() - 3.0, 1.0).softmax(-1)  # constants of a row play no part
    expected = torch.tensor([[1.8, 0.3, 0.02]], dtype=torch.float64) / 2.12
    assert torch.allclose(guided, expected, atol=1e-6)
    assert torch.allclose(guide(p.log(), q.log(), 0.0).exp(), p.double(), atol=1e-6)


def test_certainties():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [1.0, 0.0, 0.0]], dtype=torch.float64)
    draws = torch.tensor([1, 0, 0])
    assert certainty("confidence", p, draws).tolist() == [0.2, 0.4, 1.0]
    assert certainty("margin", p, draws).tolist() == pytest.approx([0.5, 0.05, 1.0])
    entropies = [-sum(x * math.log(x) for x in row if x) for row in p.tolist()]
    assert certainty("entropy", p, draws).tolist() == pytest.approx([-x for x in entropies])


def test_ranks_are_within_each_sequence():
    rows = pack([[0, 0, 0], [], [0, 0]])
    scores = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.3])
    assert rank_within(scores, rows).tolist() == [2, 0, 1, 0, 1]
    assert highest(scores, rows, torch.tensor([2, 0, 1])).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("remask", [0.0, 0.13, 0.9, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_remasking_budget_meets_the_schedule_and_is_possible(schedule, remask):
    """By enumeration of rounds and lengths: never more than there is, and the schedule's number afterwards."""
    source, wanted = generator(), torch.arange(0, 60)
    sampling = Sampling(steps=7, schedule=schedule, unmask="remdm", remask=remask)
    hidden = wanted.clone()
    for number in range(1, 8):
        reveal, again = budget(sampling, number, 7, wanted, hidden, source)
        share = 1 - number / 7 if schedule == "linear" else math.cos(math.pi / 2 * number / 7)
        left = torch.tensor([math.floor(n * share + 1e-9) for n in wanted.tolist()])
        most = torch.minimum(remask * (wanted - hidden), left)
        assert (again >= most.floor()).all() and (again <= most.ceil()).all() and (again <= wanted - hidden).all()
        assert (reveal >= 0).all() and (reveal <= hidden).all()
        hidden = hidden - reveal + again
        assert torch.equal(hidden, left)
    assert hidden.sum() == 0


def test_an_ancestral_budget_is_binomial_and_ends():
    hidden = torch.full((20000,), 5)
    reveal, again = budget(Sampling(unmask="mdlm", schedule="linear"), 2, 4, hidden + 3, hidden, generator())
    counts = torch.bincount(reveal, minlength=6) / 20000  # from t = 3/4 to s = 2/4: each with probability 1/3
    expected = torch.tensor([math.comb(5, k) * (1 / 3) ** k * (2 / 3) ** (5 - k) for k in range(6)])
    assert ((counts - expected).abs() < 4 * (expected * (1 - expected) / 20000).sqrt()).all() and again.sum() == 0
    assert torch.equal(budget(Sampling(unmask="mdlm"), 4, 4, hidden, hidden, generator())[0], hidden)


def test_blocks_count_wanted_positions_and_share_the_steps():
    canvas = pack([[3, 9, 3, 3, 3], [], [9], [3, 3, 3, 3, 3, 3, 3]])
    found = blocks(canvas.input_ids == 3, canvas, Sampling(steps=5, block=3))
    assert [rounds for _, rounds in found] == [2, 2, 1]
    assert [mask.int().tolist() for mask, _ in found] == [
        [1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    ]
    assert len(blocks(canvas.input_ids == 77, canvas, Sampling(steps=5, block=3))) == 1
    assert blocks(pack([]).input_ids == 3, pack([]), Sampling(block=2))[0][1] == 16


@pytest.mark.parametrize(
    "options, words",
    [
        ({"steps": 0}, ["steps", "at least 1", "0"]),
        ({"schedule": "cubic"}, ["schedule", "linear", "cubic"]),
        ({"unmask": "best"}, ["unmask", "confidence", "best"]),
        ({"remask": 1.5}, ["remask", "[0, 1]", "1.5"]),
        ({"block": -1}, ["block", "at least 0", "-1"]),
        ({"guidance": -0.5}, ["guidance", "at least 0", "-0.5"]),
        ({"temperature": -1.0}, ["temperature", "at least 0", "-1.0"]),
        ({"top_p": 0.0}, ["top_p", "(0, 1]", "0.0"]),
        ({"top_k": -2}, ["top_k", "at least 0", "-2"]),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError) as error:
        Sampling(**options)
    assert all(word in str(error.value) for word in words)
