"""From the `data` section of a recipe to windows of token ids: sources, tokenizer, store, split, windows."""

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
from .tokenizer import Vocabulary
from .windows import SHORTEST_SENTENCE, Part, Windows, cut, cut_sentences
from .words import sentence_ends, word_edges


@dataclass(frozen=True)
class Corpus:
    train: Windows
    validation: Windows
    tokenizer: PreTrainedTokenizerFast
    tokens: SpecialTokens
    description: dict[str, Any]  # JSON: sizes of both splits, the tokenizer, counts of each source


def open_corpus(data: DataRecipe) -> Corpus:
    """Opens the corpus of a recipe; what is not in the cache yet is read, tokenised and put there first.

    With several processes on one machine, one builds and the others wait.

    Raises:
        InputError: a source or the tokenizer cannot be used; the line names the file or field and the remedy.
    """
    cache = cache_folder(data.cache)
    vocabulary = open_vocabulary(data, cache)
    train, validation, described = [], [], []
    for source in data.sources():
        parts, facts = open_parts(source, data.window, vocabulary, cache)
        train.append(parts[0])
        validation.append(parts[1])
        described.append(facts)
    tokens = vocabulary.tokens._replace(word_edges=word_edges(vocabulary.tokenizer, vocabulary.tokens.vocab_size))
    corpus = Corpus(Windows(train), Windows(validation), vocabulary.tokenizer, tokens, {
        "sources": described,
        "tokenizer": {"name": data.tokenizer, "vocab_size": vocabulary.tokens.vocab_size, "id": vocabulary.fingerprint},
        "window": data.window,
    })  # fmt: skip
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


def open_parts(
    source: Source, window: int, vocabulary: Vocabulary, cache: Path
) -> tuple[tuple[Part, Part], dict[str, Any]]:
    """The training and the held-out windows of one source, and its facts for the description."""
    facts: dict[str, Any] = {"path": source.path, "weight": source.weight}
    if source.path in NAMES:
        if source.validation is not None:
            raise InputError(f"data.validation: {source.path} has a fixed split of its own; remove this field")
        split, facts["pydocs"] = open_pydocs(cache, source.path)
        split = Split(split.train.first(source.max_documents), split.validation.first(source.max_documents))
    else:
        split = open_source(source)
    train = tokenise(split.train, vocabulary, cache)
    everything = np.arange(train.index["num_documents"])
    if isinstance(split.validation, Documents):
        held_out = tokenise(split.validation, vocabulary, cache)
        rows = everything, np.arange(held_out.index["num_documents"])
        facts["held_out_documents_also_trained_on"] = int(np.isin(held_out.hashes, train.hashes).sum())
    else:
        held_out = train
        rows = hold_out(train.hashes, split.validation, source)
    lost = dict.fromkeys(file for store in (train, held_out) for file in store.index.get("unreadable", ()))
    if lost:
        facts["unreadable"] = list(lost)
    parts = []
    for name, store, documents in (("train", train, rows[0]), ("validation", held_out, rows[1])):
        if source.unit == "sentence":
            closes = sentence_ends(vocabulary.tokenizer, vocabulary.tokens.vocab_size)
            starts, lengths = cut_sentences(store.tokens, store.offsets, documents, window, closes)
            if not len(starts):
                raise InputError(f"data.source: {source.path}: no sentence of {SHORTEST_SENTENCE} tokens for {name}")
        else:
            starts, lengths = cut(store.offsets, documents, window)
        of_document = np.searchsorted(store.offsets, starts, side="right") - 1
        parts.append(Part(store.tokens, starts, lengths, source.weight, of_document))
        facts[name] = {"documents": len(documents), "windows": len(starts), "tokens": int(lengths.sum(dtype=np.int64))}
    return (parts[0], parts[1]), facts


def tokenise(documents: Documents, vocabulary: Vocabulary, cache: Path) -> Store:
    folder = cache / f"tokens-{fingerprint([FORMAT, documents.identity, vocabulary.fingerprint])}"
    return open_store(folder, documents, vocabulary.encode, vocabulary.tokens.vocab_size)


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
