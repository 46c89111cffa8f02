"""Words and states read back: what is asked, the loss by its formula, and that only concepts tell."""

import numpy as np
import pytest
import torch

from conceptron.models.config import ConceptConfig
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.objectives import ReadBack, SampleKey, SpecialTokens, StateReader
from conceptron.models.packing import pack
from conceptron.models.pretraining import Pretraining, Totals

TOKENS = SpecialTokens(1, frozenset({0, 1, 2, 3}), 60)
LENGTHS = (9, 14, 1, 30)


@pytest.fixture
def model() -> ConceptForMaskedLM:
    torch.manual_seed(0)
    inner = {"model_type": "bert", "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 1,
             "num_attention_heads": 4, "intermediate_size": 20, "max_position_embeddings": 32}  # fmt: skip
    config = ConceptConfig(
        vocab_size=60, hidden_size=24, num_concepts=4, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=20, num_decoder_layers=1, mask_token_id=1, decoder_queries="position",
        backbone={"config": inner, "prefix": [2], "suffix": [3]}, backbone_window=16, init_queries="state",
    )  # fmt: skip
    return ConceptForMaskedLM(config)


def view_of(options: ReadBack, rows=None):
    rows = range(len(LENGTHS)) if rows is None else rows
    generator = np.random.default_rng(0)
    texts = [generator.integers(2, 60, n) for n in LENGTHS]
    return options.view(pack([texts[i] for i in rows]), [SampleKey(0, 0, i) for i in rows], TOKENS), texts


def test_a_share_is_asked_for_and_nothing_is_hidden():
    view, texts = view_of(ReadBack(probability=0.5, words=0.25))
    assert view.encoder.input_ids.tolist() == np.concatenate(texts).tolist()
    assert 0.3 * sum(LENGTHS) < view.num_targets < 0.7 * sum(LENGTHS) and bool(view.seen.all())
    assert not set(view.targets.tolist()) & TOKENS.special_ids and set(view.decoder_input_ids.tolist()) == {1}
    assert view.weights.tolist() == [0.25] * view.num_targets and view.divisor == view.num_targets
    alone, _ = view_of(ReadBack(probability=0.5), [3])
    assert alone.targets.tolist() == view.targets[-alone.num_targets :].tolist()
    everything, _ = view_of(ReadBack(probability=1.0))
    assert everything.num_targets == sum(int((text > 3).sum()) for text in texts)
    with pytest.raises(ValueError, match="words: expected a number in"):
        ReadBack(words=0.0)


def test_the_loss_by_its_formula(model):
    options = ReadBack(probability=0.4, words=0.5, states=2.0)
    net = Pretraining(model, state_reader=StateReader(options, 24, 24)).double()
    torch.nn.init.normal_(net.state_reader.project.weight)
    model.encoder.backbone.calibrate(view_of(options)[0].encoder)
    view, texts = view_of(options)
    output = net(view)
    states = [model.encoder.backbone.centred(model.encoder.backbone(pack([text]))) for text in texts]
    lengths = view.decoder_cu_seqlens.diff().tolist()
    targets = torch.cat([
        state[positions] for state, positions in zip(states, view.decoder_position_ids.split(lengths), strict=True)
    ])  # fmt: skip
    rows = model(view=view, output_token_states=True, return_nll=True)
    error = (net.state_reader.project(rows.token_states) - targets).square().mean(1)
    torch.testing.assert_close(output.figures["state_error"], error.mean().float(), rtol=1e-5, atol=1e-5)
    expected = 0.5 * rows.nll.double().mean() + 2 * error.mean()
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=1e-5)
    error_sum, without, count = net(view, return_states=True).tolist()
    assert count == view.num_targets and error_sum / count == pytest.approx(float(error.mean().detach()), rel=1e-5)
    assert without != pytest.approx(error_sum)


def test_stored_states_change_nothing_and_cuts_add_up(model):
    options = ReadBack(probability=0.4, states=1.0)
    net = Pretraining(model, state_reader=StateReader(options, 24, 24)).double()
    whole, _ = view_of(options)
    loss = net(whole).loss
    views = [view_of(options, rows)[0] for rows in ([0, 2], [1], [3])]
    totals = Totals.of(views)
    parts = sum(net(view, totals=totals).loss for view in views)
    torch.testing.assert_close(parts, loss, rtol=1e-5, atol=1e-6)
    stored = whole.encoder._replace(states=model.encoder.backbone(whole.encoder))
    backbone = model.encoder.backbone
    backbone.forward = lambda packed: pytest.fail("computed although it is stored")
    torch.testing.assert_close(net(type(whole)(**{**vars(whole), "encoder": stored})).loss, loss)


def test_it_learns_to_read_states_from_concepts(model):
    torch.manual_seed(0)
    options = ReadBack(probability=1.0, words=0.1, states=1.0)
    net = Pretraining(model, state_reader=StateReader(options, 24, 24))
    view, _ = view_of(options)
    model.encoder.backbone.calibrate(view.encoder)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    first = float(net(view).figures["state_error"])
    for _ in range(60):
        optimizer.zero_grad()
        net(view).loss.backward()
        optimizer.step()
    error, without, count = net(view, return_states=True).tolist()
    assert first == pytest.approx(1.0, abs=0.15) and error / count < 0.6 and without > 1.3 * error
