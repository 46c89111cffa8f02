"""Every family of tasks from end to end on a tiny model, what stands beside a score, and bad input in one line."""

import argparse
import gzip
import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from conceptron.bench import evaluate
from conceptron.bench.downstream import figures
from conceptron.bench.downstream.answers import extract, head, labels, write
from conceptron.bench.downstream.readers import Ablated, open_reader
from conceptron.engine.data import tokenizer
from conceptron.engine.errors import InputError
from conceptron.engine.labelled.examples import examples, merged
from conceptron.engine.labelled.task import expand, load_task
from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.masked_lm import ConceptForMaskedLM

pytest.importorskip("sklearn")
pytest.importorskip("rouge_score")
pytest.importorskip("bm25s")
SHAPE = dict(hidden_size=32, num_concepts=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
COLOURS, THINGS = ("red", "blue", "green"), ("door", "boat", "hat", "lamp", "roof", "cart")


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny encoder that has learned nothing, and data of one task of every kind."""
    folder = tmp_path_factory.mktemp("evaluate")
    made: dict[str, list[dict]] = {"contract_nli": [], "quality": [], "qmsum": [], "qasper": [], "stsb": []}
    for i in range(10):
        colours = {thing: COLOURS[(i + j) % 3] for j, thing in enumerate(THINGS)}
        text = f"Note {i}. " + " ".join(f"The {thing} is {colour}, as all know." for thing, colour in colours.items())
        for j, (thing, colour) in enumerate(colours.items()):
            asked, name = COLOURS[(i + j * 2) % 3], f"{i}-{thing}"
            listed = "".join(f" ({letter}) {each}\n" for letter, each in zip("ABC", COLOURS, strict=True))
            made["contract_nli"].append({"id": name, "input": f"The {thing} is {asked}.\n\n{text}",
                                         "output": "Entailment" if asked == colour else "Contradiction"})  # fmt: skip
            which = f"Which is the {thing}?\n\n{listed}\n{text}"
            made["quality"].append({"id": name, "input": which, "output": colour})
            made["qmsum"].append({"id": name, "input": f"What of the {thing}?\n\n{text}", "output": f"It is {colour}."})
            made["qasper"].append({"id": name, "input": f"What of the {thing}?\n\n{text}", "output": colour})
            made["stsb"].append({"sentence1": f"The {thing} is {asked}", "sentence2": f"A {colour} {thing}",
                                 "label": 4.0 if asked == colour else 1.0})  # fmt: skip
    for task in ("contract_nli", "quality", "qasper"):
        (folder / "scrolls" / task).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            (folder / "scrolls" / task / f"{split}.jsonl").write_text(lines(made[task]))
    (folder / "glue" / "stsb").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        (folder / "glue" / "stsb" / f"{split}.jsonl").write_text(lines(made["stsb"]))
    with zipfile.ZipFile(folder / "qmsum.zip", "w") as archive:  # as the hub has it
        for split in ("train", "validation", "test"):
            archive.writestr(f"qmsum/{split}.jsonl", lines(made["qmsum"]))
    (folder / "longbench_mini").mkdir()
    rows = [{"_id": str(i), "input": "Which is it?", "context": row["input"], "answers": [row["output"]],
             "length": 40, "all_classes": None} for i, row in enumerate(made["qasper"][:8])]  # fmt: skip
    (folder / "longbench_mini" / "hotpotqa.jsonl.gz").write_bytes(gzip.compress(lines(rows).encode()))
    words = tokenizer.train([row["input"] for rows in made.values() for row in rows if "input" in row], 320)
    torch.manual_seed(0)
    config = ConceptConfig(vocab_size=len(words), mask_token_id=words.mask_token_id, **SHAPE)
    ConceptEncoder(config).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    writer = ConceptConfig(vocab_size=len(words), mask_token_id=words.mask_token_id, num_decoder_layers=1, **SHAPE)
    ConceptForMaskedLM(writer).save_pretrained(folder / "writer")
    words.save_pretrained(folder / "writer")
    peer = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(peer).save_pretrained(folder / "peer")
    words.save_pretrained(folder / "peer")
    return folder


def recipe_of(folder, name, steps, **fields):
    """The file of a fine-tuning run of so few steps, in which these fields are others."""
    content = {
        "source": "x", "task": {"name": "x"}, "batch": {"tokens": 400, "micro_tokens": 400},
        "train": {"steps": steps, "precision": "fp32"}, "eval": {"every": 0}, "checkpoint": {"every": 0},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content | fields))
    return path


def run(
    folder, task, *settings, out="out", model="model", limit=None, no_floors=False, data=True, protocol=None,
    costs=False,
):  # fmt: skip
    """The rows that these tasks have in the table, by their names, and the folder of the results."""
    places = [f"cache={folder}/cache", *([f"data={folder}"] if data else [])]
    options = argparse.Namespace(
        task=task, model=str(folder / model), settings=[*places, *settings], limit=limit, no_floors=no_floors,
        out=folder / out, protocol=protocol, costs=costs,
    )  # fmt: skip
    assert evaluate.main(options) == 0
    rows = json.loads((folder / out / "downstream.json").read_text())["rows"]
    return {row["row"]: row for row in rows if row["task"] in expand(task)}, folder / out


def test_one_table_of_several_evaluations(folder, tmp_path, monkeypatch):
    def table(*tasks, model="model"):
        for task in tasks:
            monkeypatch.setattr("sys.argv", ["conceptron", "evaluate", "--task", task])
            run(folder, task, out=tmp_path, limit=4, no_floors=True, model=model)
        content = json.loads((tmp_path / "downstream.json").read_text())
        return [row["task"] for row in content["rows"] if row["row"] == "concepts"], content["environment"]

    tasks, environment = table("scrolls/quality", "scrolls/qasper")
    assert tasks == ["scrolls/quality", "scrolls/qasper"]
    assert environment["earlier commands"] == ["conceptron evaluate --task scrolls/quality"]
    tasks, _ = table("scrolls/quality")
    assert tasks == ["scrolls/qasper", "scrolls/quality"]
    assert table("scrolls/quality", model="writer")[0] == ["scrolls/quality"]  # other weights: a table of their own


def test_labels_on_frozen_vectors(folder):
    rows, out = run(folder, "scrolls/contract_nli", "report=validation", "seeds=2")
    assert set(rows) >= {"concepts", "majority", "bag of embeddings", "untrained encoder", "concepts zeroed",
                         "concepts shuffled", "LED-base, 16K (quoted)"}  # fmt: skip
    mine = rows["concepts"]
    assert mine["low"] <= mine["score"] <= mine["high"] and mine["spread over seeds"] >= 0
    assert mine["beside it"].startswith("reported on validation; ")
    difference = mine["score"] - rows["majority"]["score"]
    assert f"{difference:+.2f} (" in mine["beside it"] and "over majority" in mine["beside it"]
    assert mine["tokens seen"] == mine["tokens given"] > 0 and mine["documents"] == 10
    predictions = json.loads((out / "scrolls/contract_nli/predictions.json").read_text())
    assert len(predictions) == 60 and set(predictions.values()) <= {"Entailment", "Contradiction", "Not mentioned"}
    assert (out / "scrolls_predictions.csv").read_text().startswith("Task,ID,Prediction\ncontract_nli,0-door,")
    assert (out / "downstream.svg").stat().st_size > 1000
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 1 and "LED-base, 16K (quoted)" in page and "src=" not in page
    assert "## scrolls/contract_nli, scrolls_score" in (out / "report.md").read_text()


def test_similarity_and_values(folder):
    rows, out = run(folder, "similarity/stsb,glue/stsb", out="pairs")
    assert {"concepts, centred", "concepts, whitened", "majority"} <= set(rows)
    every = json.loads((out / "downstream.json").read_text())["rows"]
    assert rows["all-MiniLM-L6-v2 (quoted)"]["metric"] == "spearmanr"  # which has no place on a line of Pearson's
    assert figures.metrics_of(every) == {"similarity/stsb": "pearson", "glue/stsb": "pearson"}
    assert rows["concepts zeroed"]["task"] == "glue/stsb"
    of_task = json.loads((out / "similarity/stsb/metrics.json").read_text())["rows"]
    zeroed = next(row for row in of_task if row["row"] == "concepts zeroed")
    assert zeroed["score"] is None and "all answers alike" in zeroed["beside it"]


def test_retrieval_out_of_a_zip(folder, caplog):
    rows, _ = run(folder, "retrieval/qmsum", out="retrieval")
    assert rows["concepts"]["metric"] == "ndcg@10" and rows["concepts"]["documents"] == 10
    assert rows["concepts"]["examples"] == 120  # of two splits
    asked = examples(load_task("retrieval/qmsum"), "validation", folder)[0].question
    assert asked.startswith("It is ")  # the summary, as LongEmbed has it
    assert {"BM25", "concepts, one vector", "concepts, with BM25"} <= set(rows)
    assert not [record for record in caplog.records if record.name == "bm25s"]


def test_choice_spans_and_summaries(folder):
    rows, out = run(folder, "scrolls/quality,scrolls/qasper,scrolls/qmsum,longbench/hotpotqa", out="texts", limit=4)
    assert {"first option", "BM25", "first words"} <= set(rows)
    answers = json.loads((out / "scrolls/qasper/predictions.json").read_text())
    text = json.loads((folder / "scrolls/qasper/validation.jsonl").read_text().splitlines()[0])["input"]
    assert all(isinstance(each, str) for each in answers.values()) and answers["0-door"] in text
    summary = json.loads((out / "scrolls/qmsum/predictions.json").read_text())["0-door"]
    assert 0 < len(summary.split()) <= load_task("scrolls/qmsum").words
    written = [json.loads(line) for line in (out / "pred/model/hotpotqa.jsonl").read_text().splitlines()]
    assert set(written[0]) == {"pred", "answers", "all_classes", "length"} and len(written) == 4


def test_a_decoder_writes_answers_from_what_was_read(folder):
    """Nothing was learned, so what is written says nothing; but it is another text for another document, has the length
    that the task asks for, and the middle of what is longer than a piece is left out."""
    task, settings = "scrolls/qasper", ("answer=written", "piece=8")
    rows, _ = run(folder, task, *settings, out="written", model="writer", limit=3)
    assert {"concepts", "BM25", "concepts zeroed", "concepts shuffled"} <= set(rows)
    assert 0 < rows["concepts"]["tokens seen"] <= 8 * 18 < rows["concepts"]["tokens given"]
    reader, _ = open_reader(str(folder / "writer"), None, str(folder / "cache"))
    given = examples(load_task(task), "validation", folder, 3)
    made = write.predict(load_task(task), given, reader)
    again = write.predict(load_task(task), given, reader)
    shuffled = write.predict(load_task(task), given, Ablated(reader, "shuffled"))
    nothing = write.predict(load_task(task), given, Ablated(reader, "zeroed"))
    assert made == again and set(made) == {each.id for each in given}
    assert made != shuffled and len(set(nothing.values())) <= len(set(made.values()))


def test_the_protocol_of_the_seeds(folder):
    rows, out = run(folder, "glue/stsb", out="seeds", protocol="seeds", no_floors=True, limit=48)
    (run_folder,) = (out / "glue/stsb/runs").iterdir()
    assert run_folder.name == "lr1e-05-seed0" and rows["concepts"]["learning rate"] == 1e-5
    entries = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert len([entry for entry in entries if entry["kind"] == "train"]) == 10  # 20 epochs of 48 pairs, 96 a step
    stamp = json.loads((out / "glue/stsb/metrics.json").read_text())
    assert len(stamp["rows"]) > 1 and rows["concepts"]["examples"] == 48
    references = json.loads((out / "glue/stsb/references.json").read_text())
    assert len(references) == 48
    for task, setting, says in (("glue/qqp", (), "glue/qqp: expected one of glue/mrpc"),
                                ("glue/stsb", ("rates=1",), "rates=1: --protocol seeds has rates=1e-05")):  # fmt: skip
        with pytest.raises(InputError, match=says):
            run(folder, task, *setting, out="seeds", protocol="seeds")
    rows, out = run(folder, "glue/stsb", out="seeds-peer", protocol="seeds", no_floors=True, limit=48, model="peer")
    entries = (out / "glue/stsb/runs/lr1e-05-seed0/metrics.jsonl").read_text().splitlines()
    assert len([entry for entry in entries if json.loads(entry)["kind"] == "train"]) == 10
    assert rows["encoder"]["learning rate"] == 1e-5


def test_what_a_document_costs(folder):
    _, out = run(folder, "scrolls/quality", out="costs", no_floors=True, limit=2, costs=True)
    (row,) = json.loads((out / "costs.json").read_text())["rows"]
    assert 20 < row["tokens"] < 200 and row["task"] == "scrolls/quality"
    assert all(row[f"seconds{name}"] > 0 and row[f"MiB{name}"] >= 0 for name in ("", ", full attention"))
    assert "What reading a document costs" in (out / "report.html").read_text()
    assert "| scrolls/quality |" in (out / "report.md").read_text()


def test_answers_of_yes_no_and_nothing(folder):
    """The question is asked of notes in which nothing is near to it as long as NEAR is above every cosine."""
    assert extract.answer_in("Is the door red?", "The door is red.", 3) == "Yes"
    assert extract.answer_in("Is the door red?", "The door isn't red.", 3) == "No"
    assert extract.answer_in("Is it not red?", "The door is not red.", 3) == "Yes"
    assert extract.answer_in("Which colour is it?", "It is not red.", 1) == "red."
    task, (reader, _) = load_task("scrolls/qasper"), open_reader(str(folder / "model"), None, str(folder / "cache"))
    given = examples(task, "validation", folder, 2)
    found = extract.spans(task, given, reader, reader)
    near = extract.NEAR
    try:
        extract.NEAR = 2.0
        nothing = extract.spans(task, given, reader, reader)
    finally:
        extract.NEAR = near
    assert set(nothing.values()) == {"Unanswerable"} and set(found.values()) != {"Unanswerable"}


def test_the_rest_of_glue_is_asked_for_by_name():
    assert len(expand("glue")) == 5 and expand("glue/cola,glue/rte") == ["glue/cola", "glue/rte"]


def test_synthetic_tasks_by_length_and_depth(folder):
    rows, out = run(folder, "synthetic/duplicate", out="synthetic", limit=1, data=False)
    places = json.loads((out / "places.json").read_text())["rows"]
    assert [row["length"] for row in places] == [256, 1024, 4096, 16384]
    assert rows["concepts"]["examples"] == 4 and (out / "places.png").stat().st_size > 1000
    made = examples(load_task("synthetic/needle"), "test", None, 5)
    assert all("secret number" in each.document[slice(*each.spans[0])] for each in made)
    assert {each.about["depth"] for each in made} == {"10%", "30%", "50%", "70%", "90%"}
    assert made[0] == examples(load_task("synthetic/needle"), "test", None, 5)[0]
    for each in examples(load_task("synthetic/counting"), "test", None, 6):
        assert each.document.count(f"{each.question} is") == each.truth
    for each in examples(load_task("synthetic/duplicate"), "test", None, 3):
        (a, b), (c, d) = each.spans
        assert each.document[a:b] == each.document[c:d] and b < c


def test_listops_are_right():
    def value(words: list[str]) -> int:
        word = words.pop(0)
        if not word.startswith("["):
            return int(word)
        values = []
        while words[0] != "]":
            values.append(value(words))
        words.pop(0)
        values.sort()
        return {"[MAX": values[-1], "[MIN": values[0], "[MED": values[len(values) // 2], "[SM": sum(values) % 10}[word]

    for each in examples(load_task("synthetic/listops"), "test", None, 4):
        assert value(each.document.split()) == each.truth


def test_a_peer_reads_as_far_as_it_can(folder):
    rows, _ = run(folder, "retrieval/qmsum", out="peer", model="peer", no_floors=True)
    assert 0 < rows["encoder"]["tokens seen"] < rows["encoder"]["tokens given"]


def test_pieces_have_concepts_of_their_own(folder):
    rows, _ = run(folder, "scrolls/quality", "piece=16", out="pieces", no_floors=True)
    assert rows["concepts"]["tokens seen"] == rows["concepts"]["tokens given"]


def test_a_killed_run_gives_the_same_scores(folder):
    """What was read is kept, one file a document; the rest is read, and nothing else depends on it."""
    first, out = run(folder, "scrolls/contract_nli", "report=validation", out="again", no_floors=True)
    files = sorted((folder / "cache").rglob("*.npz"))
    for path in files[::2]:
        path.unlink()
    (out / "downstream.json").unlink()
    second, _ = run(folder, "scrolls/contract_nli", "report=validation", out="again", no_floors=True)
    assert second["concepts"]["score"] == first["concepts"]["score"]
    assert second["concepts"]["low"] == first["concepts"]["low"]


def test_fine_tuned_over_a_grid(folder):
    recipe = recipe_of(folder, "grid", steps=3)
    settings = ("report=validation", "train=train,test", f"finetune={recipe}", "rates=1e-3,1e-2", "seeds=2")
    rows, out = run(folder, "scrolls/contract_nli", *settings, out="tuned")
    assert rows["concepts"]["learning rate"] in (1e-3, 1e-2) and rows["concepts"]["spread over seeds"] is not None
    assert {path.name for path in (out / "scrolls/contract_nli/runs").iterdir()} == {
        "lr0.001-seed0", "lr0.001-seed1", "lr0.01-seed0", "lr0.01-seed1"}  # fmt: skip
    assert {"concepts zeroed", "concepts shuffled"} <= set(rows)
    learned = yaml.safe_load((out / "scrolls/contract_nli/runs/lr0.01-seed1/recipe.yaml").read_text())["task"]
    assert learned["train"] == ["train", "test"]  # as the row says
    assert "learned from train and test" in rows["concepts"]["beside it"]


def test_other_models_stand_in_the_same_table(folder):
    """Of the tasks that both answered; under the name of the model, or of the run that a model is of."""
    run(folder, "scrolls/qasper,scrolls/quality", out="other/a", limit=2, no_floors=True, model="peer")
    (folder / "tuned-run").mkdir()
    shutil.copytree(folder / "peer", folder / "tuned-run" / "model")
    run(folder, "scrolls/qasper", out="other/b", limit=2, no_floors=True, model="tuned-run/model")
    places = f"beside={folder / 'other/a'},{folder / 'other/b'}"
    rows, out = run(folder, "scrolls/qasper", places, out="both", limit=2, no_floors=True)
    of_peer = json.loads((folder / "other/a/downstream.json").read_text())["rows"][0]
    assert rows["peer (beside)"] == {**of_peer, "row": "peer (beside)"} and of_peer["row"] == "encoder"
    assert rows["tuned-run (beside)"]["score"] == of_peer["score"]
    assert {row["task"] for row in rows.values()} == {"scrolls/qasper"}
    assert "peer (beside)" in (out / "report.html").read_text()
    with pytest.raises(InputError, match="beside=nowhere: expected a folder that conceptron evaluate wrote"):
        run(folder, "scrolls/qasper", "beside=nowhere", out="both")


@pytest.fixture(scope="module")
def tuned_peer(folder):
    """The rows, the results and the best run of a peer fine-tuned on ContractNLI over a grid."""
    recipe = recipe_of(folder, "peer", steps=6, task={"name": "x", "states_gb": 1}, model={"dropout": 0.1})
    settings = ("report=validation", f"finetune={recipe}", "rates=1e-3,1e-2", "seeds=2")
    rows, out = run(folder, "scrolls/contract_nli", *settings, out="tuned-peer", model="peer")
    rate = rows["encoder"]["learning rate"]
    return rows, out, out / f"scrolls/contract_nli/runs/lr{rate:g}-seed0/model"


def test_a_peer_is_fine_tuned_over_the_same_grid(folder, tuned_peer):
    """Its head answers, from what it reads: question and document together, cut at its limit."""
    rows, out, best = tuned_peer
    assert {"encoder", "majority", "LED-base, 16K (quoted)"} <= set(rows)
    assert rows["encoder"]["spread over seeds"] is not None and len(list(best.parents[1].iterdir())) == 4
    task, words = load_task("scrolls/contract_nli"), AutoTokenizer.from_pretrained(best)
    model, given = AutoModelForSequenceClassification.from_pretrained(best).eval(), {}
    seen: dict[str, int] = {}
    for each in examples(task, "validation", folder):
        question = words(each.question, add_special_tokens=False).input_ids
        document = words(each.document, add_special_tokens=False).input_ids
        kept = document[: 32 - len(question)]
        seen[each.document] = min(len(kept), seen.get(each.document, len(kept)))
        logits = model(torch.tensor([question + kept])).logits
        given[each.id] = task.labels[int(logits.argmax())]
    assert json.loads((out / task.name / "predictions.json").read_text()) == given
    assert rows["encoder"]["tokens seen"] == sum(seen.values()) < rows["encoder"]["tokens given"] == sum(
        len(words(text, add_special_tokens=False).input_ids) for text in seen)  # fmt: skip


def test_a_fine_tuned_peer_is_itself_again_and_another_task_as_before(folder, tuned_peer):
    rows, _, best = tuned_peer
    again, _ = run(folder, "scrolls/contract_nli", "report=validation", out="tuned-peer-2", model=best)
    assert again["encoder"]["score"] == rows["encoder"]["score"]
    reader, _ = open_reader(str(best), None, str(folder / "cache"))
    assert head.has_head(reader, load_task("scrolls/contract_nli"))
    assert not head.has_head(reader, load_task("scrolls/quality"))
    other, _ = run(folder, "scrolls/quality", out="tuned-peer-2", model=best)
    assert other["encoder"]["tokens seen"] < other["encoder"]["tokens given"]


def test_a_peer_chooses_options_and_gives_values(folder):
    recipe = recipe_of(folder, "peer-two", steps=4, optim={"lr": 1e-3})
    settings = (f"finetune={recipe}", "rates=1e-3", "seeds=1")
    rows, out = run(folder, "scrolls/quality", *settings, out="peer-choice", model="peer")
    assert rows["encoder"]["examples"] == 60 and "first option" in rows
    assert set(json.loads((out / "scrolls/quality/predictions.json").read_text()).values()) <= set(COLOURS)
    rows, out = run(folder, "glue/stsb", *settings, out="peer-values", model="peer")
    found = list(json.loads((out / "glue/stsb/predictions.json").read_text()).values())
    assert 1.5 < np.mean(found) < 2.5 and rows["encoder"]["metric"] == "pearson"  # the mean is 2


@pytest.mark.parametrize("fault", ["head", "labels"])
def test_a_peer_whose_note_lies_is_one_line(folder, tuned_peer, fault, tmp_path):
    shutil.copytree(tuned_peer[2], tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    if fault == "head":  # which were drawn, if nobody looked
        tensors = load_file(tmp_path / "model/model.safetensors")
        del tensors["classifier.weight"]
        save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
        says = "1 weights of its head are missing, classifier.weight among them"
    else:
        config["conceptron_task"]["name"] = "glue/stsb"
        says = "has learned glue/stsb: expected a head of 1 outputs, got 3"
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    task = "scrolls/contract_nli" if fault == "head" else "glue/stsb"
    with pytest.raises(InputError) as caught:
        run(folder, task, out="refused", model=tmp_path / "model")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_fine_tuning_that_was_killed_gives_the_same_scores(folder):
    """After the second of three runs had saved its third step of six; the third had not begun."""
    checkpoint = {"every": 3, "keep_last": 2}
    recipe = recipe_of(folder, "killed", steps=6, model={"dropout": 0.1}, checkpoint=checkpoint)
    settings = ("report=validation", f"finetune={recipe}", "rates=1e-2", "seeds=3")
    whole, out = run(folder, "scrolls/contract_nli", *settings, out="whole", no_floors=True)
    runs = out / "scrolls/contract_nli/runs"
    predictions = (out / "scrolls/contract_nli/predictions.json").read_text()
    shutil.rmtree(runs / "lr0.01-seed2")
    shutil.rmtree(runs / "lr0.01-seed1/model")
    shutil.rmtree(sorted((runs / "lr0.01-seed1/checkpoints").iterdir())[-1])
    for path in (out / "downstream.json", out / "scrolls/contract_nli/predictions.json"):
        path.unlink()
    again, _ = run(folder, "scrolls/contract_nli", *settings, out="whole", no_floors=True)
    keys = ("score", "low", "high", "spread over seeds", "learning rate")
    assert [again["concepts"][key] for key in keys] == [whole["concepts"][key] for key in keys]
    assert (out / "scrolls/contract_nli/predictions.json").read_text() == predictions


@pytest.mark.parametrize(
    ("task", "settings", "model", "says"),
    [
        ("scrolls/qasper", ("answer=written",), "model", "wants text to be written, and the model has no decoder"),
        ("scrolls/qasper", ("answer=written",), "peer", "wants text to be written, and the model has no decoder"),
        ("scrolls/quality", ("answer=written",), "writer", "is answered by one of its own choice; leave it out"),
        ("scrolls/qasper", ("without=bm25",), "model", "without=bm25: expected of bag, untrained"),
        ("scrolls/qasper", ("answer=chosen",), "model", "answer=chosen: expected written, or nothing"),
        ("scrolls/gov_report", (), "model", "has no split 'validation' there; expected"),
        ("scrolls/contract_nli", ("report=dev",), "model", "has no split 'dev' there"),
        ("scrolls/contract_nli", ("train=test",), "model", "expected splits that are not reported"),
        ("longbench/lcc", (), "model", "wants text to be written"),
        ("scrolls/contract_nli", ("datas=x",), "model", "'datas=x': expected data=a folder"),
        ("scrolls/contract_nli", ("seeds=0",), "model", "seeds=0: expected a whole number, at least 1"),
        ("scrolls/contract_nli", ("data=/nowhere",), "model", "data=/nowhere: no such folder"),
        ("scrolls/contract_nli", ("finetune=x.yaml", "rates=fast"), "model", "rates=fast: expected learning rates"),
        ("scrolls/contract_nli", (), "nothing", "--model"),
        ("scrolls/contract_nli", (), "glue", "there is no config.json"),
        ("scrols", (), "model", "expected one of"),
    ],
)
def test_bad_input_is_one_line(folder, task, settings, model, says):
    with pytest.raises(InputError) as caught:
        run(folder, task, *settings, out="refused", model=model)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"id": 1}\n{"id"', "line 2 is not JSON"), ("", "has no rows"), ("[1]\n", "expected an object, got list"),
        ('{"id": "1", "input": "a"}\n', "no column 'output'"),
        ('{"id": "1", "input": "a\\n\\nb", "output": "Maybe"}\n', "unknown label 'Maybe' of '1'"),
        ('{"id": "1", "input": "a\\n\\nb", "output": null}\n', "the labels of split 'train' are hidden"),
    ],
)  # fmt: skip
def test_broken_data_are_one_line(tmp_path, content, says):
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(InputError) as caught:
        examples(load_task("scrolls/contract_nli"), "train", tmp_path)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(InputError, match="broken, or not what its name says"):
        examples(load_task("scrolls/contract_nli"), "train", tmp_path)


def test_rows_of_one_id_are_merged(reference):
    case = reference("scrolls_benchmark")["merge_duplicates"]
    assert merged(case["rows"]) == case["expected"]


def test_majority_is_that_of_the_question(folder):
    task = load_task("scrolls/contract_nli")
    train = examples(task, "train", folder)
    answers = labels.majority(task, train, train)
    right = [answers[each.id] == each.reference[0] for each in train]
    assert np.mean(right) >= max(np.mean([each.truth == i for each in train]) for i in range(3))
