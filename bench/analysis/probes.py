"""What can be read off the concepts by a linear map: the words of a text, those around a concept, their places, the
length.

Ridge regression on half of the documents, judged on the others. A figure means something beside its floors only: the
same for an untrained model of the same configuration, and for texts whose answers have been shuffled.

B texts, C concepts, d model width, W words.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...engine.data.loader import Loader
from ...models.packing import pack

MAX_TEXTS, MAX_TOKENS = 384, 2**16
NUM_WORDS = 64
COMMON, RARE = 0.95, 0.05  # words are asked for that stand in so many of the texts
MAX_ROWS = 8192  # of single concepts
PENALTIES = tuple(10.0**k for k in range(-3, 6))
BATCH_TOKENS = 8192
MIN_TEXTS = 16


class Probe(NamedTuple):
    """On documents that the map was not fitted to; None: not measured."""

    name: str
    asks: str  # in words
    score: float  # share of the variance explained (R^2); of places the share found
    untrained: float | None
    shuffled: float


class Questions(NamedTuple):
    """Features do not depend on these: what is asked of every text, or of every concept of every text."""

    of_text: dict[str, Tensor]  # [B, n]
    of_concept: dict[str, Tensor]  # [B, C, n]


ASKS = {
    "words": "counts of the commonest words of the text, from the mean of its concepts",
    "length": "the logarithm of the number of tokens, from the mean of its concepts",
    "words here": "which of these words stand in the part of the text that belongs to a concept, from that concept",
    "words elsewhere": "the same of the part half a text away: what a concept says beyond its place",
    "place": "where a word stands, to a sixteenth of the text: at the concept that says most surely that it is there",
}


def probes(encoder: nn.Module, loader: Loader, seed: int = 0) -> list[Probe]:
    """One entry for each of ``ASKS``; none where there are fewer than 16 held-out texts."""
    generator = np.random.default_rng(seed)
    texts, is_train = cut_texts(encoder, loader, generator)
    if len(texts) < MIN_TEXTS or not 0 < is_train.sum() < len(texts):
        return []
    asked = questions(texts, encoder.config.num_concepts, sorted(loader.tokens.special_ids))
    z_BCd = features(encoder, texts)
    trained = scores(z_BCd, asked, is_train, generator)
    untrained = {}
    if encoder.config.backbone is None:  # random weights of a pretrained encoder would say nothing
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = type(encoder)(encoder.config)
        untrained = scores(features(fresh, texts), asked, is_train, generator)
    chance = scores(z_BCd, shuffled(asked, is_train, generator), is_train, generator)
    return [Probe(name, ASKS[name], trained[name], untrained.get(name), chance[name]) for name in trained]


def cut_texts(
    encoder: nn.Module, loader: Loader, generator: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """(held-out texts cut to lengths between a quarter of theirs and all, which of them to fit to [B] bool).

    No document is on both sides, where documents are known.
    """
    windows, rows = loader.windows, loader.evaluation_rows(min(MAX_TOKENS, loader.windows.num_tokens))[:MAX_TEXTS]
    shares = np.exp(generator.uniform(np.log(0.25), 0, len(rows)))
    texts = [windows[int(row)] for row in rows]
    texts = [text[: max(2, round(share * len(text)))] for text, share in zip(texts, shares, strict=True)]
    documents = windows.documents(rows)
    groups = np.arange(len(rows)) if documents is None else np.unique(documents, return_inverse=True)[1]
    return texts, generator.permutation(groups.max() + 1)[groups] % 2 == 0


def questions(texts: Sequence[np.ndarray], num_concepts: int, special_ids: Sequence[int]) -> Questions:
    C = num_concepts
    contains = [np.unique(text) for text in texts]
    ids, counts = np.unique(np.concatenate(contains), return_counts=True)
    asked = (counts <= COMMON * len(texts)) & (counts >= RARE * len(texts)) & ~np.isin(ids, special_ids)
    words = ids[asked][np.argsort(-counts[asked], kind="stable")[:NUM_WORDS]]
    column = {int(word): i for i, word in enumerate(words)}
    of_text, of_part = np.zeros((len(texts), len(words))), np.zeros((len(texts), C, len(words)))
    for b, text in enumerate(texts):
        parts = np.arange(len(text)) * C // len(text)
        for part, token in zip(parts.tolist(), text.tolist(), strict=True):
            if token in column:
                of_text[b, column[token]] += 1
                of_part[b, part, column[token]] = 1
    elsewhere = np.roll(of_part, C // 2, axis=1)
    lengths = np.log([len(text) for text in texts])[:, None]
    per_text = {"words": np.log1p(of_text), "length": lengths}
    per_concept = {"words here": of_part, "words elsewhere": elsewhere}
    return Questions({k: torch.from_numpy(v) for k, v in per_text.items()},
                     {k: torch.from_numpy(v) for k, v in per_concept.items()})  # fmt: skip


@torch.no_grad()
def features(encoder: nn.Module, texts: Sequence[np.ndarray]) -> Tensor:
    """The concepts, [B, C, d] float64 on the CPU."""
    encoder.eval()
    device = next(encoder.parameters()).device
    batch_of = (np.cumsum([len(text) for text in texts]) - 1) // BATCH_TOKENS
    found = [
        encoder(packed=pack([texts[i] for i in np.flatnonzero(batch_of == n)]).to(device)).last_hidden_state.cpu()
        for n in np.unique(batch_of)
    ]
    return torch.cat(found).double()


def scores(
    z_BCd: Tensor, asked: Questions, is_train: np.ndarray, generator: np.random.Generator
) -> dict[str, float]:
    """Of every question."""
    fit, judge = torch.from_numpy(np.flatnonzero(is_train)), torch.from_numpy(np.flatnonzero(~is_train))
    found = {name: explained(z_BCd.mean(1), y, fit, judge) for name, y in asked.of_text.items()}
    C = z_BCd.shape[1]
    rows_fit, rows_judge = (some_rows(rows, C, generator) for rows in (fit, judge))
    for name, y in asked.of_concept.items():
        found[name] = explained(z_BCd.flatten(0, 1), y.flatten(0, 1), rows_fit, rows_judge)
    here = asked.of_concept["words here"]
    linear = Linear(z_BCd.flatten(0, 1)[rows_fit], here.flatten(0, 1)[rows_fit])
    return {**found, "place": share_found(linear.predict(z_BCd[judge]), here[judge][..., linear.varies])}


def share_found(said_BCW: Tensor, here_BCW: Tensor) -> float:
    """How often the concept that says most surely that a word is in its part is at most a sixteenth of the text away
    from where it is, over the words that stand in one part only; 0 where there are none."""
    C = said_BCW.shape[1]
    once = here_BCW.sum(1) == 1
    if not bool(once.any()):
        return 0.0
    away = (said_BCW.argmax(1) - here_BCW.argmax(1)).abs()[once]
    return float((away <= C // 16).double().mean())


def some_rows(texts: Tensor, num_concepts: int, generator: np.random.Generator) -> Tensor:
    """Rows of [B * C, ...] that belong to these texts, ``MAX_ROWS`` at most."""
    rows = (texts[:, None] * num_concepts + torch.arange(num_concepts)).flatten()
    if len(rows) <= MAX_ROWS:
        return rows
    return rows[torch.from_numpy(generator.permutation(len(rows))[:MAX_ROWS])]


class Linear:
    """A ridge regression of what varies of y [n, W], each column scaled to variance 1, on x [n, d]."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.centre, self.scale = x.mean(0), x.std(0).clamp_min(1e-6)
        self.varies = y.std(0) > 1e-9
        self.middle, self.spread = y.mean(0)[self.varies], y.std(0)[self.varies]
        self.weights = ridge((x - self.centre) / self.scale, self.scaled(y))

    def scaled(self, y: Tensor) -> Tensor:
        return (y[..., self.varies] - self.middle) / self.spread

    def predict(self, x: Tensor) -> Tensor:
        """[..., W], scaled."""
        return (x - self.centre) / self.scale @ self.weights


def explained(x: Tensor, y: Tensor, fit: Tensor, judge: Tensor) -> float:
    """1 - sum of squared errors / variance where it is judged, over all columns of y that vary where it was fitted."""
    linear = Linear(x[fit], y[fit])
    if not bool(linear.varies.any()):
        return 0.0
    asked = linear.scaled(y[judge])
    errors = (asked - linear.predict(x[judge])).square().sum()
    return float(1 - errors / (asked - asked.mean(0)).square().sum().clamp_min(1e-300))


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """[d, n] weights with the penalty of the least leave-one-out error by generalised cross validation.

    Source: Golub, Heath & Wahba 1979.
    """
    squares, v = torch.linalg.eigh(x.T @ x)  # of the singular values; d is far smaller than n
    squares = squares.clamp_min(0)
    vxy, total = v.T @ (x.T @ y), y.square().sum()
    seen = squares > 1e-12 * squares.max().clamp_min(1e-300)
    explained_k = torch.where(seen, vxy.square().sum(1) / squares.clamp_min(1e-300), 0.0)  # by each direction of x
    best, weights = None, None
    for penalty in PENALTIES:
        shrink = squares / (squares + penalty)
        rest = total - explained_k.sum() + ((1 - shrink).square() * explained_k).sum()
        free = len(x) - float(shrink.sum()) - 1  # the mean is fitted too
        error = float(rest) / max(free, 1e-9) ** 2
        if best is None or error < best:
            best, weights = error, v @ (vxy / (squares + penalty)[:, None])
    return weights


def shuffled(asked: Questions, is_train: np.ndarray, generator: np.random.Generator) -> Questions:
    """Each text gets the answers of another on its side."""
    order = np.arange(len(is_train))
    for side in (is_train, ~is_train):
        members = np.flatnonzero(side)
        order[members] = members[generator.permutation(len(members))]
    index = torch.from_numpy(order)

    def of_concepts(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows = torch.from_numpy(generator.permutation(next(iter(values.values())).shape[1]))
        return {name: y[index][:, rows] for name, y in values.items()}

    return Questions({name: y[index] for name, y in asked.of_text.items()}, of_concepts(asked.of_concept))
