"""Phrases: runs of two to five words that occur together more often than any of their parts would by chance.

T tokens of a corpus, W words in it, V vocabulary.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from ..packing import pack
from .view import SampleKey, SpecialTokens, check_option, clean_text
from .words import run_starts, word_starts

FORMAT = 1
SHARES = {2: 0.5, 3: 0.25, 4: 0.125, 5: 0.125}  # of a list, by number of words


@dataclass(frozen=True, eq=False)
class Phrases:
    """A list of phrases, each a run of token ids from the beginning of a word to the end of one."""

    vocab_size: int
    ids: list[list[int]]
    pmi: list[float]

    def for_vocabulary(self, vocab_size: int) -> "Phrases":
        if self.vocab_size != vocab_size:
            raise ValueError(
                f"phrases: expected a list made for the tokenizer of this run, {vocab_size} entries, got one for "
                f"{self.vocab_size}; build it again"
            )
        return self

    @cached_property
    def trie(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """keys [E] rising and children [E]: node n goes to children[i] on token keys[i] - n * V; is_end [E+1]."""
        sizes = np.array([len(ids) for ids in self.ids], dtype=np.int64)
        flat = np.array([token for ids in self.ids for token in ids], dtype=np.int64)
        nodes, keys = number(flat, np.cumsum(sizes) - sizes, sizes, self.vocab_size)
        is_end = np.zeros(len(keys) + 1, dtype=bool)
        is_end[nodes] = True
        order = np.argsort(keys)
        return keys[order], order + 1, is_end

    def find(self, ids: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First row [m], and row behind the last [m], of every phrase in ``ids`` [N]; words begin at ``starts`` [N]."""
        keys, children, is_end = self.trie
        starts = np.append(starts, True)
        rows = np.flatnonzero(starts[:-1])
        nodes, depth, found = np.zeros_like(rows), 0, [np.zeros((2, 0), dtype=np.int64)]
        while len(rows) and len(keys):
            wanted = nodes * self.vocab_size + ids[rows + depth]
            at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            known = keys[at] == wanted
            rows, nodes, depth = rows[known], children[at[known]], depth + 1
            is_phrase = is_end[nodes] & starts[rows + depth]
            found.append(np.stack([rows[is_phrase], rows[is_phrase] + depth]))
            goes_on = rows + depth < len(ids)
            rows, nodes = rows[goes_on], nodes[goes_on]
        return tuple(np.concatenate(found, axis=1))

    def join(self, ids: np.ndarray, starts: np.ndarray, g: np.random.Generator) -> np.ndarray:
        """``starts`` [N] without those inside a phrase: what is left begins a unit. Longest first, equals by chance."""
        first, behind = self.find(ids, starts)
        words = np.append(np.cumsum(starts), np.count_nonzero(starts) + 1)  # the number of the word at each row
        num_words = words[behind] - words[first]
        taken, starts = np.zeros(len(ids), dtype=bool), starts.copy()
        for i in np.lexsort((g.random(len(first)), -num_words)):
            rows = slice(first[i], behind[i])
            if not taken[rows].any():
                taken[rows] = True
                starts[first[i] + 1 : behind[i]] = False
        return starts


def build(
    sequences: Sequence[np.ndarray], tokens: SpecialTokens, *, size: int = 800_000, min_count: int = 10
) -> Phrases:
    """Counts the runs of two to five words of a corpus and keeps those with the highest PMI.

        PMI(w_1 .. w_n) = min over segmentations s of log( p(w_1 .. w_n) / product of p(part), over the parts of s )

    with p(run of n words) = its count / the number of runs of n words, all in the corpus. Half of the list are pairs,
    a quarter triples, an eighth each runs of four and five; only runs with a positive PMI and at least ``min_count``
    occurrences are taken, so a part of the list may stay empty. Everything is counted exactly, in about 150 bytes a
    token and the time of a few sorts. A run ends with its sequence and at a special token.

    Args:
        sequences: token ids, one array a document (or window).
        tokens: of the tokenizer that made them.
        size: most phrases in the list.

    Raises:
        ValueError: the tokenizer does not tell where words begin, or an id is not its own.

    Source: Levine et al. 2021 (PMI-Masking), arXiv:2010.01825.
    """
    check_option("size", size, "a whole number of at least 8", size >= 8)
    check_option("min_count", min_count, "a whole number of at least 1", min_count >= 1)
    text = clean_text(pack(sequences), [SampleKey(0, 0, i) for i in range(len(sequences))], tokens)
    first = np.flatnonzero(word_starts(text, tokens))
    behind = np.append(first[1:], len(text.ids))
    first, behind = first[text.maskable[first]], behind[text.maskable[first]]
    words, _ = number(text.ids, first, behind - first, tokens.vocab_size)
    run = np.cumsum(run_starts(text))[first]
    counts = [Counts.of(words, np.ones(len(words), dtype=bool), len(words), min_count)]
    for n in range(2, max(SHARES) + 1):
        is_run = run[n - 1 :] == run[: max(len(run) - n + 1, 0)]
        shorter, last = counts[-1].names, counts[0].names
        # a run that is frequent enough has two frequent parts of n - 1 words
        may_count = is_run & (shorter[:-1] >= 0) & (shorter[1:] >= 0)
        codes = shorter[:-1] * len(words) + last[n - 1 :]
        counts.append(Counts.of(codes, may_count, np.count_nonzero(is_run), min_count))
    ids, pmi = [], []
    for n, share in SHARES.items():
        values, places = information(counts, n), counts[n - 1].places
        best = np.lexsort((places, -values))
        best = best[values[best] > 0][: int(size * share)]
        ids += [text.ids[first[i] : behind[i + n - 1]].tolist() for i in places[best]]
        pmi += values[best].tolist()
    return Phrases(tokens.vocab_size, ids, pmi)


@dataclass(frozen=True)
class Counts:
    """The runs of n words that are frequent enough."""

    names: np.ndarray  # [W - n + 1] int64: which of them begins at each word, -1 for none
    places: np.ndarray  # [m] int64: a word where each begins
    log_p: np.ndarray  # [m] float64

    @classmethod
    def of(cls, codes: np.ndarray, may_count: np.ndarray, total: int, min_count: int) -> "Counts":
        rows = np.flatnonzero(may_count)
        _, index, inverse, count = np.unique(codes[rows], return_index=True, return_inverse=True, return_counts=True)
        keep = count >= min_count
        new = np.where(keep, np.cumsum(keep) - 1, -1)
        names = np.full(len(codes), -1)
        names[rows] = new[inverse]
        return cls(names, rows[index[keep]], np.log(count[keep] / max(total, 1)))


def information(counts: list[Counts], n: int) -> np.ndarray:
    """[m] PMI of the runs of n words, by dynamic programming over their segmentations."""
    places = counts[n - 1].places
    whole = {  # (first word, number of words) -> [m] log p of that part
        (a, k): counts[k - 1].log_p[counts[k - 1].names[places + a]] for k in range(1, n + 1) for a in range(n - k + 1)
    }
    best = {}  # the same for the most probable segmentation of that part into one or more
    for k in range(1, n + 1):
        for a in range(n - k + 1):
            cuts = [whole[a, j] + best[a + j, k - j] for j in range(1, k)]
            if k == n:
                return whole[0, n] - np.max(cuts, axis=0)
            best[a, k] = np.max([whole[a, k], *cuts], axis=0)
    raise ValueError(f"n: expected at least 2, got {n}")


def number(ids: np.ndarray, starts: np.ndarray, sizes: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers runs of tokens, equal ones alike: run i is ``ids[starts[i] : starts[i] + sizes[i]]``.

    Returns:
        names [W] int64, nodes of a trie whose root is 0, and keys [E]: node i + 1 is reached by the edge
        keys[i] = parent * V + token.
    """
    names, keys, num_nodes, depth = np.zeros(len(sizes), dtype=np.int64), [np.zeros(0, dtype=np.int64)], 1, 0
    alive = np.flatnonzero(sizes > 0)
    while len(alive):
        edges, inverse = np.unique(names[alive] * vocab_size + ids[starts[alive] + depth], return_inverse=True)
        names[alive] = num_nodes + inverse
        keys.append(edges)
        num_nodes, depth = num_nodes + len(edges), depth + 1
        alive = alive[sizes[alive] > depth]
    return names, np.concatenate(keys)


def save(phrases: Phrases, path: str | Path) -> None:
    tree = {"format": FORMAT, "vocab_size": phrases.vocab_size, "phrases": phrases.ids, "pmi": phrases.pmi}
    Path(path).write_text(json.dumps(tree, allow_nan=False), encoding="utf-8")


@lru_cache(maxsize=4)
def load(path: str) -> Phrases:
    """Reads a list that ``save`` wrote; once in a process.

    Raises:
        ValueError: there is no such file, or it is no list of phrases.
    """
    try:
        tree = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"phrases: expected a file made by pmi.save, {path} cannot be read: {error.strerror}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"phrases: expected a file made by pmi.save, {path} is not JSON: {error}") from error
    parts = {"vocab_size": int, "phrases": list, "pmi": list}
    is_list = isinstance(tree, dict) and tree.get("format") == FORMAT
    if not is_list or not all(isinstance(tree.get(name), kind) for name, kind in parts.items()):
        raise ValueError(
            f"phrases: expected a file made by pmi.save in format {FORMAT}, {path} is another; build it again"
        )
    return Phrases(tree["vocab_size"], tree["phrases"], tree["pmi"])
