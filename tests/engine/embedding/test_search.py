"""`conceptron search`: the index on disk, who embeds queries, and what is printed."""

import argparse
import json
import os
import shutil
import sys

import numpy as np
import pytest

from conceptron.engine.embedding import documents as reading
from conceptron.engine.embedding import search as room
from conceptron.engine.embedding.index import Index
from conceptron.engine.embedding.model import ConceptModel
from conceptron.engine.embedding.passage import Passage, passage, sentences, strip, wrapped
from conceptron.engine.errors import InputError

WORDS = ["concept", "token", "reads", "writes", "encoder", "decoder", "slowly", "again", "text"]


@pytest.fixture
def docs(tmp_path):
    """Eight documents in seven files."""
    folder, generator = tmp_path / "docs", np.random.default_rng(0)
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"{i}{i}. " + " ".join(generator.choice(WORDS, size=20 + 60 * (i == 5))))
    (folder / "rows.jsonl").write_text('{"text": "the the the", "id": "first"}\n{"text": "a of a of"}')
    return folder


def search(docs, built, index, *queries, teacher=None, top=3) -> int:
    return room.main(argparse.Namespace(
        query=list(queries), path=str(docs), model=str(built), index=index, teacher=teacher, top=top,
        text_column="text",
    ))  # fmt: skip


def texts_read(monkeypatch) -> list[str]:
    """What is embedded from now on."""
    made, read = [], ConceptModel.read
    monkeypatch.setattr(ConceptModel, "read", lambda self, texts, *more: made.extend(texts) or read(self, texts, *more))
    return made


def opened(docs, reader, folder) -> Index:
    index = Index(folder, reader)
    index.update(reading.files_of([str(docs)]))
    return index


def test_a_document_is_found_by_what_it_says(docs, reader, tmp_path):
    """Untrained, one window, one concept: the vector of the document's own text is its concept."""
    index = opened(docs, reader, tmp_path / "index")
    queries = [(docs / "3.txt").read_text(), "a of a of"]
    assert len(reader.vocabulary.encode(queries)[0]) <= 64
    (first, *others), (second, *_) = index.search(reader.embed_queries(queries), top=4)
    assert first.file.name == "3.txt" and first.score == pytest.approx(1, abs=1e-3) and len(others) == 3
    assert [hit.score for hit in others] == sorted((hit.score for hit in others), reverse=True)
    assert first.span == (0, len(queries[0]))
    assert (second.file.name, second.row, second.id) == ("rows.jsonl", 1, f"{docs}/rows.jsonl:2")
    assert index.part("part-000000").vectors.dtype == np.float16
    assert isinstance(index.part("part-000000").vectors, np.memmap)


def test_a_place_in_a_long_document_is_found(reader, tmp_path):
    text = "".join(f"{WORDS[i % 9]} {i} " for i in range(300))
    (tmp_path / "long.txt").write_text(text)
    index = opened(tmp_path / "long.txt", reader, tmp_path / "index")
    part = index.part("part-000000")
    assert len(part.vectors) == 5
    for concept in range(5):
        ((hit,),) = index.search(part.vectors[[concept]].astype(np.float32), top=1)
        assert hit.span == tuple(part.spans[concept])
    assert part.spans[0, 0] == 0 and part.spans[-1, 1] == len(text.rstrip()) + 1


def test_only_what_changed_is_read_again(docs, reader, tmp_path, monkeypatch):
    folder = tmp_path / "index"
    opened(docs, reader, folder)
    made = texts_read(monkeypatch)
    assert opened(docs, reader, folder).num_documents == 8 and made == []
    os.utime(docs / "1.txt", ns=(1, 1))
    opened(docs, reader, folder)
    assert made == [], "the same text at another time"
    (docs / "2.txt").write_text("another text of the decoder")
    (docs / "new.txt").write_text("a new one")
    (docs / "4.txt").unlink()
    index = opened(docs, reader, folder)
    assert made == ["another text of the decoder", "a new one"] and index.num_documents == 8
    ((hit, *rest),) = index.search(reader.embed_queries(["another text of the decoder"]), top=20)
    assert hit.file.name == "2.txt" and hit.score == pytest.approx(1, abs=1e-3)
    assert sorted(each.file.name for each in rest) == [
        "0.txt", "1.txt", "3.txt", "5.txt", "new.txt", "rows.jsonl", "rows.jsonl"
    ]  # fmt: skip


def test_parts_of_which_little_is_left_are_written_again(docs, reader, tmp_path):
    folder = tmp_path / "index"
    before = opened(docs, reader, folder).part("part-000000")
    for i in (0, 1, 2, 4, 5):
        (docs / f"{i}.txt").unlink()
    index = opened(docs, reader, folder)
    assert index.content["parts"] == ["part-000001"] and not (folder / "part-000000").exists()
    part = index.part("part-000001")
    assert len(part.ids) == 3 and part.ids[0] == f"{docs}/3.txt"
    np.testing.assert_array_equal(part.vectors[0], before.vectors[before.firsts[3]])


def test_an_index_that_was_stopped_goes_on(docs, reader, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "WINDOW_DOCUMENTS", 3)
    folder, write = tmp_path / "index", Index.write

    def stops(self, window, readings):
        if len(self.content["parts"]) == 2:
            raise KeyboardInterrupt
        write(self, window, readings)

    monkeypatch.setattr(Index, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        opened(docs, reader, folder)
    monkeypatch.setattr(Index, "write", write)
    made = texts_read(monkeypatch)
    index = opened(docs, reader, folder)
    assert len(made) == 2 and index.num_documents == 8
    (hits,) = index.search(reader.embed_queries(["the"]), top=20)
    assert len(hits) == 8 and len({(hit.file, hit.row) for hit in hits}) == 8


def test_an_index_of_another_model_is_one_line(docs, reader, built, tmp_path):
    folder = tmp_path / "index"
    opened(docs, reader, folder)
    other = tmp_path / "other"
    shutil.copytree(built, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"note": "another"}))
    with pytest.raises(InputError) as caught:
        Index(folder, ConceptModel.from_pretrained(other))
    assert f"{folder}: made by another model, {built.resolve()}; search with that one" in str(caught.value)
    (folder / "index.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        Index(folder, reader)
    with pytest.raises(InputError, match="not empty and no index"):
        Index(docs, reader)


def test_the_whole_command(docs, built, tmp_path, capsys):
    query = (docs / "3.txt").read_text()
    (docs / "bad.txt").write_bytes(b"\xff")
    assert search(docs, built, tmp_path / "index", query, "the the the", top=2) == 1
    said = capsys.readouterr()
    assert "bad.txt:1: byte 0xff" in said.err and "1 of 8 files could not be read" in said.err
    lines = said.out.splitlines()
    assert " ".join(said.out.split()).startswith(f"8 documents in {docs}; queries by the model's backbone {query}")
    assert "the the the" in lines and max(len(line) for line in lines if str(docs) not in line) <= room.WIDEST
    hits = [line for line in lines if line.startswith("  1  1.00  ")]
    assert f"{docs}/3.txt" in hits[0] and "rows.jsonl: first" in hits[1] and "\x1b" not in said.out
    assert said.out.count("  2  ") == 2 and " 0 %" in said.out


def test_on_a_terminal_the_best_sentence_is_bold(docs, built, tmp_path, capsys, monkeypatch):
    (docs / "9.txt").write_text("Nothing of it. The decoder writes slowly. Token again.")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    search(docs / "9.txt", built, tmp_path / "index", "The decoder writes slowly.")
    said = capsys.readouterr().out
    assert "Nothing of it. \x1b[1mThe decoder writes slowly.\x1b[0m Token again." in said
    monkeypatch.setenv("NO_COLOR", "1")
    search(docs / "9.txt", built, tmp_path / "index", "The decoder writes slowly.")
    assert "\x1b" not in capsys.readouterr().out


def test_a_teacher_embeds_the_queries(docs, built, save_teacher, tmp_path, capsys):
    fitting = save_teacher(tmp_path / "fitting", 30)
    assert search(docs, built, tmp_path / "index", "the token", teacher=str(fitting)) == 0
    assert f"queries by {fitting}" in " ".join(capsys.readouterr().out.split())
    narrow = save_teacher(tmp_path / "narrow", 16)
    with pytest.raises(InputError, match=r"--teacher: .*narrow: its vectors have 16 numbers, the model's 30"):
        search(docs, built, tmp_path / "index", "the token", teacher=str(narrow))
    with pytest.raises(InputError, match="--teacher: /no/where: no such folder"):
        search(docs, built, tmp_path / "index", "the token", teacher="/no/where")


def test_the_teacher_of_a_distilled_model_embeds_the_queries(reader, save_teacher, tmp_path, monkeypatch):
    """Where concepts are no states of the model's own backbone."""
    place = str(save_teacher(tmp_path / "teacher", 30))
    monkeypatch.setattr(reader, "has_states", False)
    assert room.who_asks(reader, None).name == "the model itself"
    record = {**room.Teacher(place).record, "teacher": place}  # which holds a name, not a place on one machine
    monkeypatch.setattr(reader.config, "distilled_from", record, raising=False)
    assert room.who_asks(reader, None).name == place
    monkeypatch.setitem(record, "fingerprint", "another")
    with pytest.raises(InputError, match="not the weights that the model was distilled from"):
        room.who_asks(reader, None)
    monkeypatch.setitem(record, "teacher", "/gone")
    with pytest.raises(InputError, match=r"/gone: no such folder.*the model was distilled from it"):
        room.who_asks(reader, None)
    monkeypatch.setitem(record, "width", 8)
    assert room.who_asks(reader, None).name == "the model itself"


@pytest.mark.parametrize("given, found", [
    (dict(query=["a", " "]), "QUERY: expected a question"),
    (dict(path="/no/where"), "/no/where: no such file or folder"),
])  # fmt: skip
def test_bad_input_is_one_line(docs, built, tmp_path, given, found):
    options = dict(query=["a"], path=str(docs), model=str(built), index=tmp_path / "index", teacher=None, top=1,
                   text_column="text")  # fmt: skip
    with pytest.raises(InputError) as caught:
        room.main(argparse.Namespace(**options | given))
    assert found in str(caught.value) and not (tmp_path / "index").exists()


def test_the_index_has_a_place_of_its_own_in_the_cache(docs, reader, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = room.default_folder(str(docs), reader)
    assert folder.parent == tmp_path / "conceptron" and folder != room.default_folder(str(docs / "1.txt"), reader)


def test_passages_by_hand():
    text = "One is here. Two is\nthere! Is three? Four ends it."
    assert sentences(text, 15, 30) == ["Two is there!", "Is three?"]
    assert sentences("no end at all", 3, 6) == ["no end at all"]
    endless = sentences("x " * 500, 500, 510)
    assert len(endless) == 1 and endless[0].startswith("... x x") and endless[0].endswith("x x ...")
    assert passage(["a", "b", "c"], np.array([0, 2, 1])) == Passage("a", "b", "c")
    long = ["x" * 300, "y" * 300, "z" * 300]
    assert passage(long, np.array([0, 0, 1])) == Passage(long[1], long[2], "")
    assert wrapped(Passage("aa bb", "cc dd", "ee"), 8, "  ", str.upper) == "  aa bb\n  CC DD\n  ee"
    assert strip(0, 10, 100, ("-", "#")) == "###" + "-" * 21 and strip(99, 100, 100, ("-", "#")) == "-" * 23 + "#"
    assert strip(50, 50, 0, ("-", "#"))[-1] == "#"
