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


def test_a_long_sentence_that_says_much_goes_before_a_short_one_that_says_little():
    """A word of the short one says more, but then there is no room for the other."""
    gains = np.array([[0.4], [0.9]])
    assert extract.greedy(gains, np.ones(1), np.array([4, 16]), 16) == [1]
    assert extract.greedy(gains, np.ones(1), np.array([4, 16]), 20) == [1, 0]


class Parts:
    """A document of four lines, each a part; three are about the bridge."""

    def whole(self, texts):
        return np.array([[text.count("bridge"), text.count("cake"), 0.1] for text in texts])

    def parts(self, texts):
        ends = [np.cumsum([0, *(len(line) + 1 for line in text.split("\n"))]) for text in texts]
        return [Read(self.whole(text.split("\n")), self.whole([text])[0], np.stack([e[:-1], e[1:]], 1), 9, 9)
                for text, e in zip(texts, ends, strict=True)]  # fmt: skip


def test_a_summary_is_of_what_a_document_is_mostly_about_or_of_what_is_asked():
    lines = ["There was a large cake.", "They built one bridge.", "That bridge was long.", "No bridge was longer."]
    task = load_task("scrolls/gov_report").model_copy(update={"words": 5})
    given = [Example("0", "", "\n".join(lines), "")]
    assert "bridge" in extract.summaries(task, given, Parts(), Parts())["0"]
    given = [Example("0", "Who had a cake?", "\n".join(lines), "")]
    assert extract.summaries(task, given, Parts(), Parts()) == {"0": lines[0]}
