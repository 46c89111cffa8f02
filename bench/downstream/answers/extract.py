"""Answers and summaries taken from the document: which sentences, its concepts say. Nothing is trained.

P parts of a document, S sentences, e width of a vector.
"""

import re
from collections.abc import Sequence

import numpy as np

from ....engine.labelled.examples import Example
from ....engine.labelled.task import Task
from ...analysis.embedding import directions
from ..readers import Read, Reader
from .retrieval import bm25_scores

# Not the rule of engine/embedding/passage.py: a file that is searched may be wrapped, so that a line's end ends no
# sentence; these tasks have headings, and a line a paragraph. One rule for both would change the published answers.
SENTENCE = re.compile(r"[^\n.!?]+(?:[.!?](?!\s)[^\n.!?]*)*[.!?]*")
WORD = re.compile(r"\w+")
YES_OR_NO = re.compile(r"(is|are|was|were|do|does|did|can|could|has|have|had|will|would|should)\b", re.IGNORECASE)
DENIAL = re.compile(r"\b(no|not|never|none|neither|nor|cannot|without)\b|n't\b", re.IGNORECASE)
NEAR = 0.2  # cosine of a question with what answers it, at least: unrelated sentences of a sentence encoder lie below
SHORTEST, LONGEST = 4, 60  # words of a sentence that a summary may have
FEW = 16  # sentences, headings among them, that are compared with the question by vectors of their own
# Of summaries, chosen on SQuALITY's training split and on the abstracts of PLOS articles:
SHARPNESS = 25.0  # of a softmax over cosines, with which a question weighs the parts of a document
SECOND = 0.3  # what a second sentence about a part still adds
COST = 0.5  # power of a sentence's words that its gain is divided by: at 1 short sentences win that say little


def sentences(text: str) -> list[tuple[int, int]]:
    """Their characters; a line's end also ends a sentence."""
    return [match.span() for match in SENTENCE.finditer(text) if match[0].strip()]


def relevance(spans: Sequence[tuple[int, int]], read: Read, weights_P: np.ndarray) -> np.ndarray:
    """[S]: of every sentence the mean weight of the parts that it overlaps, by how much."""
    begin, end = np.array(spans).T
    shared = np.minimum(end[:, None], read.spans[:, 1]) - np.maximum(begin[:, None], read.spans[:, 0])
    shared = shared.clip(0)
    total = shared.sum(1)
    return (shared @ weights_P) / np.where(total > 0, total, 1)


def spans(task: Task, given: Sequence[Example], reader: Reader, asks: Reader) -> dict[str, str]:
    """Of one sentence yes or no to such a question, else words of it; or that there is no answer, where the task has
    such ones and nothing is near. The parts of the document say which few sentences are near to the question; of these
    that one is taken which they and its own vector together put first.
    """
    reads, queries = reader.parts([e.document for e in given]), directions(asks.whole([e.question for e in given]))
    near: list[tuple[list[str], np.ndarray]] = []
    for each, read, query in zip(given, reads, queries, strict=True):
        found = sentences(each.document)
        scores = relevance(found, read, directions(read.vectors) @ query)
        best = np.argsort(-scores, kind="stable")[:FEW]
        near.append(([each.document[slice(*found[i])] for i in best], scores[best]))
    vectors = directions(asks.whole([text for texts, _ in near for text in texts]))
    made, first = {}, 0
    for each, query, (texts, scores) in zip(given, queries, near, strict=True):
        own = vectors[first : first + len(texts)] @ query
        first += len(texts)
        if task.nothing and scores[0] < NEAR:
            made[each.id] = task.nothing
            continue
        made[each.id] = answer_in(each.question, texts[int((scores + own).argmax())], task.words)
    return made


def bm25_spans(given: Sequence[Example], words: int) -> dict[str, str]:
    made = {}
    for each in given:
        found = sentences(each.document)
        best = int(bm25_scores([each.question], [each.document[a:b] for a, b in found])[0].argmax())
        made[each.id] = answer_in(each.question, each.document[slice(*found[best])], words)
    return made


def answer_in(question: str, sentence: str, num_words: int) -> str:
    """To a question of yes or no, no where the sentence denies something that the question does not; else the run of
    ``num_words`` words of the sentence with the most that neither the question has nor every text."""
    if YES_OR_NO.match(question.strip()):
        return "No" if DENIAL.search(sentence) and not DENIAL.search(question) else "Yes"
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    words, known = sentence.split(), {word.lower() for word in WORD.findall(question)} | ENGLISH_STOP_WORDS
    found = [WORD.search(word) for word in words]
    is_new = [match is not None and match[0].lower() not in known for match in found]
    runs = [sum(is_new[i : i + num_words]) for i in range(max(1, len(words) - num_words + 1))]
    first = int(np.argmax(runs))
    return " ".join(words[first : first + num_words]).strip(" ,;:")


def summaries(task: Task, given: Sequence[Example], reader: Reader, asks: Reader) -> dict[str, str]:
    """Sentences that together come near to all concepts of the document, in their order there, up to ``task.words``.

    One after the other that sentence is taken which adds most, over its words to the power COST, to
    sum_p w_p (best_p + SECOND * second_p), the two largest cosines of part p with a sentence taken; w is a softmax over
    the cosines of the parts with the question, or without one with their own mean, so that what a document is mostly
    about counts most. A sentence that says again what is covered adds little.
    Facility location, by the greedy rule (Lin and Bilmes 2011, ACL).
    """
    reads = reader.parts([each.document for each in given])
    asked = directions(asks.whole([each.question for each in given])) if given[0].question else [None] * len(given)
    made = {}
    for each, read, query in zip(given, reads, asked, strict=True):
        found = [span for span in sentences(each.document)
                 if SHORTEST <= len(each.document[slice(*span)].split()) <= LONGEST]  # fmt: skip
        texts = [each.document[slice(*span)].strip() for span in found]
        if not texts:
            made[each.id] = " ".join(each.document.split()[: task.words])
            continue
        parts = directions(read.vectors)
        weights = np.exp(SHARPNESS * (parts @ (directions(parts.mean(0)) if query is None else query)))
        weights /= weights.sum()
        cosines_SP = directions(asks.whole(texts)) @ parts.T
        taken = greedy(cosines_SP.clip(0), weights, np.array([len(text.split()) for text in texts]), task.words)
        made[each.id] = " ".join(texts[i] for i in sorted(taken))
    return made


def greedy(gains_SP: np.ndarray, weights_P: np.ndarray, lengths_S: np.ndarray, budget: int) -> list[int]:
    best, second = np.zeros(len(weights_P)), np.zeros(len(weights_P))
    taken: list[int] = []
    room = budget
    while True:
        fits = lengths_S <= room
        fits[taken] = False
        if not fits.any():
            return taken or [int(lengths_S.argmin())]
        high = np.maximum(best, gains_SP)
        low = np.maximum(np.minimum(best, gains_SP), second)
        added = ((high - best) + SECOND * (low - second)) @ weights_P / lengths_S**COST
        choice = int(np.where(fits, added, -np.inf).argmax())
        taken.append(choice)
        best, second = high[choice], low[choice]
        room -= int(lengths_S[choice])


def leads(task: Task, given: Sequence[Example]) -> dict[str, str]:
    """The beginning of the document."""
    return {each.id: " ".join(each.document.split()[: task.words]) for each in given}
