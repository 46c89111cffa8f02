"""What each concept reads: where in a text, how widely, which words, and whether another reads the same.

Everything is counted on exact attention maps (``models.attention_maps``), the mean over heads, made for one text at a
time and not kept. N tokens of a text, C concepts, V vocabulary, K layers or iterations.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...engine.data.loader import Loader
from ...models import attention_maps
from ...models.packing import pack

MAX_TEXTS, MAX_TOKENS = 64, 2**18  # that are read
BATCH_TOKENS = 8192
MAX_PAIRS = 512  # of concepts, whose divergence is measured in each text
NUM_BINS = 32  # of a text, for "position"
NUM_WORDS, RARE = 5, 5  # of a concept that are named; a token seen less often is not
PICTURE_TOKENS = 480

CLASSES = ("space", "punctuation", "number", "common word", "word", "name", "inside of a word")
COMMON_WORDS = """
a about after all also an and any are as at be because been before but by can could do does each for from get had has
have he her him his how i if in into is it its just like may me more most must my no not now of on one only or other our
out over she should so some such than that the their them then there these they this those through to too under up us
use used very was we were what when where which while who will with would you your
"""
COMMON = frozenset(COMMON_WORDS.split())


class Information(NamedTuple):
    """What knowing the concept says about one token that it reads, in bits."""

    bits: float
    floor: float  # the same after the tokens of each text have been shuffled: what chance gives
    most: float  # the entropy of what it could say at most


class Slot(NamedTuple):
    """One concept, means over texts."""

    centre: float  # of what it reads, as a share of the text
    width: float  # standard deviation around it, as a share of the text
    entropy: float  # of its weights over tokens; 1: all alike, 0: one token
    usage: float  # share of the tokens that it reads more than any other concept does
    words: tuple[str, ...]  # read more than their frequency, the most telling first


class Picture(NamedTuple):
    """One text, and who reads it, in the last layer."""

    pieces: tuple[str, ...]  # [N]
    readers: tuple[int, ...]  # [N] the concept that reads it most
    shares: tuple[float, ...]  # [N] its share of the token among all concepts
    weights: np.ndarray  # [C, N] float32


class Reads(NamedTuple):
    figures: dict[str, float]  # of the last layer; names as in the gates
    layers: list[dict[str, float]]  # the same of every layer or iteration
    information: dict[str, Information]  # of token, class and position, last layer
    slots: list[Slot]
    picture: Picture
    num_texts: int
    num_tokens: int


class Tally:
    """Adds up one layer's maps over texts."""

    def __init__(self, num_concepts: int, sizes: Mapping[str, int], seed: int = 0) -> None:
        """``sizes``: how many values each kind of label has (token, class, position)."""
        C = num_concepts
        self.C, self.num_texts = C, 0
        self.usage = torch.zeros(C, dtype=torch.float64)  # tokens
        self.moments = torch.zeros(3, C, dtype=torch.float64)  # centre, width, entropy
        self.divergence = 0.0
        self.joint = {name: torch.zeros(C, n) for name, n in sizes.items()}
        self.shuffled = {name: torch.zeros(C, n) for name, n in sizes.items()}
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, weights_CN: Tensor, shares_CN: Tensor, labels: Mapping[str, Tensor]) -> Tensor:
        """One text: what its concepts read, how they share its tokens, and what each of its tokens is, [N] int64 each.

        Returns [N]: the concept that reads each token most.
        """
        C, N = weights_CN.shape
        w = weights_CN / weights_CN.sum(1, keepdim=True).clamp_min(1e-30)
        place_N = (torch.arange(N, dtype=w.dtype) + 0.5) / N
        centre_C = w @ place_N
        spread_C = ((place_N[None] - centre_C[:, None]).square() * w).sum(1).sqrt()
        entropy_C = entropy(w) / math.log(N) if N > 1 else torch.zeros(C)
        self.moments += torch.stack((centre_C, spread_C, entropy_C)).double()
        readers_N = shares_CN.argmax(0)
        self.usage += torch.bincount(readers_N, minlength=C).double()
        self.divergence += mean_divergence(w, self.generator)
        order = torch.randperm(N, generator=self.generator)
        for name, values_N in labels.items():
            self.joint[name].index_add_(1, values_N, w)
            self.shuffled[name].index_add_(1, values_N[order], w)
        self.num_texts += 1
        return readers_N

    def figures(self) -> dict[str, float]:
        centre_C, width_C, entropy_C = self.moments / self.num_texts
        return {
            "usage_perplexity": perplexity(self.usage),
            "js_divergence": self.divergence / self.num_texts,
            "read_entropy": float(entropy_C.mean()),
            "read_width": float(width_C.mean()),
            "centre_spread": float(centre_C.std(correction=0)),
        }

    def information(self) -> dict[str, Information]:
        return {
            name: Information(mutual_bits(joint), mutual_bits(self.shuffled[name]), bits_of(joint.sum(0)))
            for name, joint in self.joint.items()
        }

    def slots(self, pieces: Mapping[int, str], seen: Tensor) -> list[Slot]:
        """``pieces``: text of token ids; ``seen`` [V]: how often each occurs in the texts."""
        centre_C, width_C, entropy_C = (self.moments / self.num_texts).tolist()
        usage_C = (self.usage / self.usage.sum()).tolist()
        joint = self.joint["token"].double() / self.joint["token"].sum()
        of_token = joint.sum(0)
        lift = joint / (joint.sum(1, keepdim=True) * of_token).clamp_min(1e-300)
        telling = torch.where((lift > 1) & (seen >= RARE), joint * lift.clamp_min(1).log(), 0.0)
        best = telling.topk(min(NUM_WORDS, telling.shape[1]), dim=1)
        words = [
            tuple(pieces[i] for i, score in zip(ids, scores, strict=True) if score > 0)
            for ids, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        return [Slot(*row) for row in zip(centre_C, width_C, entropy_C, usage_C, words, strict=True)]


def entropy(p: Tensor) -> Tensor:
    """Of the last axis, in nats; rows add up to 1."""
    return -torch.xlogy(p, p).sum(-1)


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the shares; 1 .. len(counts), 0 where there is nothing."""
    total = counts.sum()
    return float(entropy(counts / total).exp()) if total > 0 else 0.0


def mean_divergence(w_CN: Tensor, generator: torch.Generator | None = None) -> float:
    """Jensen-Shannon divergence of two concepts, in bits: 0 where they read alike, 1 where no token is read by both.

    The mean over all pairs, or over ``MAX_PAIRS`` drawn ones. 0 with one concept.
    """
    pairs = torch.combinations(torch.arange(len(w_CN)))
    if len(pairs) == 0:
        return 0.0
    if len(pairs) > MAX_PAIRS:
        pairs = pairs[torch.randperm(len(pairs), generator=generator)[:MAX_PAIRS]]
    entropies = entropy(w_CN)
    total = 0.0
    for a, b in (part.T for part in pairs.split(64)):
        total += float((entropy((w_CN[a] + w_CN[b]) / 2) - (entropies[a] + entropies[b]) / 2).sum())
    return max(0.0, total / len(pairs) / math.log(2))


def mutual_bits(joint: Tensor) -> float:
    """I(row; column) of a table of weights, in bits."""
    p = joint.double() / joint.sum().double()
    return max(0.0, float(bits_of(p.sum(1)) + bits_of(p.sum(0)) - bits_of(p.flatten())))


def bits_of(counts: Tensor) -> float:
    p = counts.double() / counts.sum().double()
    return float(entropy(p)) / math.log(2)


def class_of(piece: str) -> int:
    """A simple word class of a token's text, an index into ``CLASSES``."""
    word = piece.strip()
    if not word:
        return CLASSES.index("space")
    if not any(letter.isalnum() for letter in word):
        return CLASSES.index("punctuation")
    if word[0].isdigit():
        return CLASSES.index("number")
    if word.lower() in COMMON:
        return CLASSES.index("common word")
    if not piece[0].isspace():
        return CLASSES.index("inside of a word")
    return CLASSES.index("name" if word[0].isupper() else "word")


def pieces_of(tokenizer: Any, ids: Sequence[int]) -> dict[int, str]:
    """The text of each token as it stands in a text: with the blank before it that opens a word.

    WordPiece marks what goes on with a word, and not what opens one.
    """
    pieces = {i: tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids}
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if type(model).__name__ != "WordPiece":
        return pieces
    mark = model.continuing_subword_prefix
    return {i: piece.removeprefix(mark) if piece.startswith(mark) else f" {piece}" for i, piece in pieces.items()}


def reads(encoder: nn.Module, loader: Loader, tokenizer: Any) -> Reads | None:
    """Over the first whole held-out windows, as many tokens each as there are concepts, or more where there are such.

    None for an encoder whose concepts read merged tokens (a funnel), of which there is no map.
    """
    if encoder.config.funnel:
        return None
    texts = chosen_texts(loader, encoder.config.num_concepts)
    ids = np.unique(np.concatenate(texts))
    pieces = pieces_of(tokenizer, ids.tolist())
    class_of_id = torch.zeros(encoder.config.vocab_size, dtype=torch.int64)
    class_of_id[torch.from_numpy(ids)] = torch.tensor([class_of(pieces[int(i)]) for i in ids])
    seen = torch.bincount(torch.from_numpy(np.concatenate(texts)), minlength=encoder.config.vocab_size)
    sizes = {"token": encoder.config.vocab_size, "class": len(CLASSES), "position": NUM_BINS}
    num_layers = encoder.config.iterations if encoder.config.tie_layers else encoder.config.num_hidden_layers
    tallies = [Tally(encoder.config.num_concepts, sizes if k == num_layers - 1 else {}) for k in range(num_layers)]
    picture = None
    for batch in in_batches(texts):
        found = tally_batch(encoder, batch, tallies, class_of_id, with_picture=picture is None)
        picture = picture or found
    last, (text, readers, shares, weights) = tallies[-1], picture
    return Reads(
        figures=last.figures(), layers=[tally.figures() for tally in tallies], information=last.information(),
        slots=last.slots(pieces, seen),
        picture=Picture(tuple(pieces[int(i)] for i in text), readers, shares, weights),
        num_texts=len(texts), num_tokens=sum(map(len, texts)),
    )  # fmt: skip


@torch.no_grad()
def tally_batch(
    encoder: nn.Module, batch: Sequence[np.ndarray], tallies: Sequence[Tally], class_of_id: Tensor, with_picture: bool
) -> tuple | None:
    """Adds every layer's maps of a batch of texts; returns the picture of its first text on request."""
    encoder.eval()
    packed = pack(batch).to(next(encoder.parameters()).device)
    kept, layer_number = [], 0

    def watch(*given: Any) -> None:
        nonlocal layer_number
        tally, read = tallies[layer_number], attention_maps.read_of(*given)
        for b, rows in read.texts():
            weights, shares = (x.cpu() for x in read.mean(b, rows))
            ids = torch.from_numpy(batch[b])
            labels = {"token": ids, "class": class_of_id[ids], "position": bins(len(ids))} if tally.joint else {}
            readers = tally.add(weights, shares, labels)
            if with_picture and b == 0 and layer_number == len(tallies) - 1:
                n = slice(0, PICTURE_TOKENS)
                best = shares.gather(0, readers[None])[0]
                kept.append((batch[0][n], tuple(readers[n].tolist()), tuple(best[n].tolist()), weights[:, n].numpy()))
        layer_number += 1

    encoder.encode(packed, watch=watch)
    return kept[0] if kept else None


def bins(num_tokens: int) -> Tensor:
    """[N] int64: in which of ``NUM_BINS`` equal parts of the text each token stands."""
    return torch.arange(num_tokens) * NUM_BINS // max(1, num_tokens)


def chosen_texts(loader: Loader, num_concepts: int) -> list[np.ndarray]:
    """Whole held-out windows in a fixed order, long ones if there are any."""
    windows, rows = loader.windows, loader.evaluation_rows(loader.windows.num_tokens)
    long_enough = rows[windows.lengths[rows] >= num_concepts]
    rows = (long_enough if len(long_enough) >= 8 else rows)[:MAX_TEXTS]
    fits = np.cumsum(windows.lengths[rows]) <= max(MAX_TOKENS, int(windows.lengths[rows[0]]))
    return [windows[int(row)] for row in rows[fits]]


def in_batches(texts: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Of about ``BATCH_TOKENS`` each, in order."""
    batch_of = (np.cumsum([len(text) for text in texts]) - 1) // BATCH_TOKENS
    return [[texts[i] for i in np.flatnonzero(batch_of == number)] for number in np.unique(batch_of)]
