"""Distillation from a fabricated sentence encoder: vectors, their store, the run, what the model says of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from conceptron.bench.analysis.findings import objective_name
from conceptron.bench.analysis.subject import open_subject
from conceptron.engine.data import lessons as stored
from conceptron.engine.data import tokenizer
from conceptron.engine.data.lessons import Lessons
from conceptron.engine.data.teacher import Teacher
from conceptron.engine.errors import InputError
from conceptron.engine.trainer import train
from conceptron.models.objectives.distill import stretch_bounds

from ..running import history, lines, stop_after


@pytest.fixture(scope="session")
def wide(save_teacher, tmp_path_factory) -> Path:
    """As wide as the student."""
    return save_teacher(tmp_path_factory.mktemp("teacher") / "wide", 30)


@pytest.fixture(scope="session")
def narrow(save_teacher, tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "narrow", 16)


ALONE = ["objective={name: none}", "model.dropout=0", "eval.every=0", "checkpoint.every=0", "train.label_smoothing=0"]


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token"])
def test_vectors_are_those_of_the_encoder_by_itself(save_teacher, tmp_path, pooling):
    folder = save_teacher(tmp_path / "t", 16, pooling)
    teacher, texts = Teacher(str(folder)), ["the encoder reads", "a token", "concept of the decoder again again"]
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        for one, vector in zip(texts, teacher.embed(texts), strict=True):
            states = model(**teacher.tokenizer(one, return_tensors="pt", return_token_type_ids=False))[0][0]
            pooled = states.mean(0) if pooling == "mean_tokens" else states[0]
            torch.testing.assert_close(torch.from_numpy(vector), pooled / pooled.norm(), atol=1e-5, rtol=0)
    assert np.allclose(teacher.embed([""]), 0)


def test_a_teacher_with_the_tokenizer_of_another_model_is_refused(save_teacher, tmp_path):
    folder = save_teacher(tmp_path / "t", 16)
    words = tokenizer.train(["many more words than it has ever seen " + " ".join(map(str, range(2000)))], 900)
    assert len(words) > len(Teacher(str(folder)).tokenizer)
    tokenizer.save(words, folder)
    with pytest.raises(InputError, match=r"its tokenizer is of another model: its largest id is \d+, and there are"):
        Teacher(str(folder))


def test_bfloat16_moves_a_teacher_little(save_teacher, tmp_path):
    """Only wide ones use it, on a device with units for it; this one is told to."""
    teacher, texts = Teacher(str(save_teacher(tmp_path / "t", 64))), ["the encoder reads", "a token"]
    assert not teacher.is_mixed, "narrow"
    exact = teacher.embed(texts)
    teacher.is_mixed = True
    mixed = teacher.embed(texts)
    assert np.abs(mixed - exact).max() > 0 and (mixed * exact).sum(1).min() > 0.999


def test_a_text_longer_than_the_teacher_is_the_mean_of_its_pieces(wide):
    teacher = Teacher(str(wide))
    words = teacher.tokenizer("the encoder reads a token slowly " * 12, add_special_tokens=False).input_ids
    halves = len(words) // 2
    assert len(words) > teacher.max_tokens
    text = teacher.tokenizer.decode(words)
    (vector,) = teacher.embed([text])
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    (first,) = teacher.embed([teacher.tokenizer.decode(words[:halves])])
    assert 0.3 < float(vector @ first) < 1  # pieces say nearly the same here


@pytest.mark.parametrize("modules, pooling, found", [
    ([{"type": "a.Transformer", "path": ""}, {"type": "a.Dense", "path": "2"}], "mean_tokens", "Transformer, Dense"),
    (None, "max_tokens", "expected mean or \\[CLS\\] pooling"),
])
def test_a_teacher_that_pools_otherwise_is_refused(save_teacher, tmp_path, modules, pooling, found):
    save_teacher(tmp_path / "t", 16, pooling, **({"modules": modules} if modules else {}))
    with pytest.raises(InputError, match=found):
        Teacher(str(tmp_path / "t"))


def test_stretches_are_equal_parts():
    assert stretch_bounds(10, 4) == [(0, 2), (2, 5), (5, 7), (7, 10)]
    assert stretch_bounds(2, 4) == [(0, 0), (0, 1), (1, 1), (1, 2)]


@pytest.mark.parametrize("teacher", ["wide", "narrow"])
def test_concepts_come_to_mean_what_the_teacher_says(recipe, teacher, request):
    folder = request.getfixturevalue(teacher)
    run = train(recipe, [
        *ALONE, f"distill={{teacher: {folder}, stretch: 1, stretches: 5, shortest: 2}}", "train.steps=25",
        "batch.micro_tokens=256", "optim.lr=1e-2", "eval.every=1", "optim.warmup_steps=0",
    ])  # fmt: skip
    first, *_, last = lines(run, "eval")
    assert last["alignment"] > max(first["alignment"], 0.85)
    assert last["alignment_of_stretches"] > first["alignment_of_stretches"]
    steps = lines(run, "train")
    for entry in steps:
        parts = entry["distill"]
        assert parts["loss"] == pytest.approx(parts["whole"] + 10 * parts["similarity"] + parts["stretch"], rel=1e-4)
        assert entry["loss"] == pytest.approx(parts["loss"], rel=1e-5)
    model = AutoModel.from_pretrained(run / "model")
    record = model.config.distilled_from
    assert record["teacher"] == folder.name and record["width"] == (30 if teacher == "wide" else 16)
    assert objective_name(open_subject(run)) == f"none, distilled from {folder.name}"
    names = load_file(run / "model" / "model.safetensors")
    assert not any("distillation" in name for name in names), "its maps are only for training"


def test_beside_a_task_a_contrast_and_regularisers_and_resumed_exactly(recipe, narrow, monkeypatch):
    more = [f"distill={{teacher: {narrow}, weight: 0.5}}", "contrastive={weight: 0.2}", "train.steps=6",
            "regularization={terms: [t_regs]}", "eval.every=0", "batch.micro_tokens=128"]  # fmt: skip

    straight = train(recipe, [*more, "run.name=straight"])
    for entry in history(straight):
        total = entry["task"] + 0.2 * entry["contrastive"] + 0.5 * entry["distill"]["loss"] + entry["regularization"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
    stop_after(2, monkeypatch)
    with pytest.raises(SystemExit):
        train(recipe, more)
    monkeypatch.undo()
    assert history(train(recipe, [*more, "resume=auto"])) == history(straight)
    with pytest.raises(InputError, match=r"distill\.weight = 0.5, now it is 0.7"):
        train(recipe, [*more, "resume=auto", "run.name=straight", "distill.weight=0.7"])


def test_vectors_are_computed_once(recipe, narrow, tmp_path, monkeypatch, capfd):
    calls = []
    embed = Teacher.embed
    monkeypatch.setattr(Teacher, "embed", lambda self, texts: calls.append(len(texts)) or embed(self, texts))
    own = [f"data.cache={tmp_path}/cache", *ALONE, f"distill={{teacher: {narrow}}}", "train.steps=2",
           "batch.micro_tokens=128"]  # fmt: skip
    train(recipe, [*own, "run.name=a"])
    assert calls and "MiB" in capfd.readouterr().err  # announced before it is written
    calls.clear()
    train(recipe, [*own, "run.name=b"])
    assert not calls
    train(recipe, [*own, "run.name=c", "run.seed=5"])  # other texts of the same store
    with pytest.raises(InputError, match=r"distill\.max_gib: the teacher's vectors need"):
        train(recipe, [*own, "run.name=d", "distill.max_gib=1e-7", f"data.cache={tmp_path}/other"])
    assert not (recipe.parent / "runs" / "d").exists()


def test_a_store_that_was_stopped_goes_on(text, narrow, tmp_path, monkeypatch):
    from conceptron.engine.data.corpus import open_corpus
    from conceptron.engine.recipe.data import DataRecipe
    from conceptron.models.objectives.distill import Distill

    corpus = open_corpus(DataRecipe(source=str(text), tokenizer=f"{text}/tokenizer", window=48, cache=f"{text}/cache"))
    options, teacher = Distill(teacher=str(narrow), stretch=1.0, stretches=2, shortest=4), Teacher(str(narrow))
    monkeypatch.setattr(stored, "ROWS", 8)
    rows, counts = np.arange(24), []
    embed = teacher.embed

    def failing(texts):
        counts.append(1)
        if len(counts) == 3:
            raise KeyboardInterrupt
        return embed(texts)

    monkeypatch.setattr(teacher, "embed", failing)
    given = (corpus.train, rows, teacher, corpus.tokenizer, "words", options, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stored.learn(*given)
    made = stored.learn(*given)
    assert len(counts) == 2 + 1 + 1, "two of three parts were kept"
    assert isinstance(made, Lessons) and not len(made.missing(rows))
    lesson = made.lesson(np.array([17, 3]), None)
    for place, row in enumerate((17, 3)):
        ids = corpus.train[row]
        whole = embed([corpus.tokenizer.decode(ids, skip_special_tokens=True)])[0]
        np.testing.assert_allclose(lesson.whole[place], whole, atol=2e-3)
        begin, end = stretch_bounds(len(ids), 2)[1]
        part = embed([corpus.tokenizer.decode(ids[begin:end], skip_special_tokens=True)])[0]
        np.testing.assert_allclose(lesson.stretches[place, 1], part if end - begin >= 4 else 0 * part, atol=2e-3)
    with pytest.raises(RuntimeError, match="holds no vector of window 30"):
        made.lesson(np.array([30]), None)


@pytest.mark.parametrize("kind", ["frozen", "trained"])
def test_a_student_of_bare_word_embeddings(recipe, wide, kind):
    """Sentences and windows of the same text, in every step."""
    import yaml

    path = yaml.safe_load(recipe.read_text())["data"]["source"]
    run = train(recipe, [
        *ALONE, f"distill={{teacher: {wide}}}", f"init={{source: {wide}, embeddings: {kind}}}", "train.steps=3",
        f"data.source=[{{path: {path}}}, {{path: {path}, unit: sentence, weight: 2}}]", "batch.micro_tokens=256",
    ])  # fmt: skip
    student, theirs = AutoModel.from_pretrained(run / "model"), AutoModel.from_pretrained(wide)
    rows, source = student.embed_tokens.weight, theirs.get_input_embeddings().weight
    assert torch.equal(rows, source[: len(rows)]) == (kind == "frozen")
    assert "word embeddings of" in (run / "initialization.txt").read_text()


@pytest.mark.parametrize("override, found", [
    ("init={source: NARROW, embeddings: frozen}", "its embeddings are 16 wide, the model's 30; set model.token_dim"),
    ("init={source: NARROW, embeddings: frozen, layers: 2}", "init.layers: unknown key"),
])
def test_embeddings_that_do_not_fit(recipe, narrow, override, found):
    with pytest.raises(InputError, match=found):
        train(recipe, [override.replace("NARROW", str(narrow))])


@pytest.mark.parametrize("override, found", [
    ("distill={}", "distill.teacher: expected a folder or a hub id"),
    ("distill={teacher: x, stretch: 1, stretches: 3}", "distill.stretches: expected a divisor of model.num_concepts"),
    ("distill={teacher: /no/where, similarity: 0}", "distill.teacher: /no/where: no such folder"),
    ("distill={teacher: x, temprature: 1}", "unknown key"),
])
def test_bad_input_is_one_line(recipe, override, found):
    with pytest.raises(InputError) as caught:
        train(recipe, [override])
    assert found in str(caught.value) and "\n" not in str(caught.value)
    assert not (recipe.parent / "runs").exists()
