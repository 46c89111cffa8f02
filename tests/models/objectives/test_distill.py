"""The loss of distillation against its formula, one text at a time, and however a step is cut."""

from dataclasses import replace

import pytest
import torch

from conceptron.models.config import ConceptConfig
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.objectives import Distill, Distillation, Lesson, NoTask, SampleKey, SpecialTokens
from conceptron.models.packing import pack
from conceptron.models.pretraining import Pretraining, Totals

TOKENS = SpecialTokens(1, frozenset({0, 1}), 60)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


@pytest.mark.parametrize("width, teacher_width", [(12, 12), (12, 8)])
def test_the_loss_by_its_formula(width, teacher_width):
    torch.manual_seed(0)
    options = Distill(teacher="t", whole=0.5, similarity=10.0, stretch=2.0, stretches=2)
    distillation = Distillation(options, width, teacher_width).double()
    with torch.no_grad():
        distillation.places.normal_()
    assert isinstance(distillation.project, torch.nn.Identity) == (width == teacher_width)
    concepts, whole = torch.randn(3, 4, width).double(), torch.randn(3, teacher_width).double()
    stretches = torch.randn(3, 2, teacher_width).double()
    stretches[1, 0] = 0  # too short to be heard
    lesson = Lesson(whole, stretches)
    loss, parts = distillation(concepts, lesson, 3.0, 5.0)
    pooled = distillation.project(concepts.mean(1))
    by_hand = {"whole": (1 - cosine(pooled, whole)).mean()}
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    by_hand["similarity"] = sum(
        (cosine(pooled[i], pooled[j]) - cosine(whole[i], whole[j])) ** 2 for i, j in pairs
    ) / len(pairs)
    of_stretch = [
        1 - cosine(distillation.of_stretch(distillation.project(concepts[b, 2 * s : 2 * s + 2].mean(0)))
                   + distillation.places[s], stretches[b, s])
        for b in range(3) for s in range(2) if (b, s) != (1, 0)
    ]  # fmt: skip
    by_hand["stretch"] = sum(of_stretch) / 5
    for name, value in by_hand.items():
        torch.testing.assert_close(parts[f"distill/{name}"], value.detach(), rtol=1e-5, atol=1e-6)
    expected = 0.5 * by_hand["whole"] + 10 * by_hand["similarity"] + 2 * by_hand["stretch"]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    sums = distillation.agreement(concepts, lesson)
    assert sums[1] == 3 and sums[3] == 5
    torch.testing.assert_close(sums[0], 3 - 3 * by_hand["whole"].detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="a multiple of the S = 2 stretches, got C = 3"):
        distillation.stretches(concepts[:, :3])


def test_a_step_is_the_same_however_it_is_cut():
    torch.manual_seed(0)
    config = ConceptConfig(
        vocab_size=60, hidden_size=24, num_concepts=4, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=20, num_decoder_layers=1, mask_token_id=1,
    )  # fmt: skip
    options = Distill(teacher="t", similarity=0.0, stretch=1.0, stretches=2)
    net = Pretraining(
        ConceptForMaskedLM(config), has_task=False, distillation=Distillation(options, 24, 16)
    ).double()  # fmt: skip
    texts = [torch.randint(2, 60, (n,)) for n in (9, 14, 30, 5)]
    whole, stretches = torch.randn(4, 16).double(), torch.randn(4, 2, 16).double()
    stretches[0, 1] = 0

    def view(rows):
        keys = [SampleKey(0, 0, i) for i in rows]
        made = NoTask().view(pack([texts[i] for i in rows]), keys, TOKENS)
        return replace(made, lesson=Lesson(whole[rows], stretches[rows]))

    losses, gradients = [], []
    for cut in ([[0, 1, 2, 3]], [[0], [1, 2, 3]], [[0, 3], [1, 2]]):
        views = [view(rows) for rows in cut]
        totals = Totals.of(views)
        net.zero_grad()
        total = 0.0
        for each in views:
            output = net(view=each, totals=totals)
            output.loss.backward()
            total += float(output.loss.detach())
        losses.append(total)
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-6)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-7)
    of_encoder = {id(p) for p in net.model.encoder.parameters()}
    assert not any(p.requires_grad for p in net.model.parameters() if id(p) not in of_encoder)
