"""Text read piece by piece: every document once an epoch, and every step the same, wherever a run is gone on with."""

import json
import shutil
from itertools import count
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conceptron.engine.data import encoders, stream, tokenizer
from conceptron.engine.data.corpus import open_corpus
from conceptron.engine.data.encoder_process import hash_of
from conceptron.engine.data.loader import Loader
from conceptron.engine.data.stages import Stages
from conceptron.engine.data.stream import MB, Streamed, seed_of
from conceptron.engine.errors import InputError
from conceptron.engine.recipe.data import DataRecipe
from conceptron.models.objectives import TSDAE

TEXTS = [f"text number {i} " + "tree river stone cloud " * (1 + i % 9) for i in range(240)]
BLOCK = 4000  # characters


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    tokenizer.save(tokenizer.train(TEXTS, 300), folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The same texts in eight files of lines, and in one of parquet."""
    folder = tmp_path_factory.mktemp("shards")
    for kind in ("jsonl", "parquet", "txt"):
        (folder / kind).mkdir()
    for i in range(8):
        texts = TEXTS[i::8]
        lines = [json.dumps({"text": text, "id": j}) + "\n" for j, text in enumerate(texts)]
        (folder / "jsonl" / f"train-{i}.jsonl").write_text("".join(lines))
        (folder / "txt" / f"{i}.txt").write_text(texts[0])
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), folder / "parquet" / "0.parquet")
    return folder


@pytest.fixture
def corpus(words, shards, tmp_path):
    def opened(kind="jsonl", cache="cache", **fields):
        given = {"source": str(shards / kind), "tokenizer": str(words), "window": 32, "validation": 0.1}
        return open_corpus(DataRecipe(**{**given, "cache": str(tmp_path / cache), "stream_mb": BLOCK / MB, **fields}))

    return opened


def texts_in(store, words):
    read = tokenizer.load(str(words))
    return [read.decode(ids) for ids in np.split(store.tokens, store.offsets[1:-1])]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_text_passes_once_an_epoch_but_what_is_held_out(corpus, words, kind, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # else five seconds an epoch of parquet
    opened = corpus(kind)
    (source,) = opened.blocks.streams
    held_out = {text for text in TEXTS if hash_of(text.encode()) < 0.1 * 2**64}
    found = []
    for number in count():
        if len(found) > 2 * len(TEXTS):
            break
        texts = texts_in(source.block(number), words)
        assert BLOCK * 0.7 < sum(map(len, texts)) < BLOCK + max(map(len, TEXTS))
        found += texts
    rest = sorted(set(TEXTS) - held_out)
    first, second = found[: len(rest)], found[len(rest) : 2 * len(rest)]
    assert sorted(first) == rest == sorted(second)
    if kind == "jsonl":  # shards are read in turns, in another order in every epoch
        assert first != second and len({int(text.split()[2]) % 8 for text in first[:8]}) > 4
    kept = {words_of(opened.validation, words)}
    assert all(text in held_out for text in kept.pop()) and len(held_out) > 5


def words_of(windows, words):
    """The documents that windows are of."""
    read, documents = tokenizer.load(str(words)), {}
    for i, document in enumerate(windows.documents(np.arange(len(windows)))):
        documents.setdefault(document, []).extend(windows[i].tolist())
    return tuple(read.decode(ids) for ids in documents.values())


def test_a_block_is_the_same_whoever_makes_it_and_when(corpus, words, monkeypatch):
    monkeypatch.setattr(encoders, "BATCH_CHARS", 300)
    (source,) = corpus(processes=2).blocks.streams
    blocks = [texts_in(source.block(number), words) for number in range(12)]
    for number in (5, 7):  # removed, and made again from where the one before it ended
        source.forget(number)
        assert texts_in(source.block(number), words) == blocks[number]
    (anew,) = corpus(processes=1).blocks.streams  # as in another process, which finds blocks and places
    shutil.rmtree(anew.folder / "block-000008")
    assert texts_in(anew.block(8), words) == blocks[8]
    (elsewhere,) = corpus(cache="other", processes=1).blocks.streams
    assert texts_in(elsewhere.block(11), words) == blocks[11]
    kept = sorted(path.name for path in elsewhere.folder.iterdir() if path.name.startswith("block") and path.is_dir())
    assert kept == ["block-000000", "block-000011"]  # what was read on the way did not stay
    elsewhere.forget(0)
    assert (elsewhere.folder / "block-000000").exists()


def steps_of(opened, reads_ahead=True, rank=0, world_size=1, stop=40):
    def read(windows, first, number):
        return Loader(
            windows, TSDAE(), opened.tokens, seed=seed_of(3, number), tokens_per_step=200, micro_tokens=100,
            first_step=first, rank=rank, world_size=world_size,
        )  # fmt: skip

    return Stages([Streamed(opened.blocks, read, 0, stop, 200, reads_ahead)])


def ids_of(views):
    return [view.encoder.input_ids.tolist() for view in views]


def test_a_step_is_a_function_of_its_number(corpus):
    opened = corpus()
    straight = [ids_of(views) for views in steps_of(opened).prefetch(0, 40)]
    (source,) = opened.blocks.streams
    assert len(list(source.folder.glob("block-*[0-9]"))) < 6 < len(list(source.folder.glob("state-*.json")))
    for start in (1, 17, 33):
        assert ids_of(steps_of(corpus(), start % 2 == 0).step(start)) == straight[start]
    elsewhere = steps_of(corpus(cache="other"))
    assert [ids_of(elsewhere.step(step)) for step in (30, 4)] == [straight[30], straight[4]]
    ranks = [steps_of(corpus(), rank == 0, rank, 2) for rank in range(2)]
    for step in (0, 21, 39):
        of_ranks = [each for rank in ranks for each in ids_of(rank.step(step))]
        assert sorted(of_ranks) == sorted(straight[step])
        assert ranks[0].num_tokens(step) == ranks[1].num_tokens(step) <= 200


def test_no_window_of_a_block_passes_twice_and_all_do(corpus):
    made, read = steps_of(corpus()), {}
    for step in range(40):
        loader = made.at(step)
        read.setdefault(loader.first_step, []).extend(made.windows(step))
        assert loader.first_step <= step < loader.first_step + loader.steps_without_repeat
    *whole, _ = read
    assert len(whole) > 3
    assert all(sorted(read[first]) == list(range(len(read[first]))) for first in whole)


def test_sources_are_mixed_by_their_weights(corpus, shards):
    other = shards / "more.jsonl"
    other.write_text("".join(json.dumps({"text": f"{i} z" * 30}) + "\n" for i in range(120)))
    sources = [{"path": str(shards / "jsonl"), "weight": 3.0}, {"path": str(other), "weight": 1.0}]
    made = steps_of(corpus(source=sources, stream_mb=0.02))
    shares = []
    for step in range(30):
        loader = made.at(step)
        rows = loader.samples(step).windows
        lengths = loader.windows.lengths[rows]
        shares.append(lengths[rows >= loader.windows.bounds[1]].sum() / lengths.sum())
    assert 0.2 < np.mean(shares) < 0.3


def test_what_cannot_be_streamed_is_said(corpus, shards, tmp_path):
    with pytest.raises(InputError, match=r"data\.source: .*: cannot be streamed \(ValueError: files of 3 kinds, json"):
        corpus(".")
    with pytest.raises(InputError, match=r"no column 'body', only 'text', 'id'; set data.text_column"):
        corpus(text_column="body")
    with pytest.raises(InputError, match=r"data.stream_mb: block 0 holds .* tokens, not enough for two steps of batch"):
        steps_of(corpus("txt", validation=str(shards / "jsonl"), stream_mb=1e-5)).step(0)
    with pytest.raises(InputError, match=r"data.validation: nothing of the first block is held out; raise it"):
        corpus("txt", validation=1e-9)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(InputError, match=r"bad.jsonl, row 2 from there on: expected text in column 'text', got int"):
        corpus(source=str(tmp_path / "bad.jsonl"), validation=0.0001)


def test_reading_ahead_that_fails_is_tried_again_by_the_step(corpus, monkeypatch, capsys):
    made = steps_of(corpus())
    windows = made.loaders[0].blocks.windows
    monkeypatch.setattr(stream, "threading", SimpleNamespace(Thread=lambda target, args, daemon: Now(target, args)))
    calls = []

    def fails_once(number):
        calls.append(number)
        if number == 1 and calls.count(1) == 1:
            raise InputError("off")
        return windows(number)

    monkeypatch.setattr(made.loaders[0].blocks, "windows", fails_once)
    made.step(0)
    assert "block 1 could not be read ahead (off)" in capsys.readouterr().err
    made.step(made.at(0).steps_without_repeat)
    assert calls[:3] == [0, 1, 1]


class Now:
    """A thread that does it at once."""

    def __init__(self, target, args):
        self.target, self.args = target, args

    def start(self):
        self.target(*self.args)
