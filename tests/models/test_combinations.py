"""Every layer kind with every objective and every head: builds, trains, saves, loads bit for bit, compiles.

They are not multiplied out (4 kinds, tied or not, x 10 x 14). An objective meets a layer kind in the encoder, a head
meets both in the checkpoint that it starts from. So each of the 4 kinds is pretrained with all 10 objectives, tied with
every second one and with the others in the next kind, and each of the 14 heads is trained from one of these
checkpoints, in turn: all pairs of kind and objective, of kind and head, of tied or not and either occur, and each head
meets 4 objectives. Compiling is slow: each kind does it once, tied, two with an objective and two with a head.
"""

import numpy as np
import pytest
import torch

from conceptron.models.config import ConceptConfig
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.objectives import TSDAE, Diffusion, MaskedLM, PrefixDiffusion, SampleKey, SpecialTokens
from conceptron.models.packing import pack
from conceptron.models.tasks.heads import (
    ConceptForMultipleChoice,
    ConceptForQuestionAnswering,
    ConceptForSequenceClassification,
)

SMALL = dict(
    vocab_size=48, hidden_size=16, num_concepts=4, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    num_decoder_layers=1, decoder_window=3, mask_token_id=3, num_labels=3,
)  # fmt: skip
TOKENS = SpecialTokens(3, frozenset({0, 1, 2, 3}), 48)

KINDS = tuple(enumerate(("cross", "bixt", "slot", "hybrid")))
LOCAL, EXCHANGE, TIMED = {"decoder_mixing": "local"}, {"decoder_mixing": "concepts"}, {"timestep_conditioning": True}
POSITION, WEIGHTED = {"decoder_queries": "position"}, {"decoder_queries": "weighted"}
OBJECTIVES = [  # each with a decoder that makes sense for it
    (MaskedLM(random=0.1, unchanged=0.1, hidden="mask"), {"hidden_tokens": "mask"}),
    (MaskedLM(masking="span", context=True), LOCAL),
    (Diffusion(), TIMED),
    (Diffusion(context=True), {**EXCHANGE, **TIMED}),
    (Diffusion(encoder_view="clean", weighting="selfnorm"), POSITION),
    (TSDAE(), {**POSITION, **LOCAL}),
    (TSDAE(positions="restart"), WEIGHTED),
    (PrefixDiffusion(), TIMED),
    (PrefixDiffusion(direction="mixed", context=True), EXCHANGE),
    (PrefixDiffusion(direction="backward", positions="restart", context=True), {**LOCAL, **TIMED}),
]
CLASSIFY, CHOOSE, ANSWER = ConceptForSequenceClassification, ConceptForMultipleChoice, ConceptForQuestionAnswering
ROWS = {"pool": "decoder", "decoder_queries": "token+position"}
HEADS = [
    *((CLASSIFY, {"pool": pool}) for pool in ("mean", "weighted", "attention", "cls_query", "multi_query")),
    (CLASSIFY, ROWS),
    (CLASSIFY, {"pool": "decoder_positions", **POSITION}),
    *((CLASSIFY, {"pair": "separate", "pair_features": features}) for features in ("concat", "cosine", "slots")),
    (CHOOSE, {}),
    (CHOOSE, ROWS),
    (ANSWER, {}),
    (ANSWER, POSITION),
]


def texts(seed: int, *lengths: int):
    rng = np.random.default_rng(seed)
    return pack([rng.integers(4, 48, n) for n in lengths])


def pretraining(objective) -> dict:
    batch = texts(0, 14, 0, 9, 1, 11, 8)
    return {"view": objective.view(batch, [SampleKey(5, 0, i) for i in range(6)], TOKENS)}


def task(kind, options) -> dict:
    batch = {"packed": texts(1, 9, 6, 12, 7)}
    if kind is ANSWER:
        return {**batch, "start_positions": torch.tensor([2, 0, 5, 1]), "end_positions": torch.tensor([4, 0, 5, 2])}
    if kind is CHOOSE:
        return {**batch, "num_choices": 2, "labels": torch.tensor([1, 0])}
    if options.get("pair") == "separate":
        batch["packed_b"] = texts(2, 5, 7, 2, 11)
    is_value = options.get("pair_features") == "cosine"
    return {**batch, "labels": torch.tensor([0.9, 0.1, -0.3, 0.5]) if is_value else torch.tensor([2, 0, 1, 1])}


def train(model: torch.nn.Module, batch: dict) -> None:
    """Three steps, the second under autocast: the loss is finite and falls, and no parameter stays where it was."""
    model.train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3, eps=1e-20), []  # gates open slowly
    for step in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=step == 1):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all() and losses[-1] < losses[0], losses
    idle = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert idle == []


def check_saving(model: torch.nn.Module, batch: dict, folder) -> None:
    model.eval().save_pretrained(folder)
    again = type(model).from_pretrained(folder)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        assert torch.equal(again(**batch).loss, model(**batch).loss)


def check_compiling(model: torch.nn.Module, batch: dict) -> None:
    """One graph, forward and backward."""
    torch._dynamo.reset()
    expected, got = (f(**batch).loss for f in (model, torch.compile(model, fullgraph=True, backend="eager")))
    assert torch.allclose(got, expected, rtol=1e-4)
    got.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("number, kind", KINDS, ids=str)
def test_it_trains_saves_and_loads(number, kind, tmp_path):
    for i, (objective, options) in enumerate(OBJECTIVES):
        torch.manual_seed(0)
        fields = {**SMALL, "layer_kind": kind, "tie_layers": (i + number) % 2 == 1, **options}
        model, batch = ConceptForMaskedLM(ConceptConfig(**fields)), pretraining(objective)
        train(model, batch)
        check_saving(model, batch, tmp_path / str(i))
    for i, (head, options) in enumerate(HEADS):
        start = (i + 2 * number + number // 2) % len(OBJECTIVES)  # tied for two of the kinds
        if "decoder_queries" in options and OBJECTIVES[start][1].get("decoder_queries") == "weighted":
            start = 0  # decoders of this kind read by place alone: no other can start from them
        labels = 1 if options.get("pair_features") == "cosine" else 3
        torch.manual_seed(0)
        model = head.from_pretrained(tmp_path / str(start), num_labels=labels, **options)
        batch = task(head, options)
        train(model, batch)
        check_saving(model, batch, tmp_path / "task")


@pytest.mark.parametrize("number, kind", [(3, "cross"), (5, "bixt")])
def test_an_objective_is_one_graph(number, kind):
    objective, options = OBJECTIVES[number]
    fields = {**SMALL, "layer_kind": kind, "tie_layers": True, **options}
    check_compiling(ConceptForMaskedLM(ConceptConfig(**fields)), pretraining(objective))


@pytest.mark.parametrize("number, kind", [(4, "slot"), (6, "hybrid")])
def test_a_task_is_one_graph(number, kind):
    head, options = HEADS[number]
    fields = {**SMALL, "layer_kind": kind, "tie_layers": True, **options}
    check_compiling(head(ConceptConfig(**fields)), task(head, options))
