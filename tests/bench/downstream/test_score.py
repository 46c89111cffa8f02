"""Predictions of anybody, scored: official keys, official refusals, one clear line for each bad input."""

import argparse
import json

import pytest

from conceptron.bench import score as command
from conceptron.bench.downstream.protocol import quoted
from conceptron.bench.downstream.scoring import score
from conceptron.engine.errors import InputError
from conceptron.engine.labelled.task import expand, known, load_task


@pytest.fixture
def run(tmp_path, capsys):
    """The JSON that the command prints."""

    def run(task: str, predictions, references) -> dict:
        for name, content in (("p", predictions), ("r", references)):
            (tmp_path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        options = argparse.Namespace(task=task, predictions=tmp_path / "p.json", references=tmp_path / "r.json")
        assert command.main(options) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_prints_the_official_keys(run):
    assert run("scrolls/qasper", {"1": "a cat"}, {"1": ["cat", "dog"]}) == {
        "num_predicted": 1, "mean_prediction_length_characters": 5.0, "f1": 100.0, "scrolls_score": 100.0,
        "display_keys": ["f1"], "display": [100.0],
    }  # fmt: skip
    assert run("scrolls/contract_nli", {"1": "entailment"}, {"1": "Entailment"})["exact_match"] == 100.0
    assert run("longbench/qasper", {"1": "x"}, {"1": ["y"]}) == {"score": 0.0}
    assert run("longbench_e/qasper", {"1": "x"}, {"1": {"answers": ["x"], "length": 5}})["0-4k"] == 100.0
    assert run("glue/stsb", {"1": 1, "2": 2.5, "3": "4"}, {"1": 0, "2": 1, "3": 5})["spearmanr"] == pytest.approx(1)
    assert run("glue/stsb", {"1": 1, "2": 1}, {"1": 0, "2": 1}) == {
        "pearson": None, "spearmanr": None, "not_finite": ["pearson", "spearmanr"],  # of predictions that are all alike
    }
    found = run("glue/mrpc", {"1": "equivalent", "2": 0}, {"1": 1, "2": 1})
    assert found == {"accuracy": 0.5, "f1": pytest.approx(2 / 3)}
    assert set(run("paws", {"1": 0.7, "2": 0.2}, {"1": 1, "2": 0})) == {"accuracy", "average_precision", "pr_auc"}
    assert set(run("sick/relatedness", {"1": 1, "2": 2}, {"1": 1, "2": 3})) == {"pearson", "spearman", "mse"}
    assert run("retrieval/qmsum", {"q": ["b", "a"]}, {"q": ["a"]})["ndcg@10"] == pytest.approx(0.6309, abs=1e-4)


def test_refuses_ids_as_the_evaluator_does(reference):
    content, task = reference("scrolls_benchmark"), load_task("scrolls/qasper")
    for case in content["verify"]:
        if not case["errors"]:
            score(task, case["predictions"], dict.fromkeys("abc", "1"))
            continue
        with pytest.raises(InputError) as caught:
            score(task, case["predictions"], dict.fromkeys("abc", "1"))
        assert case["errors"][0] in str(caught.value)


@pytest.mark.parametrize(
    ("task", "predictions", "references", "says"),
    [
        ("scrolls/qasper", {}, {"1": "x"}, "There are missing example IDs. It is empty; expected 1 predictions"),
        ("scrolls/qasper", {"1": "x"}, {"1": "x", "2": "y"}, "There are missing example IDs. 1, '2' first"),
        ("scrolls/qasper", {"1": "x", "3": ""}, {"1": "x"}, "There are redundant example IDs. 1, '3' first"),
        ("scrolls/qasper", {"1": 5}, {"1": "x"}, "All values of the predictions dictionary must be strings"),
        ("scrolls/qasper", "[", {"1": "x"}, "p.json: expected JSON"),
        ("scrolls/qasper", {"1": "x"}, [], "r.json: expected a JSON object with references by id"),
        ("glue/mrpc", {"1": "same"}, {"1": 1}, "'1': unknown label 'same'; expected not_equivalent, equivalent or"),
        ("glue/mrpc", {"1": 2}, {"1": 1}, "unknown label 2"),
        ("glue/stsb", {"1": "high"}, {"1": 1}, "'1': expected a number, got 'high'"),
        ("retrieval/qmsum", {"1": "a"}, {"1": "a"}, "expected a list of documents"),
        ("glue/mrcp", {"1": 1}, {"1": 1}, "did you mean glue/mrpc?"),
        ("glue", {"1": 1}, {"1": 1}, "expected one task, that is a folder of 5"),
        ("scrolls", {"qmsum": {"1": "x"}}, {"qmsum": {"1": "x"}}, "the benchmark's score is of seven tasks"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(run, task, predictions, references, says):
    pytest.importorskip("rouge_score")
    with pytest.raises(InputError) as caught:
        run(task, predictions, references)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_benchmark_of_seven(run):
    pytest.importorskip("rouge_score")
    labels = {"contract_nli": "Entailment"}
    names = [name.removeprefix("scrolls/") for name in expand("scrolls")]
    same = {name: {"1": labels.get(name, "x y")} for name in names}
    found = run("scrolls", same, same)
    assert len(names) == 7 and found["scrolls_score"] == pytest.approx(100.0)


def test_every_task_is_well_formed():
    for name in known():
        task = load_task(name)
        assert task.about.endswith(".") and task.licence
        assert task.form == "synthetic" or (task.source.hub and task.source.local)
        assert task.answer not in ("span", "summary") or task.words > 0
        assert bool(task.published) is bool(task.published_by)
        for label, figures in task.published.items():
            assert quoted(task, label, figures)["score"] > 1  # percent
        assert task.answer not in ("labels", "values") or task.splits.train or task.family.startswith("longbench")
