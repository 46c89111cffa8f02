"""Sentence similarity, chapters, read-back and speed, of small models over made-up data."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conceptron.__main__ import perform
from conceptron.bench import meaning
from conceptron.bench.analysis import chapters
from conceptron.bench.analysis.embedding import ConceptEmbedder, Parts, open_embedder, span_of
from conceptron.engine.data import tokenizer
from conceptron.engine.errors import InputError
from conceptron.models.config import ConceptConfig
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.packing import pack

NOUNS = ["river", "engine", "market", "forest", "planet", "teacher", "window", "harbour"]


def sentence(generator: np.random.Generator) -> str:
    words = " ".join(generator.choice(NOUNS, size=12))
    return f"The {words} number {generator.integers(10**6)} goes on for a while."


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    pairs = [[sentence(generator) for _ in range(20)] for _ in range(2)]
    scores = generator.random(20).round(2).tolist()
    for file, a, b, score in meaning.SENTENCES.values():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({a: pairs[0], b: pairs[1], score: scores}), folder / file)
    (folder / "openstax_books").mkdir()
    texts = ["\n".join(sentence(generator) for _ in range(40)) + "\n" for _ in range(3)]
    for split, text in zip(("train", "validation", "test"), texts, strict=True):
        pq.write_table(pa.table({"text": [text]}), folder / "openstax_books" / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    texts = pq.read_table(data / "openstax_books" / "train.parquet")["text"].to_pylist()
    words = tokenizer.train(texts, 300)
    tokenizer.save(words, folder)
    config = ConceptConfig(
        vocab_size=len(words), hidden_size=32, num_concepts=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_decoder_layers=1, mask_token_id=words.mask_token_id, init_queries="segment",
    )  # fmt: skip
    config.distilled_from = {"teacher": "some/encoder"}
    ConceptForMaskedLM(config).save_pretrained(folder)
    return folder


def test_the_whole_command(model, data, tmp_path, monkeypatch, capsys):
    sizes = dict(MIN_WORDS=100, WINDOW=64, NUM_WINDOWS=6, READ_TOKENS=48, NUM_READ=4, FEWER=(4, 8), LONG=256)
    for name, value in sizes.items():
        monkeypatch.setattr(meaning, name, value)
    argv = ["bench", "meaning", str(model), "--data", str(data), "--out", str(tmp_path), "--chapters", "3"]
    assert perform([*argv, "--name", "small"]) == 0
    content = json.loads((tmp_path / "small.json").read_text())
    found = {(row["part"], row["what"]): row["value"] for row in content["rows"]}
    assert {part for part, _ in found} == set(meaning.PARTS)
    assert -1 <= found["sts", "STS-B test, Pearson"] <= 1
    assert found["chapters", "chapter, sentence kept, one vector"] >= 0
    assert found["geometry", "textbooks, concepts"] == 8 and ("geometry", "all kinds of text, concepts") not in found
    assert found["speed", "tokens per CPU second, model, float32"] > 0
    assert {what: 0 <= share <= 1 for (part, what), share in found.items() if part == "content"} == dict.fromkeys((
        "words read back", "words read back, C = 4", "from another text's concepts", "from concepts set to zero"), True)
    assert content["environment"]["distilled_from"] == {"teacher": "some/encoder"}
    assert found["chapters", "chapter, sentence removed, first 512 tokens"] >= 0
    assert "distilled from some/encoder" in (tmp_path / "small.md").read_text().splitlines()[0]
    assert "STS-B test" in capsys.readouterr().out
    assert perform([*argv, "--skip", *meaning.PARTS[1:]]) == 0


def test_what_is_there_is_kept(model, data, tmp_path, monkeypatch):
    """Results are written part by part, the chapters last; the sentences' rows are there when these fail."""
    monkeypatch.setattr(meaning, "read_chapters", lambda *given: pytest.fail("stopped"))
    with pytest.raises(pytest.fail.Exception):
        perform(["bench", "meaning", str(model), "--data", str(data), "--out", str(tmp_path), "--name", "cut"])
    rows = json.loads((tmp_path / "cut.json").read_text())["rows"]
    assert {row["part"] for row in rows} == {"sts"}


def test_as_many_chapters_as_were_asked_for(data, monkeypatch):
    monkeypatch.setattr(meaning, "MIN_WORDS", 100)
    monkeypatch.setattr(meaning, "MAX_WORDS", 300)
    texts = meaning.read_chapters(data, 3)
    assert len(texts) == 3 and all(100 <= len(text.split()) <= 320 and text.endswith("while.") for text in texts)
    assert meaning.read_chapters(data, 2) == texts[:2]
    with pytest.raises(InputError, match=r"--chapters: .* has 3 chapters of 100 words, expected 4; ask for fewer"):
        meaning.read_chapters(data, 4)
    assert meaning.beginning_of("One two. Three four five. Six", 3) == "One two. Three four five."
    assert meaning.beginning_of("One two", 2) == "One two"


def test_windows_of_every_kind_of_text(model, data, tmp_path, monkeypatch):
    """As many of each, and none where there is but one kind."""
    monkeypatch.setattr(meaning, "WINDOW", 64)
    monkeypatch.setattr(meaning, "NUM_WINDOWS", 6)
    embedder = open_embedder(str(model))
    assert meaning.mixed(embedder, data) == []
    texts = pq.read_table(data / "openstax_books" / "test.parquet")["text"].to_pylist()
    for name in ("govweb", "techdocs"):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"text": [name + text for text in texts] * 3}), tmp_path / name / "test.parquet")
    windows = meaning.mixed(embedder, tmp_path)
    assert [len(ids) for ids in windows] == [64] * 6
    assert len({tuple(ids) for ids in windows}) == 2, "the beginnings of two kinds, three texts of each"
    first = meaning.geometry(embedder, windows, "two kinds")[0]
    assert first["what"] == "two kinds, concepts" and first["count"] == 6


def test_nothing_is_left(model, data):
    with pytest.raises(InputError, match=r"--skip: expected to leave at least one part"):
        perform(["bench", "meaning", str(model), "--data", str(data), "--skip", *meaning.PARTS])


def test_data_that_is_not_there(model, tmp_path):
    with pytest.raises(InputError, match="no such file; give --data"):
        perform(["bench", "meaning", str(model), "--data", str(tmp_path)])
    with pytest.raises(InputError, match=r"there is no config\.json"):
        open_embedder(str(tmp_path))


def test_a_text_is_embedded_alike_alone_and_among_others(model):
    embedder = open_embedder(str(model))
    assert isinstance(embedder, ConceptEmbedder)
    texts = ["The river goes on.", "A much longer text about an engine and a market, and a forest as well.", "x"]
    together = embedder.embed(texts)
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(embedder.embed([text])[0], vector, atol=1e-5)
    (parts,) = embedder.parts([texts[1]])
    assert len(parts.vectors) == 8 and parts.spans[0][0] == 0 and parts.spans[-1][1] == len(texts[1])
    np.testing.assert_allclose(parts.spans[1:, 0], parts.spans[:-1, 1])  # byte-level tokens leave no gap


def test_a_model_on_a_backbone_brings_floors(model, tmp_path):
    """Its parts are states without the concepts' rows, its windows those of the module, from one pass."""
    words = tokenizer.load(str(model))
    inner = {"model_type": "bert", "vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}  # fmt: skip
    config = ConceptConfig(
        vocab_size=len(words), hidden_size=32, num_concepts=4, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_decoder_layers=1, mask_token_id=words.mask_token_id, init_queries="state",
        backbone={"config": inner, "name": "small"}, backbone_window=20,
    )  # fmt: skip
    ConceptForMaskedLM(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    embedder = open_embedder(str(tmp_path))
    text = " ".join(NOUNS * 8)
    (parts,), ids = embedder.parts([text]), embedder.vocabulary.encode([text])[0]
    states = embedder.encoder.backbone(pack([ids])).detach().numpy()
    np.testing.assert_allclose(parts.vectors.mean(0), states.mean(0), atol=1e-4)
    assert len(parts.windows.vectors) == -(-len(ids) // 20) > 1 and parts.windows.spans[-1][1] == len(text)
    first = int(np.searchsorted([span[1] for span in embedder.tokens(text)[1]], parts.windows.spans[0][1])) + 1
    np.testing.assert_allclose(parts.windows.vectors[0], states[:first].mean(0), atol=1e-4)
    assert embedder.backbone == "small"
    np.testing.assert_allclose(embedder.embed([text])[0], states.mean(0) / np.linalg.norm(states.mean(0)), atol=1e-4)


def test_questions_by_hand():
    body = "Alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi"
    text = f"Start here. {body} one. {body} two. The end."
    drawn = chapters.draw([text, "Nothing to take out."], 2)
    assert [question.text for question in drawn.questions] == [f"{body} one.", f"{body} two."]
    assert drawn.removed[0] == "Start here.   The end." and drawn.removed[1] == "Nothing to take out."
    first, second = drawn.questions
    assert text[first.kept] in body and first.removed == 12 and second.removed == 13


def test_search_by_hand():
    axes = np.eye(3, dtype=np.float32)
    spans, starts = np.array([[0, 10], [10, 20]]), np.arange(20)
    documents = [
        Parts(np.stack([axes[0], axes[1]]), spans, starts),
        Parts(np.stack([0.6 * axes[1] + 0.8 * axes[2], axes[2]]), spans, starts),
    ]
    ask = [chapters.Question("", 0, 15, 3), chapters.Question("", 1, 15, 15)]
    found = chapters.search(axes[[1, 2]], documents, ask, is_removed=False)
    assert found["chapter"][0] == 1.0 and found["place"][0] == 1.0
    found = chapters.search(axes[[1, 2]], documents, ask, is_removed=True)
    assert found["place"][0] == 0.5  # the first stood in the other part
    near = f"place within {chapters.NEAR} tokens"
    assert found[near][0] == 1.0  # 12 tokens from the middle of the part that was found
    far = [chapters.Question("", 0, 15, 15 + chapters.NEAR), chapters.Question("", 1, 15, 15 + chapters.NEAR + 1)]
    long = np.arange(300)
    assert chapters.placed([(10, 20)] * 2, [long, long], far, is_removed=True)[near][0] == 0.5
    assert chapters.placed([(10, 20)] * 2, [long[::2], long], far, is_removed=True)[near][0] == 0.5  # tokens of two
    common = chapters.centred(documents)
    np.testing.assert_allclose(common[0].vectors, -common[1].vectors, atol=1e-6)
    share, error, count = chapters.share(np.array([1, 0, 1, 1]))
    assert (share, count) == (0.75, 4) and error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


def test_spans_of_tokens():
    offsets = [(0, 3), (3, 7), (8, 9)]
    assert span_of(offsets, 0, 2) == (0, 7) and span_of(offsets, 2, 2) == (8, 8) and span_of(offsets, 3, 3) == (9, 9)
    assert span_of([], 0, 0) == (0, 0)


def test_a_folder_whose_configuration_is_none_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="expected an object with model_type, got a list"):
        open_embedder(str(tmp_path))
