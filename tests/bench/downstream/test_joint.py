"""A fine-tuned encoder of transformers answers by the head of its task."""

import torch
from transformers import BertConfig, BertForSequenceClassification

from conceptron.bench.downstream import readers
from conceptron.bench.downstream.answers import head
from conceptron.engine.data import tokenizer
from conceptron.engine.labelled.examples import Example
from conceptron.engine.labelled.joint import NOTE, Joint, Note
from conceptron.engine.labelled.task import load_task


def test_answering_and_counting_tokenise_once(tmp_path, monkeypatch):
    """And others when others are asked."""
    task = load_task("scrolls/contract_nli")
    given = [Example(str(i), f"The door is {colour}.", "The door is red, the boat is blue.", None)
             for i, colour in enumerate(("red", "blue"))]  # fmt: skip
    words = tokenizer.train([text for each in given for text in (each.question, each.document)], 300)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, num_labels=len(task.labels),
    )  # fmt: skip
    setattr(config, NOTE, Note(task.name, 64)._asdict())
    BertForSequenceClassification(config).save_pretrained(tmp_path / "peer")
    words.save_pretrained(tmp_path / "peer")
    calls = []

    class Counted(Joint):
        def read(self, given):
            calls.append([each.id for each in given])
            return super().read(given)

    monkeypatch.setattr(readers, "Joint", Counted)
    reader = readers.PeerReader(str(tmp_path / "peer"), str(tmp_path / "cache"))
    assert set(head.predict(task, given, reader)) == {"0", "1"}
    seen, whole = head.count(task, list(given), reader)
    assert 0 < seen == whole and calls == [["0", "1"]]
    assert head.predict(task, given[:1], reader).keys() == {"0"} and calls == [["0", "1"], ["0"]]
