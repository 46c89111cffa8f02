"""What the decoder gets of the concepts: part of them in training, any first ones on request, none for guidance."""

import numpy as np
import pytest
import torch
from scipy.stats import qmc

from conceptron.models.config import ConceptConfig
from conceptron.models.exposure import Exposure, nested_order
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.objectives import Diffusion, SampleKey, SpecialTokens
from conceptron.models.packing import pack

SMALL = dict(
    vocab_size=40, hidden_size=16, num_concepts=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
    num_decoder_layers=1, mask_token_id=3,
)  # fmt: skip
TOKENS = SpecialTokens(3, frozenset({0, 1, 2, 3}), 40)


def exposure(**options) -> Exposure:
    built = Exposure(ConceptConfig(**{**SMALL, **options})).train()
    if built.null is not None:
        torch.nn.init.constant_(built.null.weight, -1.0)
    return built


def numbered(B: int = 3, C: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Concepts that hold their number, and anchors that are ten times it."""
    number = torch.arange(float(C))
    return number[None, :, None].expand(B, C, 16).contiguous(), 10 * number.expand(B, C)


def kept(built: Exposure, **options) -> list[int]:
    """The numbers of the concepts that are left: the same in every text, with their own anchors, in order."""
    concepts, anchors = built(*numbered(), **options)
    numbers = concepts[0, :, 0]
    assert torch.equal(concepts, numbers[None, :, None].expand_as(concepts)) and torch.equal(anchors[1], 10 * numbers)
    assert sorted(set(numbers.tolist())) == numbers.tolist()
    return numbers.int().tolist()


@pytest.mark.parametrize("C", [1, 2, 8, 128])
def test_the_order_is_van_der_corputs(C):
    expected = qmc.Halton(d=1, scramble=False).random(C)[:, 0] * C  # base 2
    assert nested_order(C).tolist() == expected.round().astype(int).tolist()


@pytest.mark.parametrize("C", [3, 37, 100, 129])
def test_any_first_concepts_cover_the_text(C):
    order = nested_order(C).numpy()
    assert sorted(order.tolist()) == list(range(C))
    for k in range(1, C + 1):
        gaps = np.diff([*sorted(order[:k]), C])
        assert gaps.max() <= 4 * C / k  # twice what powers of two have, which is twice the even spacing


def test_nothing_is_withheld_by_default_and_outside_training():
    whole = numbered()
    for built in (exposure(), exposure(nested_concepts=True, condition_dropout=0.9).eval()):
        assert all(torch.equal(a, b) for a, b in zip(built(*whole), whole, strict=True))


def test_nested_concepts_are_the_first_k_with_k_drawn_evenly():
    built, counts, order = exposure(nested_concepts=True), torch.zeros(9), nested_order(8).tolist()
    for seed in range(800):
        torch.manual_seed(seed)
        numbers = kept(built)
        assert numbers == sorted(order[: len(numbers)])
        counts[len(numbers)] += 1
    assert counts[0] == 0 and (counts[1:] / 800 - 1 / 8).abs().max() < 4 * (7 / 64 / 800) ** 0.5


def test_for_a_share_of_the_texts_the_concepts_are_the_null_ones():
    torch.manual_seed(0)
    built, (concepts, anchors) = exposure(condition_dropout=0.3), numbered(B=2000)
    got, where = built(concepts, anchors)
    is_null = (got == -1).flatten(1)
    assert torch.equal(is_null.any(1), is_null.all(1)) and torch.equal(where, anchors)
    share = float(is_null.all(1).float().mean())
    assert abs(share - 0.3) < 4 * (0.21 / 2000) ** 0.5
    assert torch.equal(got[~is_null.all(1)], concepts[~is_null.all(1)])
    assert (built.withhold(concepts) == -1).all()
    with pytest.raises(ValueError, match=r"guidance: expected 0 .* condition_dropout"):
        exposure().withhold(concepts)


def test_a_caller_may_ask_for_the_first_concepts_only():
    built = exposure().eval()
    assert kept(built, num_concepts=3) == sorted(nested_order(8)[:3].tolist()) and len(kept(built, num_concepts=8)) == 8
    for wrong in (0, 9):
        with pytest.raises(ValueError, match=f"num_concepts: expected 1 to the model's C = 8, got {wrong}"):
            built(*numbered(), num_concepts=wrong)


def model(**options) -> ConceptForMaskedLM:
    torch.manual_seed(0)
    return ConceptForMaskedLM(ConceptConfig(**{**SMALL, **options})).double()


def view():
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(4, 40, (n,), generator=generator) for n in (20, 0, 7, 30)]
    return Diffusion().view(pack(texts), [SampleKey(0, 0, i) for i in range(4)], TOKENS)


@torch.no_grad()
def test_a_loss_with_the_first_concepts_is_that_of_a_decoder_that_knows_no_others():
    built, given = model().eval(), view()
    losses = [float(built(view=given, num_concepts=k).loss) for k in (None, 8, 4, 1)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12) and len({round(x, 9) for x in losses}) == 3
    encoded, order = built.encoder(packed=given.encoder), nested_order(8)[:4].sort().values
    hidden = built.decoder(
        encoded.last_hidden_state[:, order], encoded.anchors[:, order], given.decoder_position_ids,
        given.decoder_cu_seqlens, given.decoder_max_seqlen, input_ids=given.decoder_input_ids,
    )  # fmt: skip
    nll = -built.lm_head(hidden).log_softmax(-1).gather(1, given.targets[:, None])[:, 0]
    assert losses[2] == pytest.approx(float((given.weights * nll).sum() / given.divisor), rel=1e-6)
    ids = torch.tensor([[5, 6, 3, 9]])
    assert not torch.equal(built(ids, num_concepts=2).logits, built(ids).logits)
    assert built(ids, num_concepts=2).concepts.shape[1] == 8  # what is reported is what was encoded


@pytest.mark.parametrize("options", [{}, {"nested_concepts": True, "decoder_mixing": "concepts"}], ids=str)
def test_a_model_trains_on_what_it_gets_and_the_null_concepts_learn(options):
    built, given = model(condition_dropout=0.5, **options).train(), view()
    torch.manual_seed(1)
    first = built(view=given)
    first.loss.backward()
    assert built.exposure.null.weight.grad.abs().max() > 0 and built.encoder.embed_tokens.weight.grad.abs().max() > 0
    torch.manual_seed(1)
    assert torch.equal(built(view=given).loss, first.loss)
    losses = set()
    for seed in range(2, 8):
        torch.manual_seed(seed)
        losses.add(built(view=given).loss.item())
    assert len(losses) > 3


def test_null_concepts_are_saved_and_start_distinct(tmp_path):
    built = model(condition_dropout=0.1).float()
    rows = built.exposure.null.weight
    assert torch.allclose(rows @ rows.T, 16 * torch.eye(8), atol=1e-4)
    built.save_pretrained(tmp_path)
    assert torch.equal(ConceptForMaskedLM.from_pretrained(tmp_path).exposure.null.weight, rows)
    wider = ConceptForMaskedLM.from_pretrained(tmp_path, num_concepts=12).exposure.null.weight
    assert wider.shape == (12, 16) and torch.allclose(wider.norm(dim=1), torch.full((12,), 4.0), atol=1e-3)
