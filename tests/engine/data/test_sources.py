"""Sources: every kind of file reads back what was written, and every mistake gets one line that helps."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from conceptron.engine.data.sources import Documents, find, open_source, read_text
from conceptron.engine.errors import InputError
from conceptron.engine.recipe.data import DataRecipe, Source

TEXTS = ["first\n\n  indented é 日本\n", "second, with a \t tab", "third 😀"]


def write(path, texts=TEXTS, column="text"):
    """Writes texts in the format that the name says; a .txt file holds the first of them."""
    lines = "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts))
    if path.name.endswith(".jsonl"):
        path.write_text(lines)
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.name.endswith(".parquet"):
        pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), path)
    else:
        path.write_text(texts[0], encoding="utf-8")
    return path


def resolved(path, **fields):
    return DataRecipe(source=[{"path": str(path), **fields}]).sources()[0]


def train_texts(path, **fields):
    return list(open_source(resolved(path, **fields)).train.read())


def refusal(path, **fields):
    """The message with which a source is refused, when it is opened or when it is read."""
    with pytest.raises(InputError) as caught:
        train_texts(path, **fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what is read


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("column", ["text", "body"])
def test_files_read_back(tmp_path, name, column):
    path = write(tmp_path / name, column=column)
    documents = open_source(resolved(path, text_column=column)).train
    assert list(documents.read()) == TEXTS
    assert list(documents.read()) == TEXTS  # a second time
    assert train_texts(path, text_column=column, max_documents=2) == TEXTS[:2]


def test_a_text_file_is_one_document(tmp_path):
    assert train_texts(write(tmp_path / "a.txt")) == [TEXTS[0]]
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_text(tmp_path / "b.txt") == "one\ntwo"


def test_rows_without_text_are_passed_over(tmp_path):
    assert train_texts(write(tmp_path / "a.jsonl", ["one", "", None, " \n", "two"])) == ["one", "two"]
    assert train_texts(write(tmp_path / "a.parquet", ["one", "", None, " \n", "two"])) == ["one", "two"]
    (tmp_path / "b.jsonl").write_text('\n{"text": "one"}\n\n{"text": "two"}')
    assert train_texts(tmp_path / "b.jsonl") == ["one", "two"]


def test_folders_and_globs_are_read_in_the_order_of_their_names(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "b.jsonl", ["b"])
    write(tmp_path / "a.txt", ["a"])
    write(tmp_path / "deep" / "c.parquet", ["c"])
    (tmp_path / "README.md").write_text("not data")
    assert train_texts(tmp_path) == ["a", "b", "c"]
    assert train_texts(tmp_path / "*.jsonl") == ["b"]
    assert train_texts(tmp_path / "**" / "*.parquet") == ["c"]


@pytest.mark.parametrize("held_out", ["validation-00000.jsonl", "val.jsonl", "dev.jsonl"])
def test_a_folder_with_named_splits_is_split_by_them(tmp_path, held_out):
    write(tmp_path / "train-0.jsonl", ["one"])
    write(tmp_path / "train-1.jsonl", ["two"])
    write(tmp_path / held_out, ["three"])
    write(tmp_path / "test.jsonl", ["four"])
    split = open_source(resolved(tmp_path))
    assert list(split.train.read()) == ["one", "two"]
    assert list(split.validation.read()) == ["three"]
    assert open_source(resolved(tmp_path, validation=0.25)).validation == 0.25


def test_held_out_files_are_not_trained_on(tmp_path):
    write(tmp_path / "a.jsonl", ["a"])
    write(tmp_path / "b.jsonl", ["b"])
    split = open_source(resolved(tmp_path / "*.jsonl", validation=str(tmp_path / "b.jsonl")))
    assert list(split.train.read()) == ["a"]
    assert list(split.validation.read()) == ["b"]
    message = refusal(tmp_path / "b.jsonl", validation=str(tmp_path / "b.jsonl"))
    assert message.startswith("data.validation: ") and "both trained on and held out" in message


def test_identity_changes_with_the_file_and_with_what_is_taken_of_it(tmp_path):
    path = write(tmp_path / "a.jsonl")

    def identity(**fields):
        return json.dumps(open_source(resolved(path, **fields)).train.identity)

    first = identity()
    assert first == identity()
    assert len({first, identity(text_column="other"), identity(max_documents=2)}) == 3
    os.utime(path, ns=(1, 1))
    assert identity() != first


# --- what is refused: where, what, what to do


def test_missing_places(tmp_path):
    assert "no such file or folder" in refusal(tmp_path / "no.jsonl")
    assert "correct the path" in refusal(tmp_path / "no.txt")
    assert "no file matches" in refusal(tmp_path / "*.jsonl")
    assert f"{tmp_path}: no .txt, .jsonl" in refusal(tmp_path)
    message = refusal("wikitext")
    assert message.startswith("data.source: wikitext: no such file or folder") and "org/name[:config]" in message
    with pytest.raises(InputError, match="no such file"):
        read_text(tmp_path / "no.txt")


def test_unknown_kind_of_file(tmp_path):
    (tmp_path / "a.csv").write_text("text\nhello\n")
    message = refusal(tmp_path / "a.csv")
    assert message.startswith(f"{tmp_path}/a.csv: unknown kind of file '.csv'; convert it to one of .txt, .jsonl")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_empty_files(tmp_path, name):
    path = write(tmp_path / name, [" "] if name.endswith("txt") else [])
    assert refusal(path).startswith(f"{path}: no text in this file; remove it")


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes("abc\nd\nfür".encode("latin1"))
    assert refusal(tmp_path / "a.txt").startswith(f"{tmp_path}/a.txt:3: byte 0xfc at offset 7 is not UTF-8; convert")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "f\xfcr"}\n')
    assert refusal(tmp_path / "a.jsonl").startswith(f"{tmp_path}/a.jsonl:2: byte 0xfc at offset 11 of the line")


@pytest.mark.parametrize(("line", "what"), [
    ('{"text": "open', "not a line of JSON"),
    ('["text"]', 'expected an object such as {"text": "..."}, got list'),
    ('{"id": 3, "body": "x"}', "no column 'text', only 'id', 'body'; set data.text_column=body"),
    ('{"a": "x", "b": "y"}', "only 'a', 'b'; set data.text_column to that of 'a', 'b' which is meant"),
    ('{"id": 3}', "no column 'text', only 'id', none of which holds text"),
    ("{}", "no column 'text', and no other"),
    ('{"text": "a", "text": "b"}', "column 'text' is there more than once"),
    ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    ('{"text": NaN}', "expected text in column 'text', got float"),
    ('{"n": ' + "9" * 5000 + "}", "not a line of JSON"),
    ('{"text": 3}', "expected text in column 'text', got int; set data.text_column"),
    ('{"text": "\\ud800"}', "half of a surrogate pair in column 'text'"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_wrong_lines(tmp_path, name, line, what):
    lines = f'{{"text": "fine"}}\n\n{line}\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    message = refusal(tmp_path / name)
    assert message.startswith(f"{tmp_path}/{name}:3: ") and what in message


def test_wrong_parquet(tmp_path):
    path = write(tmp_path / "a.parquet", column="body")
    assert refusal(path) == f"{path}: no column 'text', only 'id', 'body'; set data.text_column=body"
    assert refusal(path, text_column="id").startswith(f"{path}: expected text in column 'id', got int64")
    path.write_bytes(path.read_bytes()[:-20])
    assert refusal(path, text_column="body").startswith(f"{path}: not a readable parquet file")


ARROW = {  # every type that holds text, in Arrow and as parquet keeps it
    "string": pa.string(), "large_string": pa.large_string(), "string_view": pa.string_view(), "binary": pa.binary(),
    "large_binary": pa.large_binary(), "binary_view": pa.binary_view(), "json": pa.json_(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()), "dictionary of bytes": pa.dictionary(pa.int8(), pa.binary()),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARROW)
def test_every_arrow_type_of_text_reads(tmp_path, kind):
    type_, rows = ARROW[kind], [*TEXTS, None, ""]
    if "b" in kind.split()[-1]:
        rows = [row if row is None else row.encode() for row in rows]
    storage = pa.array(rows, pa.string() if kind == "json" else type_)
    column = pa.ExtensionArray.from_storage(type_, storage) if kind == "json" else storage
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert train_texts(tmp_path / "a.parquet") == TEXTS


@pytest.mark.parametrize("column, found", [
    (pa.array([["one"], ["two"]]), "expected text in column 'text', got list<element: string>; set data.text_column"),
    (pa.array([{"text": "one"}] * 2), "expected text in column 'text', got struct<text: string>"),
    (pa.array([1, 2]).dictionary_encode(), "expected text in column 'text', got int64"),
    (pa.array([b"abc", b"def"], pa.binary(3)), "expected text in column 'text', got fixed_size_binary[3]"),
    (pa.array([1.5, 2.5]), "expected text in column 'text', got double"),
    (pa.nulls(2), "no text in this file"),
    (pa.array([b"fine", b"f\xfcr"]), ", row 2: byte 0xfc at offset 1 of column 'text' is not UTF-8; convert it"),
    (pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0])),
                                            pa.py_buffer(b"ab\xff")]), ", row 2: byte 0xff at offset 1"),
])  # fmt: skip
def test_columns_that_are_no_text(tmp_path, column, found):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    message = refusal(tmp_path / "a.parquet")
    assert message.startswith(f"{tmp_path}/a.parquet") and found in message


def test_columns_that_are_ambiguous(tmp_path):
    path, a, n = tmp_path / "a.parquet", pa.array(["x"]), pa.array([1])
    for columns, found in (
        ({"title": a, "n": n, "body": a}, "; set data.text_column to that of 'title', 'body' which is meant"),
        ({"n": n, "list": pa.array([["x"]])}, "no column 'text', only 'n', 'list', none of which holds text"),
        ({f"c{i}": n for i in range(99)}, "'c11', ..., none of which holds text"),
    ):
        pq.write_table(pa.table(columns), path)
        assert refusal(path).endswith(found)
    pq.write_table(pa.Table.from_arrays([a, a], names=["text", "text"]), path)
    assert refusal(path) == f"{path}: 2 columns are named 'text'; rename all but one"
    pq.write_table(pa.table({"a.b": pa.array(["flat"]), "a": pa.array([{"b": "nested"}])}), path)
    assert train_texts(path, text_column="a.b") == ["flat"]


def test_links_to_nothing_and_names_of_nothing(tmp_path):
    write(tmp_path / "a.txt")
    (tmp_path / "b.txt").symlink_to(tmp_path / "moved.txt")
    found = f"{tmp_path}/b.txt: a link to {tmp_path}/moved.txt, which is not there"
    assert refusal(tmp_path).startswith(found) and found in refusal(tmp_path / "b.txt")
    with pytest.raises(InputError, match="not a path"):
        find("~nobody-at-all/x.txt")
    assert "not a path" in refusal("x" * 5000)


def test_a_folder_of_every_kind_of_file(tmp_path):
    for i, ending in enumerate(("txt", "jsonl", "jsonl.gz", "parquet")):
        write(tmp_path / f"{i}.{ending}", [f"from {ending}"])
    assert train_texts(tmp_path) == ["from txt", "from jsonl", "from jsonl.gz", "from parquet"]
    write(tmp_path / "4.parquet", ["x"], column="body")
    assert refusal(tmp_path).startswith(f"{tmp_path}/4.parquet: no column 'text', only 'id', 'body'")


def test_text_files_that_are_none(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\ntwo".encode("utf-16-le"))
    assert refusal(tmp_path / "a.txt") == (
        f"{tmp_path}/a.txt:1: a NUL byte, which no text holds; convert the file to UTF-8"
    )


def test_damaged_gzip(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", ["words " * 1000] * 50)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert refusal(path).startswith(f"{path}: damaged gzip file")
    path.write_bytes(b'{"text": "not compressed"}\n')
    assert refusal(path).startswith(f"{path}: cannot be read")


def test_a_hub_id_that_cannot_be_reached(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = refusal("conceptron-tests/no-such-data")
    assert message.startswith("data.source: conceptron-tests/no-such-data: no such file or folder here, and the hub")
    assert message.endswith("correct data.source, go online or use local files")


def test_a_hub_data_set(monkeypatch, tmp_path):
    # `datasets` reads a folder by the same call as a data set of the hub
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    for split, texts in (("train", TEXTS), ("validation", ["held out"])):
        (tmp_path / "org" / "name").mkdir(parents=True, exist_ok=True)
        write(tmp_path / "org" / "name" / f"{split}.jsonl", texts, column="body")
    monkeypatch.setattr("conceptron.engine.data.sources.is_local", lambda path: False)
    source = resolved("org/name", text_column="body", validation="validation")
    split = open_source(source)
    assert list(split.train.read()) == TEXTS
    assert list(split.validation.read()) == ["held out"]
    assert train_texts("org/name", text_column="body", max_documents=2) == TEXTS[:2]
    assert "no column 'text', only" in refusal("org/name")
    assert "cannot be loaded" in refusal("org/name", split="nowhere")


# --- the recipe's section


def test_sources_take_what_they_leave_out_from_the_section():
    two = ["a.txt", {"path": "b", "text_column": "body", "weight": 2}]
    data = DataRecipe(source=two, text_column="t", validation=0.1)
    filled = {"split": "train", "validation": 0.1, "on_unreadable": "stop"}
    assert data.sources() == [
        Source(path="a.txt", text_column="t", **filled), Source(path="b", text_column="body", weight=2, **filled),
    ]  # fmt: skip
    assert DataRecipe(source="a.txt").source == [Source(path="a.txt")]
    assert DataRecipe().source == [Source(path="pydocs")]
    assert DataRecipe.model_validate(data.model_dump(mode="json")) == data


@pytest.mark.parametrize("wrong", [
    {"window": 7}, {"source": []}, {"source": [{"weight": 1}]}, {"source": [{"path": "a", "weight": 0}]}, {"windw": 9},
    {"validation": 1.0}, {"vocab_size": 10}, {"max_documents": 1},
])  # fmt: skip
def test_wrong_fields(wrong):
    with pytest.raises(ValidationError):
        DataRecipe(**wrong)


# --- real files, where there are some


def test_real_files():
    root = os.environ.get("CONCEPTRON_DATA")
    if not root:
        pytest.skip("CONCEPTRON_DATA names no folder with data")
    split = open_source(resolved(f"{root}/techdocs"))
    assert isinstance(split.validation, Documents)
    train, held_out = list(split.train.read()), list(split.validation.read())
    assert len(train) == 1193 and len(held_out) == 48 and not set(train) & set(held_out)
    assert len(train_texts(f"{root}/longbench_mini/qasper.jsonl.gz", text_column="context")) == 9
