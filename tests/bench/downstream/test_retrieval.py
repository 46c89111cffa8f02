"""Documents ranked for a query."""

import numpy as np

from conceptron.bench.analysis.embedding import directions
from conceptron.bench.downstream.answers import retrieval
from conceptron.bench.downstream.readers import Read
from conceptron.engine.labelled.examples import Example

WORDS = ("summary", "bridge", "budget")
TEXTS = {  # each line is a part
    "a": "the bridge was built\nsummary\nsummary",
    "b": "summary of the meeting\nsummary\nsummary of budget",
    "c": "summary\nbridge\nbudget budget budget",
}


class Lines:
    """Reads a line of a document into one concept, how often WORDS occur."""

    def whole(self, texts):
        return np.array([[text.count(word) for word in WORDS] for text in texts], dtype=np.float32)

    def parts(self, texts):
        spans = np.zeros((3, 2), dtype=np.int64)
        return [Read(self.whole(text.split("\n")), self.whole([text])[0], spans, 9, 9) for text in texts]


def asked(*queries):
    given = [(query, TEXTS["ab"[i % 2]]) for i, query in enumerate(queries)]
    return [Example(str(i), *each, None) for i, each in enumerate([*given, ("", TEXTS["c"])])]


def test_what_all_queries_and_all_parts_say_tells_nothing():
    """A summary is asked for in every query and stands in nearly every line; what else a query says decides."""
    given = asked("summary, summary, summary: bridge", "summary, summary, summary: budget")
    lines = [directions(Lines().whole(text.split("\n"))) for text in TEXTS.values()]
    for query in Lines().whole([each.question for each in given[:2]]):
        assert np.ptp([(rows @ query).max() for rows in lines]) == 0  # as they are, all documents are alike
    found = retrieval.predict(given[:2], Lines(), Lines())
    assert found["0"][0] == "0" and found["1"][0] == "1"


def test_several_parts_speak_for_a_document():
    """The mean over the three nearest, by hand, of vectors whose mean is taken away."""
    given = asked("bridge", "budget")
    scores = retrieval.by_parts(given, Lines(), Lines())
    queries = np.array([[0, 1, 0], [0, 0, 1], [0, 0, 0]]) - np.array([[0, 1, 1]]) / 3
    parts = np.stack([Lines().whole(TEXTS[name].split("\n")) for name in "abc"])
    parts = parts - parts.reshape(-1, 3).mean(0)
    for i, query in enumerate(queries):
        for j, rows in enumerate(parts):
            cosines = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
            np.testing.assert_allclose(scores[i, j], cosines.mean(), atol=1e-6)  # BEST of three are all


def test_one_query_is_not_taken_from_itself():
    assert not np.allclose(retrieval.by_parts(asked("bridge")[:1], Lines(), Lines()), 0)


def test_with_bm25_both_speak():
    given = asked("bridge", "budget")[:2]
    found = retrieval.variants(given, Lines(), Lines())
    assert set(found) == {"one vector", "with BM25"}
    assert found["with BM25"]["0"][0] == "0" and found["with BM25"]["1"][0] == "1"
