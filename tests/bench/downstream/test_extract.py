"""Answers that are taken from the document."""

import numpy as np

from conceptron.bench.downstream.answers import extract
from conceptron.bench.downstream.readers import Read
from conceptron.engine.labelled.examples import Example
from conceptron.engine.labelled.task import load_task


class OneConcept:
    """Reads a document into one concept; a text's own vector counts three words."""

    def whole(self, texts):
        return np.array([[text.lower().count(word) + 1e-3 for word in ("bridge", "river", "age")] for text in texts])

    def parts(self, texts):
        return [Read(np.ones((1, 3)), np.ones(3), np.array([[0, len(text)]]), 9, 9) for text in texts]


def test_of_the_sentences_of_a_part_the_nearest_answers():
    """One concept stands for all of them, the heading first: their own vectors say which."""
    text = "Part 1\nA river flows through it. Its bridge was built of chestnut wood. Nobody knows its age."
    task = load_task("scrolls/narrative_qa")
    given = [Example("0", "What is the bridge made of?", text, ["wood"])]
    found = extract.spans(task, given, OneConcept(), OneConcept())
    assert "chestnut" in found["0"]
