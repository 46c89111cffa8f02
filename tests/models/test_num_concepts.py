"""Another number of concepts in one call: what a model loaded with that number would give."""

import pytest
import torch

from conceptron.models.config import ConceptConfig
from conceptron.models.decisions import CHOICES
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.packing import fitting_concepts, pack
from conceptron.models.start.resize import resized
from conceptron.models.tasks.heads import ConceptForQuestionAnswering, ConceptForSequenceClassification

SMALL = dict(
    vocab_size=60, hidden_size=32, num_concepts=6, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    num_decoder_layers=1, mask_token_id=3, num_labels=3,
)  # fmt: skip
BATCH = pack([list(range(4, 25)), [], [5, 9, 7]])
KINDS = [{"layer_kind": kind} for kind in CHOICES["layer_kind"]]
KINDS += [{"init_queries": start} for start in CHOICES["init_queries"] if start != "state"]  # see test_backbone.py
KINDS += [{"concept_positions": places} for places in CHOICES["concept_positions"]]
KINDS += [{"tie_layers": True, "num_iterations": 3}]


def model_of(kind: type = ConceptEncoder, **options):
    torch.manual_seed(0)
    return kind(ConceptConfig(**{**SMALL, **options})).double().eval()


@pytest.mark.parametrize("num_concepts", [1, 3, 11])
@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(map(str, options.values())))
def test_as_if_loaded_with_that_number(options, num_concepts):
    model = model_of(**options)
    other = resized(model, num_concepts=num_concepts)
    with torch.no_grad():
        found, expected = model(packed=BATCH, num_concepts=num_concepts), other(packed=BATCH)
    assert found.last_hidden_state.shape == (3, num_concepts, 32)
    assert torch.allclose(found.last_hidden_state, expected.last_hidden_state, atol=1e-12)
    assert torch.equal(found.anchors, expected.anchors)


def test_it_trains():
    model = model_of().train()
    model(packed=BATCH, num_concepts=9).last_hidden_state.square().sum().backward()
    assert (model.concepts.weight.grad.abs().amax(1) > 0).all()


@pytest.mark.parametrize("options", [{"pool": "attention"}, {"pool": "multi_query"}, {"pool": "decoder"}])
def test_heads_take_any_number(options):
    model = model_of(ConceptForSequenceClassification, **options)
    other = resized(model, num_concepts=4)
    with torch.no_grad():
        assert torch.allclose(model(packed=BATCH, num_concepts=4).logits, other(packed=BATCH).logits, atol=1e-12)
        assert model_of(ConceptForQuestionAnswering)(packed=BATCH, num_concepts=4).concepts.shape == (3, 4, 32)


def test_a_masked_model_answers_from_what_was_encoded():
    model, ids = model_of(ConceptForMaskedLM, condition_dropout=0.5), torch.tensor([[5, 9, 3, 8]])
    encoded = model.encoder(ids, num_concepts=3)
    assert torch.equal(model(ids, encoded=model.encoder(ids)).logits, model(ids).logits)
    assert model(ids, encoded=encoded).concepts.shape == (1, 3, 32)
    model.train()(ids, labels=ids, encoded=encoded).loss.backward()
    assert model.exposure.withhold(encoded.last_hidden_state).shape == (1, 3, 32)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3"])
def test_what_is_no_number_of_concepts_is_refused(value):
    with pytest.raises(ValueError, match="num_concepts: expected a whole number of at least 1, got"):
        model_of()(packed=BATCH, num_concepts=value)


def test_what_cannot_follow_is_refused():
    with pytest.raises(ValueError, match="num_concepts 1 -> 4: weight cannot be resized: one row"):
        model_of(num_concepts=1)(packed=BATCH, num_concepts=4)
    model = model_of(ConceptForSequenceClassification, pair="separate", pair_features="slots")
    with pytest.raises(ValueError, match="num_concepts: expected the model's C = 6 with pair_features = slots"):
        model(packed=BATCH, packed_b=BATCH, num_concepts=4)


def test_one_number_for_a_batch_by_its_longest_text():
    assert fitting_concepts(BATCH, 4, 128) == 6 and fitting_concepts(BATCH, 4, 5) == 5
    assert fitting_concepts(pack([[], []]), 4, 128) == 1
    with pytest.raises(ValueError, match="tokens_per_concept: expected a number above 0, got 0"):
        fitting_concepts(BATCH, 0, 128)
