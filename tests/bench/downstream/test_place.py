"""Where something stands, and how many different passages there are."""

import numpy as np
import pytest

from conceptron.bench.downstream.answers import place
from conceptron.bench.downstream.readers import Read
from conceptron.engine.errors import InputError
from conceptron.engine.labelled.examples import Example
from conceptron.engine.labelled.task import load_task

PASSAGES = ["The river is wide.", "The bridge is old.", "The bridge is new."]


class Letters:
    """A text's vector counts its letters; of a document there are four equal parts."""

    def whole(self, texts):
        return np.array([[text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts])

    def parts(self, texts):
        made = []
        for text in texts:
            edges = [i * len(text) // 4 for i in range(5)]
            spans = np.array([edges[:-1], edges[1:]]).T
            made.append(Read(self.whole([text[a:b] for a, b in spans]), self.whole([text])[0], spans, 9, 9))
        return made


def document(*passages: str) -> str:
    return "".join(f"Paragraph {i}: {text}\n\n" for i, text in enumerate(passages, 1))


@pytest.mark.parametrize(("order", "count"), [((0, 1, 0, 2, 1, 0), "3"), ((1, 1, 1, 1, 1), "1"), ((2, 0, 1), "3")])
def test_passages_are_counted_wherever_the_parts_end(order, count):
    given = [Example("0", "", document(*(PASSAGES[i] for i in order)), None)]
    assert place.predict(load_task("longbench/passage_count"), given, Letters(), Letters()) == {"0": count}


def test_the_paragraph_that_is_asked_for():
    given = [Example("0", "A bridge, and it is old.", document(*PASSAGES[:2]), None)]
    task = load_task("longbench/passage_retrieval_en")
    assert place.predict(task, given, Letters(), Letters()) == {"0": "Paragraph 2"}


@pytest.mark.parametrize("name", ["passage_count", "passage_retrieval_en"])
def test_no_paragraphs_are_one_line(name):
    with pytest.raises(InputError, match=r"0: expected a document of 'Paragraph 1: ...'"):
        place.predict(load_task(f"longbench/{name}"), [Example("0", "What?", "A text.", None)], Letters(), Letters())
