"""What transformers guesses about a model from its names and signatures, asked of transformers itself."""

import inspect
import logging

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.utils.generic import can_return_loss, find_labels

from conceptron.engine.data import tokenizer as tokenizers
from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.tasks.heads import (
    ConceptForMultipleChoice,
    ConceptForQuestionAnswering,
    ConceptForSequenceClassification,
)
from conceptron.models.tasks.tokens import ConceptForTokenClassification

SMALL = dict(
    vocab_size=300, hidden_size=32, num_concepts=6, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
    num_decoder_layers=1, mask_token_id=4, pad_token_id=0,
)  # fmt: skip
LABELS = {
    ConceptEncoder: [],
    ConceptForMaskedLM: ["labels"],
    ConceptForSequenceClassification: ["labels"],
    ConceptForMultipleChoice: ["labels"],
    ConceptForQuestionAnswering: ["start_positions", "end_positions"],
    ConceptForTokenClassification: ["labels"],
}
TAKEN = {  # what transformers, its collators, PEFT and sentence-transformers give any model
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "output_attentions",
    "output_hidden_states", "return_dict", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
}  # fmt: skip
TEXT = "a plane is an air plane and the train that left the station was late"


def model(kind=ConceptForMaskedLM, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return kind(ConceptConfig(**{**SMALL, **options})).eval()


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return tokenizers.for_use(tokenizers.train([TEXT] * 3, 300), 16)


def ids(kind: type) -> torch.Tensor:
    shape = (2, 3, 7) if kind is ConceptForMultipleChoice else (2, 7)
    return torch.randint(5, 60, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", LABELS)
def test_labels_are_what_transformers_finds_and_nothing_else(kind):
    assert find_labels(kind) == LABELS[kind] and not can_return_loss(kind)
    parameters = inspect.signature(kind.forward).parameters
    assert parameters.keys() >= TAKEN
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())  # else the Trainer believes in loss options


@pytest.mark.parametrize("kind", LABELS)
def test_arguments_without_a_meaning_are_taken_and_impossible_ones_refused(kind):
    built, batch = model(kind), ids(kind)
    want = built(batch)
    got = built(batch, token_type_ids=torch.ones_like(batch), output_attentions=False)
    assert torch.equal(got[0], want[0])
    if kind in (ConceptEncoder, ConceptForMaskedLM):
        assert built(batch, output_attentions=True).attentions[0].shape == (2, 4, 6, 7)
        return
    with pytest.raises(ValueError, match=r"output_attentions: expected False, got True.*model\.encoder"):
        built(batch, output_attentions=True)


@pytest.mark.parametrize("kind", LABELS)
def test_outputs_follow_the_configuration_as_in_transformers(kind, tmp_path):
    model(kind).save_pretrained(tmp_path)
    batch = ids(kind)
    loud = kind.from_pretrained(tmp_path, output_hidden_states=True).eval()
    states = loud(batch).hidden_states
    assert len(states) == 2 and all(state.shape[1:] == (6, 32) for state in states)
    assert loud(batch, output_hidden_states=False).hidden_states is None
    plain = kind.from_pretrained(tmp_path, return_dict=False).eval()
    assert isinstance(plain(batch), tuple) and torch.equal(plain(batch)[0], loud(batch)[0])
    assert not isinstance(plain(batch, return_dict=True), tuple)


def test_an_encoder_gives_what_automodel_promises(tmp_path, caplog, monkeypatch):
    model().save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level("WARNING"):
        encoder = AutoModel.from_pretrained(tmp_path).eval()
    assert not caplog.records  # that the decoder stays in the folder is no surprise
    out = encoder(ids(ConceptEncoder))
    assert list(out)[:2] == ["last_hidden_state", "pooler_output"]
    assert torch.allclose(out.pooler_output, out.last_hidden_state.mean(1))
    labels = AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=3)
    assert any(name.startswith("lm_head") for name in labels.load_report.unused)  # which a head still tells


def test_a_class_of_ours_registers_without_a_copy_of_the_code(tmp_path):
    ConceptForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
    ConceptConfig.register_for_auto_class()
    model().save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py")) and "auto_map" not in (tmp_path / "config.json").read_text()
    assert isinstance(AutoModelForMaskedLM.from_pretrained(tmp_path), ConceptForMaskedLM)


@pytest.mark.parametrize("kind", [kind for kind in LABELS if kind is not ConceptEncoder])
def test_the_trainer_evaluates_and_takes_back_the_best(kind, tmp_path):
    """eval_loss, metrics, columns and the best checkpoint, with the Trainer's own code."""
    pytest.importorskip("accelerate")  # the Trainer needs it
    rows = {"input_ids": ids(kind).repeat(2, *[1] * (ids(kind).ndim - 1)).tolist(), "stranger": [1.0] * 4}
    rows["attention_mask"] = torch.ones_like(torch.tensor(rows["input_ids"])).tolist()
    if kind is ConceptForQuestionAnswering:
        rows |= {"start_positions": [1, 2, 3, 0], "end_positions": [2, 2, 4, 0]}
    else:
        by_token = kind in (ConceptForMaskedLM, ConceptForTokenClassification)
        rows["labels"] = [[1] * 7] * 4 if by_token else [0, 1, 0, 1]
    data = Dataset.from_dict(rows)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, eval_strategy="steps", eval_steps=1,
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="seen", report_to=[], use_cpu=True,
        disable_tqdm=True, learning_rate=1e-3, save_total_limit=1,
    )  # fmt: skip
    trainer = Trainer(
        model(kind, num_labels=2).train(), arguments, train_dataset=data, eval_dataset=data,
        compute_metrics=lambda given: {"seen": float(len(given.predictions[0]))},
    )  # fmt: skip
    assert trainer.label_names == LABELS[kind]
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "attention_mask", *LABELS[kind]} <= set(trainer._signature_columns)
    trainer.train()
    figures = trainer.evaluate()
    assert figures["eval_loss"] > 0 and figures["eval_seen"] > 0 and trainer.state.best_metric == figures["eval_seen"]
    assert "stranger" not in trainer._remove_unused_columns(data, "training").column_names


@pytest.mark.parametrize("options", [
    dict(num_token_layers=1, token_window=4), dict(layer_kind="bixt", num_hidden_layers=2),
], ids=["token layers", "bixt"])  # fmt: skip
def test_the_trainer_recomputes_layers(options, tmp_path):
    """With its own switch: every layer runs once more a step, and the losses and weights are the same."""
    pytest.importorskip("accelerate")
    data = Dataset.from_dict({"input_ids": ids(ConceptForMaskedLM).repeat(4, 1).tolist(), "labels": [[1] * 7] * 8})
    found = {}
    for is_recomputed in (False, True):
        built, calls = model(**options).train(), []
        for layer in (*built.encoder.layers, *built.encoder.token_layers):
            layer.feed_norm.register_forward_hook(lambda *given, calls=calls: calls.append(1))
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(is_recomputed)), max_steps=2, per_device_train_batch_size=4, use_cpu=True,
            gradient_checkpointing=is_recomputed, report_to=[], disable_tqdm=True, save_strategy="no", seed=1,
        )  # fmt: skip
        trainer = Trainer(built, arguments, train_dataset=data)
        trainer.train()
        found[is_recomputed] = len(calls), {name: p.detach().clone() for name, p in built.named_parameters()}
    assert found[True][0] == 2 * found[False][0] > 0
    for name, parameter in found[False][1].items():
        torch.testing.assert_close(found[True][1][name], parameter)


def test_pipelines(words, tmp_path):
    options = {"tokenizer": words, "device": "cpu"}
    (states,) = pipeline("feature-extraction", model(ConceptEncoder), **options)("the train")
    assert torch.tensor(states).shape == (6, 32)
    best = pipeline("fill-mask", model(), **options)("the [MASK] was late", top_k=3)
    assert len(best) == 3 and best[0]["score"] >= best[1]["score"]
    labelled = model(ConceptForTokenClassification, num_labels=2)
    with torch.no_grad():
        labelled.classifier.bias.copy_(torch.tensor([0.0, 9.0]))
    found = pipeline("token-classification", labelled, **options)("the train")
    assert found and all(entry["entity"] == "LABEL_1" for entry in found)


@pytest.mark.parametrize("settled", [True, False])
def test_one_label_is_a_raw_score(words, tmp_path, settled):
    """Not its sigmoid, whether or not labels were ever seen, after saving."""
    built = model(ConceptForSequenceClassification, num_labels=1, label_offset=2.5)
    if settled:
        built(ids(type(built)), labels=torch.tensor([1.0, 4.0]))
    built.save_pretrained(tmp_path)
    again = ConceptForSequenceClassification.from_pretrained(tmp_path).eval()
    assert again.config.problem_type == "regression"
    (score,) = pipeline("text-classification", again, tokenizer=words, device="cpu")("the train")
    assert score["score"] == pytest.approx(2.5)


@pytest.mark.parametrize("labels, kind", [
    (torch.tensor([0, 1]), "single_label_classification"),
    (torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), "multi_label_classification"),
])  # fmt: skip
def test_the_first_labels_settle_the_problem(labels, kind):
    built = model(ConceptForSequenceClassification, num_labels=3)
    assert built.config.problem_type is None
    built(ids(type(built)), labels=labels)
    assert built.config.problem_type == kind


def test_labels_of_minus_100_are_not_asked():
    """Of classes and of 0 and 1; a regression takes every number for a value."""
    built, batch = model(ConceptForSequenceClassification, num_labels=2), ids(ConceptForSequenceClassification)
    with torch.no_grad():
        built.classifier.weight.normal_()
    one = built(batch[:1], labels=torch.tensor([1])).loss
    assert torch.allclose(built(batch, labels=torch.tensor([1, -100])).loss, one)
    assert built(batch, labels=torch.tensor([-100, -100])).loss == 0
    many = model(ConceptForSequenceClassification, num_labels=2, problem_type="multi_label_classification")
    many.load_state_dict(built.state_dict())
    logits = many(batch).logits
    want = torch.nn.functional.binary_cross_entropy_with_logits(logits[0, :1], torch.tensor([1.0]))
    assert torch.allclose(many(batch, labels=torch.tensor([[1.0, -100], [-100, -100]])).loss, want)
    assert many(batch, labels=torch.full((2, 2), -100.0)).loss == 0
    value = model(ConceptForSequenceClassification, num_labels=1)
    assert torch.allclose(value(batch, labels=torch.tensor([-100.0, 0.0])).loss, torch.tensor(5000.0))


@pytest.mark.parametrize("kind, task", [
    (ConceptEncoder, "FEATURE_EXTRACTION"), (ConceptForSequenceClassification, "SEQ_CLS"),
    (ConceptForTokenClassification, "TOKEN_CLS"), (ConceptForQuestionAnswering, "QUESTION_ANS"),
    (ConceptForMaskedLM, None),
])  # fmt: skip
def test_low_rank_adapters_train(kind, task, tmp_path):
    """Adapters and the head move, and nothing else; saved and loaded they give the same."""
    peft = pytest.importorskip("peft")
    base, batch = model(kind, num_labels=2), ids(kind)
    names = ["project", "value", "out", "gate_up", "down"]
    options = peft.LoraConfig(task_type=task, r=2, target_modules=names, init_lora_weights=False)
    base.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, options)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    labels = {
        ConceptForSequenceClassification: {"labels": torch.tensor([0, 1])},
        ConceptForQuestionAnswering: {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([1, 3])},
    }.get(kind, {"labels": torch.ones_like(batch)} if kind is not ConceptEncoder else {})
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # a head that starts at zero passes no gradient in its first step
        out = adapted.train()(batch, attention_mask=torch.ones_like(batch), **labels)
        (out.loss if labels else out.pooler_output.square().mean()).backward()
        optimizer.step()
    moved = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert any("lora_A" in name for name in moved) and any("lora_B" in name for name in moved)
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
    head = {"SEQ_CLS": "classifier", "TOKEN_CLS": "classifier", "QUESTION_ANS": "qa_outputs"}.get(task)
    assert head is None or any(head in name for name in moved)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.allclose(again(input_ids=batch)[0], adapted(input_ids=batch)[0], atol=1e-6)
