"""Official metrics: cases worked out by hand, and parity with what the official code gave, where that is at hand."""

import math
from typing import Any

import pytest

from conceptron.bench.downstream.metrics import labels, longbench, ranking, scrolls, words

LONGBENCH = {
    "qa_f1_score": "f1", "rouge_score": "rouge", "classification_score": "classification",
    "retrieval_score": "retrieval", "count_score": "count", "code_sim_score": "code_similarity",
}  # fmt: skip


def test_words():
    assert words.normalized("The  cat, a DOG: café-an!") == "cat dog caféan"
    assert words.f1("the cat sat", "a cat ran") == pytest.approx(0.5)  # cat of 2 and 2
    assert words.f1("", "") == 0.0
    assert words.exact_match("A.", "the") == 1.0  # both are nothing
    assert words.exact_match("cat", "cats") == 0.0


def test_scrolls_by_hand():
    pytest.importorskip("rouge_score")
    score, rows = scrolls.rouge(["the cat sat"], [["a dog", "the cat ran"]])
    assert rows[0]["rouge/rouge1"] == pytest.approx(200 / 3)
    assert rows[0]["rouge/rouge2"] == pytest.approx(50)
    assert score["scrolls_score"] == round((200 / 3 * 50 * 200 / 3) ** (1 / 3), 4)
    assert score["display_keys"] == ["rouge/rouge1", "rouge/rouge2", "rouge/rougeL"]
    score, _ = scrolls.f1(["cat", ""], [["a cat", "dog"], ["x"]])
    assert score["f1"] == score["scrolls_score"] == 50.0
    with pytest.raises(ValueError, match="qasper, quality, contract_nli missing"):
        scrolls.benchmark({task: {"scrolls_score": 1.0} for task in scrolls.TASKS[:4]})
    assert scrolls.benchmark({task: {"scrolls_score": i} for i, task in enumerate(scrolls.TASKS)}) == 3.0


@pytest.mark.parametrize("metric", ["rouge", "f1", "exact_match"])
def test_scrolls_parity(metric, reference):
    if metric == "rouge":
        pytest.importorskip("rouge_score")
    for case in reference(f"scrolls_{metric}")["cases"]:
        ids = list(case["predictions"])
        score, rows = getattr(scrolls, metric)(
            [case["predictions"][each] for each in ids], [case["references"][each] for each in ids]
        )
        if scrolls.sentence_splitter() is None:
            case["expected"].pop("rouge/rougeLsum", None)
        official = {key: value for key, value in case["expected"].items() if not key.startswith(("num_", "mean_"))}
        assert score == official
        for each, row in zip(ids, rows, strict=True):
            for key, value in row.items():
                assert round(value, 4) == pytest.approx(case["expected_per_example"][each][key], abs=1e-9)


def test_longbench_by_hand():
    def of(metric: str, prediction: str, reference: str, classes=()) -> float:
        return longbench.METRICS[metric](prediction, reference, classes)

    assert of("retrieval", "Paragraph 3, or 3 or 4", "Paragraph 3") == pytest.approx(2 / 3)
    assert of("retrieval", "none", "Paragraph 3") == 0.0
    assert of("count", "7 of 9", "7") == 0.5
    assert of("code_similarity", "# note\nx = 1", "x = 1") == 1.0
    assert of("classification", "Food or Date", "Food", ["Food", "Date"]) == 0.5
    # a class that is part of the answer's name is not counted
    assert of("classification", "Date of birth", "Date of birth", ["Date", "x", "Date of birth"]) == 1.0
    wanted = {"answers": ["Food"], "all_classes": ["Food", "Date"]}
    score, _ = longbench.score("classification", "trec", ["\nFood\nDate"], [wanted], False)
    assert score == {"score": 100.0}  # only the first line counts
    wanted = [{"answers": ["x"], "length": 3999}, {"answers": ["x"], "length": 8000}]
    buckets, _ = longbench.score("f1", "qasper", ["x", "y"], wanted, True)
    assert buckets == {"0-4k": 100.0, "4-8k": None, "8k+": 0.0}
    with pytest.raises(ValueError, match="needs all_classes"):
        longbench.score("classification", "trec", ["x"], [{"answers": ["x"]}], False)


def test_rouge_of_longbench_is_zero_where_it_cannot_be_told():
    pytest.importorskip("rouge")
    assert longbench.rouge("", "a text", ()) == 0.0
    assert longbench.rouge("...", "a text", ()) == 0.0
    assert longbench.rouge("word " * 1200, "word " * 1200, ()) == 0.0  # deeper than Python recurses
    assert longbench.rouge("the cat sat", "the cat sat", ()) == pytest.approx(1.0)


def test_longbench_parity(reference):
    pytest.importorskip("rouge")
    content = reference("longbench")
    for case in content["cases"]:
        wanted = [{"answers": answers, "all_classes": case["all_classes"]} for answers in case["answers"]]
        score, rows = longbench.score(LONGBENCH[case["metric"]], case["dataset"], case["predictions"], wanted, False)
        assert score == {"score": case["expected"]}, case["origin"]
        assert [round(row["score"], 2) for row in rows] == case["expected_per_example"]
    by_length = content["longbench_e"]
    wanted = [{"answers": a, "length": n} for a, n in zip(by_length["answers"], by_length["lengths"], strict=True)]
    assert longbench.score("f1", "qasper", by_length["predictions"], wanted, True)[0] == by_length["expected"]


def test_labels_by_hand():
    assert labels.accuracy_f1([1, 0, 1, 1], [1, 1, 0, 1]) == {"accuracy": 0.5, "f1": pytest.approx(2 / 3)}
    assert labels.accuracy_f1([0, 0], [1, 1])["f1"] == 0.0
    found = labels.correlation([1, 2, 3], [2, 4, 60])
    assert found["spearmanr"] == 1.0 and found["pearson"] < 1
    assert math.isnan(labels.correlation([1, 1], [1, 2])["pearson"])
    assert labels.relatedness([1, 2, 4], [1, 2, 3])["mse"] == pytest.approx(1 / 3)
    found = labels.paraphrase([0.9, 0.8, 0.3, 0.1], [1, 0, 1, 0])
    assert found["accuracy"] == 0.5 and found["average_precision"] == pytest.approx((1 + 2 / 3) / 2)


def test_matthews_by_hand():
    """2 x 2 counts 3, 1, 1, 2: (3 * 2 - 1 * 1) / sqrt(4 * 4 * 3 * 3)."""
    found = labels.matthews([1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 1, 0, 0])
    assert found["matthews_correlation"] == pytest.approx(5 / 12)
    assert labels.matthews([1, 1], [1, 0])["matthews_correlation"] == 0.0


def test_sentences_are_split_as_the_evaluator_does():
    """Its NLTK did not take a curly quote for a closing one."""
    split = scrolls.sentence_splitter()
    if split is None:
        pytest.skip("NLTK has no punkt_tab here")
    assert len(split("He said, \u201cWe are sorry.\u201d Then he left.")) == 1
    assert len(split('He said, "We are sorry." Then he left.')) == 2


def test_labels_parity(reference):
    """To the rounding of a float64, which the sums of a correlation take differently on other processors."""
    metrics = {"mrpc,qqp": labels.accuracy_f1, "stsb": labels.correlation}
    for case in reference("glue")["cases"]:
        assert metrics.get(case["task"], labels.accuracy)(case["predictions"], case["labels"]) == same(case["expected"])
    content = reference("paws_sick")
    found = labels.paraphrase(content["paws"]["scores"], content["paws"]["labels"])
    assert list(found.values()) == same(list(content["paws"]["expected"].values()))
    sick = content["sick"]
    assert labels.relatedness(**of_case(sick["relatedness"])) == same(sick["relatedness"]["expected"])
    assert labels.accuracy(**of_case(sick["entailment"])) == sick["entailment"]["expected"]


def same(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-15, abs=0)


def of_case(case: dict) -> dict:
    return {"predictions": case["predictions"], "labels": case["labels"]}


def test_ranking():
    score, rows = ranking.ranking([["a", "b"], ["b", "a"], ["c"]], [["a"], ["a"], ["a"]])
    assert [row["recall@1"] for row in rows] == [1.0, 0.0, 0.0]
    assert rows[1]["ndcg@10"] == pytest.approx(1 / math.log2(3))
    assert score["mrr@10"] == pytest.approx(0.5)
    both, _ = ranking.ranking([["a", "b", "c"]], [["a", "c"]])
    assert both["ndcg@10"] == pytest.approx((1 + 0.5) / (1 + 1 / math.log2(3)))
