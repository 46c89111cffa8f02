"""From a recipe to windows: the cache, tokenizers, the split, and all of it together."""

import errno
import json
import multiprocessing
import os
import random
import time
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conceptron.engine.data import cache, corpus, encoders, pydocs, store, tokenizer
from conceptron.engine.data.corpus import hold_out, open_corpus
from conceptron.engine.data.loader import Loader
from conceptron.engine.data.sources import Documents
from conceptron.engine.errors import InputError
from conceptron.engine.recipe.data import DataRecipe, Source
from conceptron.models.objectives import OBJECTIVES, SpecialTokens

WORDS = ["tree", "river", "stone", "cloud", "engine", "ladder", "window", "garden", "bottle", "é 日本", "[MASK]"]


def make_texts(count, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 60))) + "\n" for _ in range(count)]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.train(make_texts(200), 400).save_pretrained(folder)
    return folder


@pytest.fixture
def texts_file(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(120)))
    return path


@pytest.fixture
def recipe(tmp_path, tokenizer_folder, texts_file):
    def build(**fields):
        defaults = {"source": str(texts_file), "tokenizer": str(tokenizer_folder), "window": 16, "validation": 0.1}
        return DataRecipe(**{**defaults, "cache": str(tmp_path / "cache"), **fields})

    return build


def ids(windows):
    return np.concatenate([windows[i] for i in range(len(windows))])


# --- the cache


def build_once(folder, log):
    def build(unfinished):
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(0.2)
        (unfinished / "data.bin").write_bytes(b"0123456789")
        return {"answer": 42}

    return cache.built(folder, build)


def test_a_folder_is_built_once_even_by_many_processes(tmp_path):
    folder, log = tmp_path / "deep" / "folder", tmp_path / "log"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=build_once, args=(folder, log)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert build_once(folder, log)["answer"] == 42
    assert log.read_text() == "built\n"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["folder", "folder.lock"]


@pytest.mark.parametrize("damage", ["flip", "shorten", "lose", "index", "empty index"])
def test_damage_is_found_and_mended(tmp_path, damage, capsys):
    folder, log = tmp_path / "folder", tmp_path / "log"
    build_once(folder, log)
    if damage == "flip":
        (folder / "data.bin").write_bytes(b"0123456780")
    elif damage == "shorten":
        (folder / "data.bin").write_bytes(b"01234")
    elif damage == "lose":
        (folder / "data.bin").unlink()
    else:
        (folder / "index.json").write_text("{}" if damage == "empty index" else '{"files": {"data.')
    assert build_once(folder, log)["answer"] == 42
    assert (folder / "data.bin").read_bytes() == b"0123456789"
    assert log.read_text() == "built\n" * 2
    assert f"{folder}: damaged (" in capsys.readouterr().err


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fails(unfinished):
        (unfinished / "half").write_text("x")
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        cache.built(tmp_path / "folder", fails)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.lock"]
    (tmp_path / "folder.unfinished").mkdir()  # as a killed process leaves it
    (tmp_path / "folder.unfinished" / "half").write_text("x")
    build_once(tmp_path / "folder", tmp_path / "log")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["data.bin", "index.json"]


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "folder", tmp_path / "file" / "deep" / "folder"):
        with pytest.raises(InputError, match=r"file.*: cannot write the data cache .*set data\.cache to an"):
            cache.built(folder, dict)

    def full(unfinished):
        raise OSError(errno.ENOSPC, "No space left on device", str(unfinished / "tokens.bin"))

    with pytest.raises(InputError, match=r"tokens\.bin: cannot write the data cache \(No space left on device\)"):
        cache.built(tmp_path / "folder", full)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder(None) == tmp_path / "conceptron"
    assert cache.cache_folder("~/x").name == "x" and "~" not in str(cache.cache_folder("~/x"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder(None).parts[-2:] == (".cache", "conceptron")


# --- tokenizers


def test_the_trained_tokenizer_writes_any_text_and_reads_it_back():
    texts = make_texts(200)
    first, second = tokenizer.train(texts, 310), tokenizer.train(iter(texts), 310)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    vocabulary = tokenizer.describe(first, "here")
    text = "  Never seen: żółw \U0001f422\n\n\tend [MASK] "
    (encoded,) = vocabulary.encode([text])
    assert first.decode(encoded) == text
    assert not set(encoded) & vocabulary.tokens.special_ids
    assert vocabulary.tokens.mask_id == first.mask_token_id in vocabulary.tokens.special_ids
    assert len(vocabulary.tokens.special_ids) == 5 and vocabulary.tokens.vocab_size == len(first) == 310


def test_a_trained_tokenizer_comes_back_from_its_folder(tokenizer_folder):
    loaded = AutoTokenizer.from_pretrained(tokenizer_folder)
    trained = tokenizer.train(make_texts(200), 400)
    assert loaded.mask_token == "[MASK]" and loaded.pad_token == "[PAD]"
    text = "stone  [MASK] river é\n"
    assert loaded(text)["input_ids"] == trained(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_tokenizers_that_cannot_serve(tmp_path, recipe):
    without_mask = PreTrainedTokenizerFast(tokenizer_object=tokenizer.train(make_texts(9), 300).backend_tokenizer)
    without_mask.save_pretrained(tmp_path / "plain")
    plain = tokenizer.load(str(tmp_path / "plain"))
    with pytest.raises(InputError, match=r"data\.tokenizer: plain: no mask token; .*add_special_tokens"):
        tokenizer.describe(plain, "plain")
    size = len(plain)
    made = tokenizer.describe(tokenizer.with_mask(plain), "plain").tokens  # as the tokenizers of causal models are
    assert made.mask_id in made.special_ids and made.vocab_size == max(size, made.mask_id + 1)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match=r"data\.tokenizer: .*/nothing: no tokenizer\.json in this folder"):
        open_corpus(recipe(tokenizer=str(tmp_path / "nothing")))
    with pytest.raises(InputError, match=r"data\.tokenizer: conceptron-tests/none: no such folder here, and"):
        open_corpus(recipe(tokenizer="conceptron-tests/none"))


# --- the store


class Spelled(NamedTuple):
    """A tokenizer that spells, after its largest id; "none" has no token."""

    largest: int

    def encode_batch_fast(self, texts, add_special_tokens):
        ids = [[] if text == "none" else [self.largest, *text.encode()] for text in texts]
        return [SimpleNamespace(ids=each) for each in ids]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_the_store_keeps_every_token(tmp_path, monkeypatch, vocab_size, dtype):
    monkeypatch.setattr(encoders, "BATCH_CHARS", 50)
    texts = [*make_texts(30), "none", "last"]
    tokens = SpecialTokens(0, frozenset(), vocab_size)
    spelled = tokenizer.Vocabulary(None, tokens, "", Spelled(vocab_size - 1))
    opened = store.open_store(tmp_path / "s", Documents("d", 0, lambda: iter(texts)), spelled, 1)
    expected = [[vocab_size - 1, *text.encode()] for text in texts if text != "none"]
    assert opened.tokens.dtype == dtype and isinstance(opened.tokens, np.memmap)
    assert np.split(opened.tokens, opened.offsets[1:-1])[-1].tolist() == expected[-1]
    assert opened.tokens.tolist() == [token for document in expected for token in document]
    assert np.diff(opened.offsets).tolist() == [len(document) for document in expected]
    assert opened.index["num_bytes"] == sum(len(text.encode()) for text in texts if text != "none")
    with pytest.raises(InputError, match=r"data\.source: d: no text in it"):
        store.open_store(tmp_path / "t", Documents("d", 0, lambda: iter(["none"])), spelled, 1)
    assert not (tmp_path / "t").exists() and not (tmp_path / "t.unfinished").exists()


# --- all together


def test_the_corpus_is_the_documents(recipe, tokenizer_folder):
    opened = open_corpus(recipe())
    plain = tokenizer.describe(AutoTokenizer.from_pretrained(tokenizer_folder), "").plain
    documents = [tuple(plain.encode(text, add_special_tokens=False).ids) for text in make_texts(120)]
    train, held_out = ids(opened.train).tolist(), ids(opened.validation).tolist()
    assert sorted(train + held_out) == sorted(token for document in documents for token in document)

    kept = []
    for document in documents:  # in the order of the file, each wholly on one side
        if train[: len(document)] == list(document):
            train = train[len(document) :]
            kept.append(document)
        else:
            assert held_out[: len(document)] == list(document)
            held_out = held_out[len(document) :]
    assert not train and not held_out and len(kept) == 108
    assert opened.tokens.mask_id not in ids(opened.train)  # though the text says [MASK]
    assert opened.description["train"] == {"windows": len(opened.train), "tokens": opened.train.num_tokens}
    json.dumps(opened.description)


def test_the_second_time_nothing_is_read(recipe, monkeypatch):
    first = open_corpus(recipe())
    monkeypatch.setattr(corpus.Vocabulary, "encode", lambda *_: pytest.fail("tokenised again"))
    again = open_corpus(recipe(window=32, validation=0.2))  # other windows of the same tokens
    whole = [np.sort(np.concatenate([ids(opened.train), ids(opened.validation)])) for opened in (first, again)]
    np.testing.assert_array_equal(*whole)
    assert again.train.lengths.max() == 32 and again.validation.num_tokens > first.validation.num_tokens


def test_a_changed_file_or_tokenizer_is_read_again(recipe, texts_file, tmp_path):
    first = open_corpus(recipe())
    texts_file.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(50, seed=1)))
    assert open_corpus(recipe()).train.num_tokens < first.train.num_tokens
    tokenizer.train(make_texts(200), 300).save_pretrained(tmp_path / "other")
    assert open_corpus(recipe(tokenizer=str(tmp_path / "other"))).tokens.vocab_size == 300


def test_damaged_tokens_are_made_again(recipe, tmp_path, capsys):
    before = ids(open_corpus(recipe()).train)
    (tokens,) = tmp_path.glob("cache/tokens-*/tokens.bin")
    raw = bytearray(tokens.read_bytes())
    raw[10] ^= 1
    tokens.write_bytes(raw)
    np.testing.assert_array_equal(ids(open_corpus(recipe()).train), before)
    assert "tokens.bin: its contents have changed" in capsys.readouterr().err


def test_held_out_files(recipe, tmp_path):
    (tmp_path / "held_out.txt").write_text(make_texts(3)[1] * 3)
    (tmp_path / "copy.jsonl").write_text(json.dumps({"text": make_texts(3)[1]}) + "\n")
    opened = open_corpus(recipe(validation=str(tmp_path / "held_out.txt")))
    assert len(opened.validation) == -(-opened.validation.num_tokens // 16)
    assert opened.description["sources"][0]["train"]["documents"] == 120
    assert opened.description["sources"][0]["held_out_documents_also_trained_on"] == 0
    copied = open_corpus(recipe(validation=str(tmp_path / "copy.jsonl")))
    assert copied.description["sources"][0]["held_out_documents_also_trained_on"] == 1
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match=r"empty\.txt: no text in this file"):
        open_corpus(recipe(validation=str(tmp_path / "empty.txt")))


def test_a_held_out_fraction_keeps_equal_texts_together():
    hashes = np.array([9, 4, 4, 7, 1, 8, 4, 30, 20, 25], dtype=np.uint64)
    train, held_out = hold_out(hashes, 0.2, Source(path="x"))
    assert held_out.tolist() == [1, 2, 4, 6] and sorted([*train, *held_out]) == list(range(10))
    assert len(hold_out(np.arange(10, dtype=np.uint64), 0.01, Source(path="x"))[1]) == 1
    for few, found in (([3], "one document"), ([3] * 50, "50 documents, all of the same text")):
        with pytest.raises(InputError, match=f"x: {found}, of which none can be held out; .*set data.validation to a"):
            hold_out(np.array(few, dtype=np.uint64), 0.5, Source(path="x"))


@pytest.mark.parametrize("hashes, fraction, held_out", [
    ([1] * 50 + [2], 0.02, [50]),  # what most documents say is trained on
    ([2] * 50 + [1], 0.02, [50]),
    ([1, 2], 0.99, [0]),  # something is left to train on
    ([5, 5, 7, 7], 0.1, [0, 1]),
    ([1, 2, 3, 3, 3, 3, 3], 0.5, [0, 1]),
])  # fmt: skip
def test_equal_texts_stay_on_one_side_and_leave_something_to_train_on(hashes, fraction, held_out):
    train, found = hold_out(np.array(hashes, dtype=np.uint64), fraction, Source(path="x"))
    assert found.tolist() == held_out and sorted([*train, *found]) == list(range(len(hashes)))


def test_one_text_file_needs_a_held_out_file(recipe, tmp_path):
    (tmp_path / "book.txt").write_text("\n".join(make_texts(20)))
    with pytest.raises(InputError, match=r"book\.txt: one document, of which none can be held out"):
        open_corpus(recipe(source=str(tmp_path / "book.txt")))


def test_a_mixture_reaches_the_model_in_its_shares(recipe, tmp_path, texts_file):
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": "stone " * 30}) + "\n" for _ in range(40)))
    (tmp_path / "held.txt").write_text("stone river")
    other = {"path": str(tmp_path / "other.jsonl"), "weight": 1, "validation": str(tmp_path / "held.txt")}
    opened = open_corpus(recipe(source=[{"path": str(texts_file), "weight": 3}, other]))
    assert [source["weight"] for source in opened.description["sources"]] == [3, 1]
    loader = Loader(
        opened.train, OBJECTIVES["mlm"](), opened.tokens, seed=0, tokens_per_step=1024, micro_tokens=512
    )
    total, of_other = 0, 0
    for step in range(20):
        views = loader.step(step)
        assert sum(view.encoder.num_tokens for view in views) <= 1024
        windows = loader.samples(step).windows
        total += opened.train.lengths[windows].sum()
        of_other += opened.train.lengths[windows[windows >= opened.train.bounds[1]]].sum()
    assert of_other / total == pytest.approx(0.25, abs=0.03)
    assert {name for views in Loader(
        opened.validation, OBJECTIVES["diffusion"](), opened.tokens, seed=0, tokens_per_step=64, micro_tokens=64
    ).evaluation(200) for name in views} >= {"t=0.10", "t=0.90"}  # fmt: skip


def test_pydocs_from_recipe_to_windows(recipe, tmp_path, monkeypatch):
    (tmp_path / "site" / "alpha").mkdir(parents=True)
    for i, text in enumerate(make_texts(90, seed=5)):
        (tmp_path / "site" / "alpha" / f"m{i}.py").write_text(f'"""{text * 3}"""\n')
    (tmp_path / "site" / "alpha" / "__init__.py").write_text("raise SystemExit\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setitem(pydocs.CORPORA, "pydocs", ("alpha",))
    monkeypatch.setattr(pydocs, "language_topics", lambda: [])
    monkeypatch.setattr(pydocs.sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    monkeypatch.setattr(pydocs, "is_held_out", lambda name: name.endswith("7"))
    monkeypatch.setattr(pydocs, "NEW", 0.0)
    fields = {"source": "pydocs", "tokenizer": "pydocs", "vocab_size": 320, "validation": None}
    opened = open_corpus(recipe(**fields))
    assert opened.tokens.vocab_size == 320
    first = opened.tokenizer.decode(ids(opened.train)).split("alpha.m")[1]
    assert first.startswith("0\n\n") and first[3:].strip() == (make_texts(1, seed=5)[0] * 3).strip()
    facts = opened.description["sources"][0]["pydocs"]
    assert facts["documents"]["train"] + facts["documents"]["validation"] + facts["short_documents"] == 90
    limited = open_corpus(recipe(**fields, max_documents=5))
    assert limited.description["sources"][0]["train"]["documents"] == 5
    with pytest.raises(InputError, match=r"data\.validation: pydocs has a fixed split of its own"):
        open_corpus(recipe(**{**fields, "validation": 0.1}))


def test_real_files():
    root = os.environ.get("CONCEPTRON_DATA")
    if not root:
        pytest.skip("CONCEPTRON_DATA names no folder with data")
    bert = tokenizer.describe(tokenizer.load(f"{root}/tokenizers/bert-base-uncased"), "bert")
    assert bert.tokens == (103, frozenset({0, 100, 101, 102, 103}), 30522)
    assert bert.plain.encode("[MASK] [SEP]", add_special_tokens=False).tokens == ["[", "mask", "]", "[", "sep", "]"]
    with pytest.raises(InputError, match="smollm2: no mask token"):
        tokenizer.describe(tokenizer.load(f"{root}/tokenizers/smollm2"), "smollm2")


def test_one_of_all_equal_documents_stays_if_asked_for(recipe, tmp_path):
    def write(name, texts):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(tmp_path / name)

    distinct = make_texts(60)
    a = write("a.jsonl", distinct[:40] + distinct[:10])
    b = write("b.jsonl", distinct[30:60] + distinct[30:35])
    held_out = write("held.jsonl", [*distinct[5:8], *distinct[5:8]])
    sources = [{"path": a, "validation": held_out}, {"path": b, "validation": 0.2}]
    every, once = open_corpus(recipe(source=sources)), open_corpus(recipe(source=sources, dedup=True))

    def documents(windows):
        found = {}
        for i, document in enumerate(windows.documents(np.arange(len(windows)))):
            found.setdefault(document, []).extend(windows[i].tolist())
        return [tuple(each) for each in found.values()]

    train, validation = documents(once.train), documents(once.validation)
    assert len(set(train + validation)) == len(train + validation) == len({*documents(every.train)} | {*validation})
    assert len(train) + len(validation) == 60 and set(documents(every.validation)) == set(validation)
    left_out = [facts["duplicates_left_out"] for facts in once.description["sources"]]
    assert left_out[0]["validation"] == 3 and left_out[0]["train"] >= 10 + 3
    assert sum(each["train"] + each["validation"] for each in left_out) == 50 + 6 + 35 - 60
    assert all("held_out_documents_also_trained_on" not in facts for facts in once.description["sources"])
    with pytest.raises(InputError, match=r"data.dedup: .*c.jsonl: every document of its train split is in another"):
        open_corpus(recipe(source=[a, {"path": write("c.jsonl", distinct[:20]), "validation": held_out}], dedup=True))
