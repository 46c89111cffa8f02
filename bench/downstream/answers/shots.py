"""A label after examples in the prompt, as LongBench's trec has it: by a linear head on the examples of that prompt."""

import re
from collections.abc import Sequence

from ....engine.errors import InputError
from ....engine.labelled.examples import Example
from ...analysis.embedding import directions
from ..readers import Reader

SHOT = re.compile(r"Question: (.*)\nType: (.+)")
LAST = re.compile(r"Question: (.*)\s*(?:\nType:)?\s*$")
PENALTY = 0.3  # of vectors of length 1: of .1 to 10 the best on the examples of trec's prompts, each left out once


def predict(given: Sequence[Example], reader: Reader) -> dict[str, str]:
    """
    Raises:
        InputError: a prompt has no examples of the form that is known here.
    """
    from sklearn.linear_model import RidgeClassifier

    made = {}
    for each in given:
        shots = SHOT.findall(each.document)
        asked = LAST.search(f"{each.document}\n{each.question}".rstrip())
        if not shots or asked is None:
            raise InputError(f"{each.id}: expected a prompt of 'Question: ...' and 'Type: ...' lines")
        questions, labels = zip(*shots, strict=True)
        vectors = directions(reader.whole([*questions, asked[1]]))
        head = RidgeClassifier(alpha=PENALTY).fit(vectors[:-1], labels)
        made[each.id] = str(head.predict(vectors[-1:])[0])
    return made
