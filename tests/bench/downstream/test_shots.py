"""A label after examples in the prompt."""

import numpy as np
import pytest

from conceptron.bench.downstream.answers import shots
from conceptron.bench.downstream.protocol import Asked
from conceptron.bench.downstream.readers import Ablated
from conceptron.engine.errors import InputError
from conceptron.engine.labelled.examples import Example
from conceptron.engine.labelled.task import load_task

pytest.importorskip("sklearn")


class Angles:
    """A text's vector has the angle that is its number, in degrees."""

    name, fingerprint = "angles", ""

    def whole(self, texts):
        angles = np.radians([float(text) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def asked(examples: list[tuple[float, str]], last: float) -> list[Example]:
    prompt = "".join(f"Question: {angle}\nType: {label}\n" for angle, label in examples)
    return [Example("0", "Type:", f"{prompt}Question: {last}", None)]


def test_all_examples_answer_and_not_the_nearest_alone():
    """One of the other kind stands among the dates, and nearer than they to what is asked."""
    known = [(angle, "Date") for angle in range(0, 50, 5)] + [(angle, "Individual") for angle in range(90, 140, 5)]
    assert shots.predict(asked([*known, (12, "Individual")], last=12.5), Angles()) == {"0": "Date"}
    assert shots.predict(asked(known, last=100), Angles()) == {"0": "Individual"}


def test_without_what_was_read_the_commonest_label_is_left():
    """As the row of the ablation has it."""
    known = [(0, "Date"), (5, "Date"), (10, "Date"), (90, "Individual"), (95, "Individual")]
    question = Asked(load_task("longbench/trec"), asked(known, last=92), [])
    assert question.predict(Angles(), Angles(), None) == {"0": "Individual"}
    assert question.predict(Ablated(Angles(), "zeroed"), Angles(), None) == {"0": "Date"}


def test_one_label_is_all_there_is():
    assert shots.predict(asked([(0, "Date"), (90, "Date")], last=45), Angles()) == {"0": "Date"}


def test_another_prompt_is_one_line():
    with pytest.raises(InputError, match=r"0: expected a prompt of 'Question: ...' and 'Type: ...' lines"):
        shots.predict([Example("0", "Type:", "A text without examples.", None)], Angles())
