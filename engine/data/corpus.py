"""From the `data` section of a recipe to windows of token ids: sources, tokenizer, store, split, windows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from ...models.objectives.view import SpecialTokens
from ..errors import InputError
from ..recipe.data import DataRecipe, Source
from . import tokenizer
from .cache import built, cache_folder, fingerprint, say
from .pydocs import NAMES, open_pydocs
from .sources import Documents, Split, open_source
from .store import FORMAT, Store, open_store
from .stream import MB, Blocks, SourceStream
from .tokenizer import Vocabulary
from .windows import SHORTEST_SENTENCE, Part, Windows, cut, cut_sentences
from .words import sentence_ends, word_edges

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Corpus:
    train: Windows
    validation: Windows
    tokenizer: PreTrainedTokenizerFast
    tokens: SpecialTokens
    description: dict[str, Any]  # JSON: sizes of both splits, the tokenizer, counts of each source
    blocks: Blocks | None = None  # of text that is read piece by piece: ``train`` is the first of them


def open_corpus(data: DataRecipe) -> Corpus:
    """Opens the corpus of a recipe; what is not in the cache yet is read, tokenised and put there first.

    With several processes on one machine, one builds and the others wait.

    Raises:
        InputError: a source or the tokenizer cannot be used; the line names the file or field and the remedy.
    """
    cache = cache_folder(data.cache)
    vocabulary = open_vocabulary(data, cache)
    if data.stream_mb is None:
        found, streams = [open_documents(source, vocabulary, cache, data.processes) for source in data.sources()], None
    else:
        found, streams = open_streams(data, vocabulary, cache)
    if data.dedup:
        deduplicate(found)
    train, validation = ([each.windows(name, data.window, vocabulary) for each in found] for name in SPLITS)
    described = [each.facts for each in found]
    tokens = vocabulary.tokens._replace(word_edges=word_edges(vocabulary.tokenizer, vocabulary.tokens.vocab_size))
    blocks = None if streams is None else Blocks(
        streams, lambda stores: cut_block(found, stores, data.window, vocabulary),
        [data.window, [[each.source.unit, each.source.weight] for each in found]],
    )  # fmt: skip
    description = {
        "sources": described,
        "tokenizer": {"name": data.tokenizer, "vocab_size": vocabulary.tokens.vocab_size, "id": vocabulary.fingerprint},
        "window": data.window,
    }
    corpus = Corpus(Windows(train), Windows(validation), vocabulary.tokenizer, tokens, description, blocks)
    for name, windows in (("train", corpus.train), ("validation", corpus.validation)):
        corpus.description[name] = {"windows": len(windows), "tokens": windows.num_tokens}
    return corpus


def open_vocabulary(data: DataRecipe, cache: Path) -> Vocabulary:
    if data.tokenizer not in NAMES:
        return tokenizer.describe(tokenizer.with_mask(tokenizer.load(data.tokenizer)), data.tokenizer)
    split, _ = open_pydocs(cache, data.tokenizer)
    folder = cache / f"tokenizer-{fingerprint([FORMAT, split.train.identity, data.vocab_size])}"

    def build(unfinished: Path) -> dict[str, Any]:
        say(f"training a tokenizer of {data.vocab_size} entries on {data.tokenizer}")
        return tokenizer.save(tokenizer.train(split.train.read(), data.vocab_size), unfinished)

    built(folder, build)
    return tokenizer.describe(tokenizer.load(str(folder)), data.tokenizer)


@dataclass
class Found:
    """The documents of one source, and which of them belong to each of ``SPLITS``."""

    source: Source
    stores: dict[str, Store]
    rows: dict[str, np.ndarray]  # numbers of documents in the store
    facts: dict[str, Any]  # JSON, for the description

    def hashes(self, name: str) -> np.ndarray:
        """[D] of the text of each document of a split."""
        return self.stores[name].hashes[self.rows[name]]

    def windows(self, name: str, window: int, vocabulary: Vocabulary) -> Part:
        """A split, cut."""
        part = self.cut(name, self.stores[name], self.rows[name], window, vocabulary)
        num_tokens = int(part.lengths.sum(dtype=np.int64))
        self.facts[name] = {"documents": len(self.rows[name]), "windows": len(part.lengths), "tokens": num_tokens}
        return part

    def cut(self, name: str, store: Store, rows: np.ndarray, window: int, vocabulary: Vocabulary) -> Part:
        if self.source.unit == "sentence":
            closes = sentence_ends(vocabulary.tokenizer, vocabulary.tokens.vocab_size)
            starts, lengths = cut_sentences(store.tokens, store.offsets, rows, window, closes)
            if not len(starts):
                raise InputError(
                    f"data.source: {self.source.path}: no sentence of {SHORTEST_SENTENCE} tokens for {name}"
                )
        else:
            starts, lengths = cut(store.offsets, rows, window)
        of_document = np.searchsorted(store.offsets, starts, side="right") - 1
        return Part(store.tokens, starts, lengths, self.source.weight, of_document)


def open_documents(source: Source, vocabulary: Vocabulary, cache: Path, num_processes: int | None) -> Found:
    facts: dict[str, Any] = {"path": source.path, "weight": source.weight}
    if source.path in NAMES:
        if source.validation is not None:
            raise InputError(f"data.validation: {source.path} has a fixed split of its own; remove this field")
        split, facts["pydocs"] = open_pydocs(cache, source.path)
        split = Split(split.train.first(source.max_documents), split.validation.first(source.max_documents))
    else:
        split = open_source(source)
    train = tokenise(split.train, vocabulary, cache, num_processes)
    everything = np.arange(train.index["num_documents"])
    if isinstance(split.validation, Documents):
        held_out = tokenise(split.validation, vocabulary, cache, num_processes)
        rows = everything, np.arange(held_out.index["num_documents"])
        facts["held_out_documents_also_trained_on"] = int(np.isin(held_out.hashes, train.hashes).sum())
    else:
        held_out = train
        rows = hold_out(train.hashes, split.validation, source)
    lost = dict.fromkeys(file for store in (train, held_out) for file in store.index.get("unreadable", ()))
    if lost:
        facts["unreadable"] = list(lost)
    stores = dict(zip(SPLITS, (train, held_out), strict=True))
    return Found(source, stores, dict(zip(SPLITS, rows, strict=True)), facts)


def open_streams(data: DataRecipe, vocabulary: Vocabulary, cache: Path) -> tuple[list[Found], list[SourceStream]]:
    """The first block of each source, in the place of all of it, and what is held out of that; and the streams."""
    sources, found, streams = data.sources(), [], []
    for source in sources:
        share = source.weight / sum(each.weight for each in sources)
        split = open_source(source)
        held_out = 0.0 if isinstance(split.validation, Documents) else split.validation
        num_chars = round(share * data.stream_mb * MB)
        stream = SourceStream(split.train, num_chars, held_out, vocabulary, cache, data.processes)
        validation = stream.validation() if held_out else split.validation
        opened = stream.block(0), tokenise(validation, vocabulary, cache, data.processes)
        stores = dict(zip(SPLITS, opened, strict=True))
        rows = {name: np.arange(store.index["num_documents"]) for name, store in stores.items()}
        facts = {"path": source.path, "weight": source.weight, "of_a_block": num_chars}
        found.append(Found(source, stores, rows, facts))
        streams.append(stream)
    return found, streams


def cut_block(found: Sequence[Found], stores: Sequence[Store], window: int, vocabulary: Vocabulary) -> Windows:
    return Windows([
        each.cut("train", store, np.arange(store.index["num_documents"]), window, vocabulary)
        for each, store in zip(found, stores, strict=True)
    ])  # fmt: skip


def deduplicate(found: Sequence[Found]) -> None:
    """Leaves one of all documents with the same text: one that is held out, else the first.

    Raises:
        InputError: a source has nothing left to train on, or to hold out.
    """
    known = np.zeros(0, dtype=np.uint64)
    for name in reversed(SPLITS):  # what is held out stays
        for each in found:
            hashes = each.hashes(name)
            _, first = np.unique(hashes, return_index=True)
            stays = np.zeros(len(hashes), dtype=bool)
            stays[first] = ~np.isin(hashes[first], known)
            each.facts.setdefault("duplicates_left_out", {})[name] = int((~stays).sum())
            each.rows[name] = each.rows[name][stays]
            known = np.concatenate([known, hashes[stays]])
            if not stays.any():
                raise InputError(
                    f"data.dedup: {each.source.path}: every document of its {name} split is in another place too; "
                    "remove this source, or set data.dedup to false"
                )
    for each in found:
        each.facts.pop("held_out_documents_also_trained_on", None)  # none is


def tokenise(documents: Documents, vocabulary: Vocabulary, cache: Path, num_processes: int | None) -> Store:
    folder = cache / f"tokens-{fingerprint([FORMAT, documents.identity, vocabulary.fingerprint])}"
    return open_store(folder, documents, vocabulary, num_processes)


def hold_out(hashes: np.ndarray, fraction: float, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Splits documents by the hash of their text, so that equal texts fall on one side.

    A text that makes up more than half of the documents is trained on: held out, it would leave little to train on.

    Returns:
        The numbers of the documents to train on and of those to hold out: about ``fraction`` of all, at least one.

    Raises:
        InputError: there are not two different texts.
    """
    distinct, text_of, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    if len(distinct) < 2:
        found = f"{len(hashes)} documents, all of the same text" if len(hashes) > 1 else "one document"
        raise InputError(
            f"data.source: {source.path}: {found}, of which none can be held out; give more documents, or set "
            "data.validation to a file"
        )
    can_be = counts * 2 <= len(hashes)
    held = np.cumsum(np.where(can_be, counts, 0))
    wanted = max(1, round(fraction * len(hashes)))
    of_text = can_be & (held - counts < wanted)
    of_text[-1] &= not of_text.all()  # something has to be left to train on
    is_held_out = of_text[text_of]
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
