"""Windows: sequences of at most `window` tokens, cut from documents without a gap and read on demand."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...models.packing import positions_within

SHORTEST_SENTENCE = 6  # tokens


@dataclass(frozen=True)
class Part:
    """The windows of one source: row i is ``tokens[starts[i] : starts[i] + lengths[i]]``."""

    tokens: np.ndarray  # [T] uint16 or uint32, memory-mapped
    starts: np.ndarray  # [n] int64
    lengths: np.ndarray  # [n] int32
    weight: float = 1.0  # share of the tokens of a step, relative to the other parts
    documents: np.ndarray | None = None  # [n] int64, at least 0: which document each window is of, where that is known


class Windows:
    """Windows of one or several sources, numbered through.

    A window holds up to `window` tokens of one document; a longer document goes on in the next window. Nothing is
    dropped or padded, and no token is added.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.lengths = np.concatenate([part.lengths for part in self.parts])  # [n] int32
        self.bounds = np.cumsum([0] + [len(part.lengths) for part in self.parts])  # part p: bounds[p] to bounds[p + 1]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """The token ids of one window, [N] int64."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        which = int(np.searchsorted(self.bounds, index, side="right")) - 1
        part, row = self.parts[which], index - self.bounds[which]
        start = part.starts[row]
        return part.tokens[start : start + part.lengths[row]].astype(np.int64)

    def ids(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The token ids of these windows end to end [T] int64, and their lengths [n] int64: quick for short ones."""
        lengths = self.lengths[rows].astype(np.int64)
        within = positions_within(lengths)
        which = np.searchsorted(self.bounds, rows, side="right") - 1
        ids = np.empty(len(within), dtype=np.int64)
        for number, part in enumerate(self.parts):
            is_mine = which == number
            of_mine = np.repeat(is_mine, lengths)
            starts = part.starts[rows[is_mine] - self.bounds[number]]
            ids[of_mine] = np.asarray(part.tokens)[np.repeat(starts, lengths[is_mine]) + within[of_mine]]
        return ids, lengths

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @cached_property
    def fingerprint(self) -> str:
        """Of the text and of how it is cut. Reads all of it."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(np.ascontiguousarray(part.starts).tobytes())
            digest.update(np.ascontiguousarray(part.lengths).tobytes())
            for begin in range(0, len(part.tokens), 1 << 24):
                digest.update(np.ascontiguousarray(part.tokens[begin : begin + (1 << 24)]).tobytes())
        return digest.hexdigest()

    def documents(self, rows: np.ndarray) -> list[int] | None:
        """A number for the document of each of these windows, other ones in every source; None if not known."""
        if any(part.documents is None for part in self.parts):
            return None
        which = np.searchsorted(self.bounds, rows, side="right") - 1
        of_part = zip(which.tolist(), (rows - self.bounds[which]).tolist(), strict=True)
        return [part << 40 | int(self.parts[part].documents[row]) for part, row in of_part]


def cut(offsets: np.ndarray, documents: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts documents into windows.

    Args:
        offsets: [D+1] int64, where each document starts among the tokens of a store.
        documents: numbers of the documents to cut, in the order wanted.
        window: longest window in tokens.

    Returns:
        starts [n] int64 and lengths [n] int32 of the windows; a document without tokens has none.
    """
    begin, end = offsets[documents], offsets[documents + 1]
    counts = -(-(end - begin) // window)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(begin, counts) + within * window
    lengths = np.minimum(np.repeat(end, counts) - starts, window)
    return starts, lengths.astype(np.int32)


def cut_sentences(
    tokens: np.ndarray, offsets: np.ndarray, documents: np.ndarray, window: int, closes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts documents after tokens that close a sentence, and leaves out what is shorter than ``SHORTEST_SENTENCE``.

    Args:
        tokens, offsets, documents, window: as for `cut`, with the tokens themselves. What has no end within `window`
            tokens is cut there.
        closes: [V] bool.

    Returns:
        starts [n] int64 and lengths [n] int32 of the windows.
    """
    starts, stops = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for document in documents:
        begin, end = int(offsets[document]), int(offsets[document + 1])
        edges = np.append(begin + 1 + np.flatnonzero(closes[tokens[begin:end]]), end)
        first = np.concatenate([[begin], edges[:-1]])
        pieces, lengths = cut(np.concatenate([first, [end]]), np.arange(len(first)), window)
        keep = lengths >= SHORTEST_SENTENCE
        starts.append(pieces[keep])
        stops.append(pieces[keep] + lengths[keep])
    begins = np.concatenate(starts)
    return begins, (np.concatenate(stops) - begins).astype(np.int32)


def unigram_entropy(windows: Windows, rows: np.ndarray, special_ids: frozenset[int] = frozenset()) -> float:
    """Entropy of the token frequencies of these windows, in nats per token.

    It is the loss of the best predictor that ignores the context, on the very text it was counted on. Special tokens
    are not predicted, and so not counted.
    """
    counts = np.zeros(1, dtype=np.int64)
    for row in rows:
        found = np.bincount(windows[row])
        if len(found) > len(counts):
            counts = np.pad(counts, (0, len(found) - len(counts)))
        counts[: len(found)] += found
    counts[[i for i in special_ids if i < len(counts)]] = 0
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
