"""`conceptron embed`: columns, parts, what is stopped and goes on, ranks, files that cannot be read."""

import argparse
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conceptron.engine.embedding import documents as reading
from conceptron.engine.embedding import embed as room
from conceptron.engine.embedding.model import ConceptModel
from conceptron.engine.errors import InputError


@pytest.fixture
def files(tmp_path):
    """Seven documents in four files, and nothing else."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("the concept reads the token\nagain")
    rows = [{"id": "one", "text": "a text of the encoder"}, {"text": "slowly", "id": 7}, {"text": "of the decoder"}]
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"text": " "}, {"text": "the last"}])))
    pq.write_table(pa.table({"text": ["writes a token", "writes again"], "id": ["p", None]}), folder / "c.parquet")
    (folder / "empty.txt").write_text("  \n")
    return folder


def run(files, built, out, concepts=True, column="text") -> int:
    return room.main(argparse.Namespace(
        files=[str(file) for file in (files if isinstance(files, list) else [files])], model=str(built), out=out,
        concepts=concepts, text_column=column,
    ))  # fmt: skip


def test_columns_and_order(files, built, reader, tmp_path, capsys):
    out = tmp_path / "vectors.parquet"
    assert run(files, built, out) == 0
    table = pq.read_table(out)
    b, c = files / "b.jsonl", files / "c.parquet"
    assert table["id"].to_pylist() == [str(files / "a.txt"), "one", "7", f"{b}:3", f"{b}:5", "p", f"{c}:2"]
    text = (files / "a.txt").read_text()
    np.testing.assert_allclose(table["vector"].to_pylist()[0], reader.embed([text])[0], atol=1e-6)
    (concepts,), (spans,) = reader.concepts([text])
    np.testing.assert_allclose(table["concepts"].to_pylist()[0], concepts, atol=1e-6)
    assert table["spans"].to_pylist()[0] == spans.tolist() and spans[0, 0] == 0 and spans[-1, 1] == len(text)
    about = json.loads(pq.read_schema(out).metadata[b"conceptron"])
    assert about["fingerprint"] == reader.fingerprint and about["width"] == 30 and about["concepts"] == 5
    assert "7 documents" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.parts")) and not list(tmp_path.glob(".vec*"))
    assert run(files, built, tmp_path / "plain.parquet", concepts=False) == 0
    assert pq.read_table(tmp_path / "plain.parquet").column_names == ["id", "vector"]


def test_what_was_stopped_goes_on(files, built, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reading, "WINDOW_DOCUMENTS", 2)
    assert run(files, built, tmp_path / "straight.parquet") == 0
    made, read = [], ConceptModel.read

    def stops(self, texts, *rest):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(texts)
        return read(self, texts, *rest)

    out = tmp_path / "vectors.parquet"
    monkeypatch.setattr(ConceptModel, "read", stops)
    assert run(files, built, out) == 130 and not out.exists()
    assert "the same command goes on" in capsys.readouterr().err
    parts = tmp_path / "vectors.parquet.parts"
    assert len(list(parts.glob("[0-9]*.parquet"))) == 2
    (parts / ".00000002.parquet").write_bytes(b"half a part")
    rest = []
    monkeypatch.setattr(ConceptModel, "read", lambda self, texts, *more: rest.append(texts) or read(self, texts, *more))
    assert run(files, built, out) == 0 and len(rest) == 2, "two of four windows were there"
    assert pq.read_table(out).equals(pq.read_table(tmp_path / "straight.parquet"))


def test_ranks_divide_the_windows(files, built, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reading, "WINDOW_DOCUMENTS", 2)
    assert run(files, built, tmp_path / "alone.parquet") == 0
    out = tmp_path / "vectors.parquet"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(files, built, out) == 0 and not out.exists()
    names = {path.name for path in (tmp_path / "vectors.parquet.parts").glob("[0-9]*.parquet")}
    assert names == {"00000001.parquet", "00000003.parquet"}
    monkeypatch.setenv("RANK", "0")
    assert run(files, built, out) == 0
    assert pq.read_table(out).equals(pq.read_table(tmp_path / "alone.parquet"))
    monkeypatch.setenv("RANK", "1")
    assert run(files, built, out) == 0, "a rank without a part of its own comes too late for nothing"


def test_files_that_cannot_be_read_are_named_and_the_others_go_on(files, built, tmp_path, capsys):
    (files / "bad.txt").write_bytes(b"\xff\xfe")
    (files / "broken.parquet").write_bytes(b"PAR1 but nothing more")
    (files / "half.jsonl").write_text('{"text": "the first"}\n{"text": ')
    (files / "other.jsonl").write_text('{"body": "no such column"}')
    assert run(files, built, tmp_path / "vectors.parquet") == room.SOME_LEFT_OUT == 1
    said = capsys.readouterr().err
    for line in ("bad.txt:1: byte 0xff", "broken.parquet: not a readable", "half.jsonl:2: not a line of JSON",
                 "; what stands before it is kept", "give --text-column body", "4 of 8 files could not"):
        assert line in said
    assert "data." not in said
    assert pq.read_table(tmp_path / "vectors.parquet").num_rows == 8
    assert run(files / "other.jsonl", built, tmp_path / "body.parquet", column="body") == 0


def test_bad_input_is_one_line_before_anything_is_written(files, built, bert, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "note.pdf").write_bytes(b"")
    (tmp_path / "there.parquet").write_bytes(b"")
    for given, found in (
        (dict(out=tmp_path / "v.csv"), "expected a file that ends in .parquet"),
        (dict(out=tmp_path / "there.parquet"), "is there already"),
        (dict(files=tmp_path / "bad.txt"), "none of 1 files has text that can be read"),
        (dict(files=tmp_path / "none.txt"), "none.txt: no such file or folder"),
        (dict(files=tmp_path / "note.pdf"), "unknown kind of file '.pdf'"),
        (dict(built=bert), "--model: "),
        (dict(built="/no/where"), "--model: /no/where: no such folder"),
    ):
        with pytest.raises(InputError) as caught:
            run(**{"files": files, "built": built, "out": tmp_path / "new.parquet"} | given)
        assert found in str(caught.value) and "\n" not in str(caught.value) and "data.source" not in str(caught.value)
    assert not list(tmp_path.glob("new*")) and not list(tmp_path.glob("v.csv*"))


def test_parts_of_another_command_are_not_gone_on_with(files, built, tmp_path, monkeypatch):
    out = tmp_path / "vectors.parquet"
    monkeypatch.setattr(room, "write_part", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(files, built, out) == 130
    (files / "a.txt").write_text("another text")
    with pytest.raises(InputError, match="begun with another text; go on with the same command, or remove"):
        run(files, built, out)
    with pytest.raises(InputError, match="begun with another concepts and text"):
        run(files, built, out, concepts=False)


def test_windows_hold_a_bounded_number_of_documents(monkeypatch):
    made = [reading.Document(str(i), "x" * n, None, i) for i, n in enumerate((5, 5, 5, 30, 1, 1, 1, 1, 1))]
    monkeypatch.setattr(reading, "WINDOW_DOCUMENTS", 4)
    monkeypatch.setattr(reading, "WINDOW_CHARS", 12)
    sizes = [[len(each.text) for each in window] for window in reading.windows(iter(made))]
    assert sizes == [[5, 5], [5], [30], [1, 1, 1, 1], [1]]


def test_a_rank_that_is_none_is_one_line(files, built, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("abc", "", "2", "-1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(InputError, match=r"environment: RANK: expected a whole number from 0 to 1"):
            run(files, built, tmp_path / "vectors.parquet")
    assert not list(tmp_path.glob("vectors.parquet*"))
