"""A label after examples in the prompt, as LongBench's trec has it: that of the example that is most alike."""

import re
from collections.abc import Sequence

from ....engine.errors import InputError
from ....engine.labelled.examples import Example
from ...analysis.embedding import directions
from ..readers import Reader

SHOT = re.compile(r"Question: (.*)\nType: (.+)")
LAST = re.compile(r"Question: (.*)\s*(?:\nType:)?\s*$")


def predict(given: Sequence[Example], asks: Reader) -> dict[str, str]:
    """
    Raises:
        InputError: a prompt has no examples of the form that is known here.
    """
    made = {}
    for each in given:
        shots = SHOT.findall(each.document)
        asked = LAST.search(f"{each.document}\n{each.question}".rstrip())
        if not shots or asked is None:
            raise InputError(f"{each.id}: expected a prompt of 'Question: ...' and 'Type: ...' lines")
        vectors = directions(asks.whole([question for question, _ in shots] + [asked[1]]))
        made[each.id] = shots[int((vectors[:-1] @ vectors[-1]).argmax())][1]
    return made
