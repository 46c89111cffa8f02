"""A shard that cannot be read: the end, or left out and counted."""

import gzip
import json

import pytest

from conceptron.engine.data.corpus import open_corpus
from conceptron.engine.data.sources import open_source
from conceptron.engine.errors import InputError
from conceptron.engine.recipe.data import DataRecipe, Source
from conceptron.engine.trainer import train


@pytest.fixture
def shards(tmp_path):
    """Three, the second of which is cut in the middle of its compressed bytes, the third without its column."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(3):
        lines = [{"text" if i < 2 or n < 5 else "txt": f"{i} the concept reads {n} tokens " * 20} for n in range(400)]
        packed = gzip.compress("\n".join(map(json.dumps, lines)).encode())
        (folder / f"{i}.jsonl.gz").write_bytes(packed[: len(packed) // 2] if i == 1 else packed)
    return folder


def test_it_is_the_end_unless_one_asks_otherwise(shards):
    with pytest.raises(InputError, match=r"1\.jsonl\.gz: damaged gzip file"):
        list(open_source(Source(path=str(shards))).train.read())


def test_what_can_be_read_is_and_the_rest_is_counted(shards, text, recipe, capfd):
    data = DataRecipe(source=str(shards), on_unreadable="skip")
    documents = open_source(data.sources()[0]).train
    first = list(documents.read())
    assert list(documents.read()) == first and [file[-10:] for file in documents.lost] == ["1.jsonl.gz", "2.jsonl.gz"]
    counts = [sum(each.startswith(str(i)) for each in first) for i in range(3)]
    assert counts[0] == 400 and 0 < counts[1] < 400 and counts[2] == 5
    assert "1.jsonl.gz: damaged gzip file" in capfd.readouterr().err
    whole = DataRecipe(source=f"{shards}/0.jsonl.gz", on_unreadable="skip").sources()[0]
    assert open_source(whole).train.lost == []

    overrides = [f"data.source={shards}", "data.on_unreadable=skip", "train.steps=1", "eval.every=0"]
    folder = train(recipe, overrides)
    assert "without the rest of 2 unreadable files" in capfd.readouterr().err
    assert "2 of its files could not be read to their end" in (folder / "model" / "README.md").read_text()
    again = open_corpus(DataRecipe(
        source=str(shards), on_unreadable="skip", window=48, tokenizer=f"{text}/tokenizer", validation=0.2,
        cache=f"{text}/cache",
    ))  # fmt: skip
    assert len(again.description["sources"][0]["unreadable"]) == 2  # also where the tokens were there already
    assert "skipped from there on" not in capfd.readouterr().err


def test_nothing_but_unreadable_files_is_no_text(shards, recipe):
    with pytest.raises(InputError, match="no text in it"):
        (shards / "0.jsonl.gz").unlink()
        (shards / "2.jsonl.gz").unlink()
        (shards / "1.jsonl.gz").write_bytes(b"\x1f\x8b")
        train(recipe, [f"data.source={shards}", "data.on_unreadable=skip"])


def test_a_hub_data_set_is_refused(recipe):
    with pytest.raises(InputError, match=r"data.on_unreadable: expected stop with a data set of the hub"):
        train(recipe, ["data.source=nobody/nothing", "data.on_unreadable=skip"])
