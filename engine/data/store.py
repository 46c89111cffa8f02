"""Tokenised documents on disk: one file of token ids, mapped into memory, and where each document starts in it."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .cache import built, progress, say
from .sources import Documents

FORMAT = 1
BATCH_CHARS = 1 << 22  # text tokenised at once; bounds the memory, whatever the size of the corpus

Encode = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Store:
    tokens: np.ndarray  # [T] uint16 or uint32, memory-mapped, read-only
    offsets: np.ndarray  # [D+1] int64: document i is tokens[offsets[i] : offsets[i + 1]]
    hashes: np.ndarray  # [D] uint64, of each document's text
    index: dict[str, Any]  # num_documents, num_tokens, num_bytes (UTF-8), ...


def open_store(folder: Path, documents: Documents, encode: Encode, vocab_size: int) -> Store:
    """Opens the store in ``folder``, and tokenises ``documents`` into it first if it is not there.

    Documents without a token are left out.

    Raises:
        InputError: no document is left.
    """
    index = built(folder, lambda unfinished: write(unfinished, documents, encode, vocab_size))
    return Store(
        tokens=np.memmap(folder / "tokens.bin", dtype=index["dtype"], mode="r"),
        offsets=np.load(folder / "offsets.npy"),
        hashes=np.load(folder / "hashes.npy"),
        index=index,
    )


def write(folder: Path, documents: Documents, encode: Encode, vocab_size: int) -> dict[str, Any]:
    say(f"turning {documents.name} into tokens")
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    lengths, hashes, num_bytes = [], [], 0
    with open(folder / "tokens.bin", "wb") as file:
        for texts in batches(progress(documents.read(), " documents")):
            for text, ids in zip(texts, encode(texts), strict=True):
                if not ids:
                    continue
                encoded = text.encode()
                file.write(np.array(ids, dtype=dtype).tobytes())
                lengths.append(len(ids))
                hashes.append(int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little"))
                num_bytes += len(encoded)
    if not lengths:
        raise InputError(f"data.source: {documents.name}: no text in it; give a source with at least one document")
    offsets = np.concatenate([[0], np.cumsum(np.array(lengths, dtype=np.int64))])
    np.save(folder / "offsets.npy", offsets.astype(np.int64))
    np.save(folder / "hashes.npy", np.array(hashes, dtype=np.uint64))
    return {
        "format": FORMAT, "dtype": dtype.name, "num_documents": len(lengths), "num_tokens": int(offsets[-1]),
        "num_bytes": num_bytes, "unreadable": documents.lost,
    }  # fmt: skip


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    texts, chars = [], 0
    for text in documents:
        texts.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield texts
            texts, chars = [], 0
    if texts:
        yield texts
