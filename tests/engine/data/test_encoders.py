"""Tokenising with several processes, killed and gone on with: the store is the same, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from conceptron.engine.data import encoders, store, tokenizer
from conceptron.engine.data.encoders import Encoders, encoded
from conceptron.engine.data.sources import Documents
from conceptron.engine.errors import Interrupted

FILES = ("tokens.bin", "offsets.npy", "hashes.npy", "index.json")
TEXTS = [f"{'a word or two of text ' * (1 + i % 7)}number {i} [MASK] é" for i in range(300)]
# tokenises TEXTS slowly, one text in each batch, with a mark after each
SLOW = """
import sys, time
from pathlib import Path
from conceptron.engine.data import encoders, store, tokenizer
from conceptron.engine.data.sources import Documents
from {module} import TEXTS

def slowly():
    for text in TEXTS:
        time.sleep(0.02)
        yield text

encoders.BATCH_CHARS, store.MARK_S = 1, 0
vocabulary = tokenizer.describe(tokenizer.load({words!r}), "")
store.open_store(Path({folder!r}), Documents("d", 0, slowly), vocabulary, 2)
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    tokenizer.save(tokenizer.train(TEXTS, 300), folder)
    return folder


@pytest.fixture(scope="module")
def vocabulary(words):
    return tokenizer.describe(tokenizer.load(str(words)), "")


@pytest.fixture(scope="module")
def straight(vocabulary, tmp_path_factory):
    return contents(open_in(tmp_path_factory.mktemp("straight") / "s", vocabulary, TEXTS, 1))


def open_in(folder, vocabulary, texts, num_processes):
    store.open_store(folder, Documents("d", 0, lambda: iter(texts)), vocabulary, num_processes)
    return folder


def contents(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return {name: (folder / name).read_bytes() for name in FILES}


def test_as_many_processes_as_one_likes(vocabulary, straight, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "BATCH_CHARS", 700)
    for num_processes in (1, 2, 3):
        assert contents(open_in(tmp_path / str(num_processes), vocabulary, TEXTS, num_processes)) == straight
    counts = [count for count, _ in encoded(TEXTS, vocabulary.plain, "uint16", 2)]
    assert sum(counts) == len(TEXTS) and len(counts) > 10


def test_one_batch_starts_no_process(vocabulary, monkeypatch):
    monkeypatch.setattr(encoders, "Encoders", None)
    assert [count for count, _ in encoded(TEXTS, vocabulary.plain, "uint16", 8)] == [len(TEXTS)]
    assert list(encoded([], vocabulary.plain, "uint16", 8)) == []


def test_a_process_that_dies_is_said_and_none_is_left(vocabulary):
    with Encoders(vocabulary.plain, "uint16", 2) as alive:
        assert alive.submit(TEXTS[:3]).result().lengths == [len(ids) for ids in vocabulary.encode(TEXTS[:3])]
        for process in alive._processes:
            process.kill()
        with pytest.raises(Interrupted, match=r"data.processes: one that turns text into tokens ended with -9"):
            alive.submit(TEXTS[:3]).result()
    assert all(process.poll() is not None for process in alive._processes)


def test_a_killed_preparation_goes_on_where_it_stopped(vocabulary, words, straight, tmp_path, capsys):
    folder = tmp_path / "s"
    script = SLOW.format(module=__name__.rpartition(".")[2], words=str(words), folder=str(folder))
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path})
    progress = tmp_path / "s.unfinished" / store.PROGRESS
    deadline = time.monotonic() + 60
    while not (progress.exists() and len(progress.read_text().splitlines()) > 20):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = json.loads(progress.read_text().splitlines()[-1])["documents"]
    assert 20 <= begun < len(TEXTS) and not folder.exists()
    read = []

    def documents():
        for text in TEXTS:
            read.append(text)
            yield text

    store.open_store(folder, Documents("d", 0, documents), vocabulary, 1)
    assert f"from document {begun + 1} on" in capsys.readouterr().err
    assert contents(folder) == straight and not progress.exists()


def test_what_the_last_mark_promises_and_the_disk_lost_is_made_again(vocabulary, straight, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "BATCH_CHARS", 700)
    monkeypatch.setattr(store, "MARK_S", 0)
    folder, unfinished = tmp_path / "s", tmp_path / "s.unfinished"

    def breaks():
        yield from TEXTS[:200]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_in(folder, vocabulary, breaks(), 1)
    marks = [json.loads(line) for line in (unfinished / store.PROGRESS).read_text().splitlines()]
    with open(unfinished / "tokens.bin", "r+b") as file:
        file.truncate(marks[-2]["tokens"] * 2 + 1)
    with open(unfinished / store.PROGRESS, "a") as file:
        file.write('{"documents": 1')  # cut off
    begun = []
    monkeypatch.setattr(store, "say", begun.append)
    assert contents(open_in(folder, vocabulary, TEXTS, 1)) == straight
    assert begun == [f"turning d into tokens, from document {marks[-2]['documents'] + 1} on"]


def test_a_network_that_fails_costs_nothing_that_was_done_and_a_damaged_file_leaves_nothing(vocabulary, tmp_path):
    for error, stays in ((Interrupted("off"), True), (ValueError("no text"), False)):
        def breaks(error=error):
            yield TEXTS[0]
            raise error

        with pytest.raises(type(error)):
            open_in(tmp_path / "s", vocabulary, breaks(), 1)
        assert (tmp_path / "s.unfinished").exists() == stays
    assert np.array_equal(np.fromfile(open_in(tmp_path / "s", vocabulary, TEXTS[:1], 1) / "tokens.bin", np.uint16),
                          vocabulary.encode(TEXTS[:1])[0])  # fmt: skip
