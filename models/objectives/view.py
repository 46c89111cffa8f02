"""What every objective hands to the model: a view of clean text.

    loss = sum_i weights_i * nll_i / divisor

B sequences, T packed tokens the encoder reads, R rows of the decoder, M of them targets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..packing import Packed, pack_flat

GOLDEN = 0.6180339887498949  # frac(k * GOLDEN) fills [0, 1) evenly for any run of consecutive k
OPENS_WORD, ENDS_WORD = 1, 2  # a word begins with this token whatever is before it, or with the token after it
HIDDEN = ("drop", "mask")  # what stands for a hidden token in what the encoder reads: nothing, or [MASK]
SHIFT_STREAM = 2**20  # the stream of the shift that an epoch's times share; objectives number theirs from 0


class SampleKey(NamedTuple):
    """Names one sequence of one run; all randomness of its view is a pure function of it."""

    seed: int
    epoch: int
    index: int  # place of the sequence in the epoch's order

    def generator(self, stream: int) -> np.random.Generator:
        """Philox keyed by (seed, epoch, index); ``stream`` keeps uses of one key apart."""
        entropy = np.random.SeedSequence((self.seed, self.epoch, self.index, stream))
        return np.random.Generator(np.random.Philox(entropy))


class SpecialTokens(NamedTuple):
    """What an objective must know of the tokenizer."""

    mask_id: int
    special_ids: frozenset[int]  # never masked, never drawn, never generated; contains mask_id
    vocab_size: int
    word_edges: bytes | None = None  # [V] OPENS_WORD | ENDS_WORD of each id; None: the tokenizer does not tell


@dataclass(frozen=True)
class Pair:
    """Two more views of each of B texts, for a contrastive loss, see ``Contrastive``."""

    texts: Packed  # 2B sequences, the first view of every text and then the second; B if ``shares_encoder``
    ids: Tensor  # [B] int64: equal ones are not told apart, negative ones are left out
    shares_encoder: bool = False  # the first view is what the encoder reads for the task: ``texts`` has the second only

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Pair":
        return Pair(self.texts.to(device, non_blocking), self.ids.to(device, non_blocking=non_blocking),
                    self.shares_encoder)  # fmt: skip


@dataclass(frozen=True)
class View:
    """What the encoder reads, which rows the decoder answers, and how much each answer counts.

    R = M, unless there are context rows: tokens that a decoder that mixes rows is told, and not asked for.
    """

    encoder: Packed
    decoder_position_ids: Tensor  # [R] int64, positions of the rows in their own sequence
    decoder_input_ids: Tensor | None  # [R] int64, for token+position queries; position queries ignore it
    decoder_cu_seqlens: Tensor  # [B+1] int32, rows of each sequence
    decoder_max_seqlen: int
    targets: Tensor  # [M] int64
    weights: Tensor  # [M] float32
    seen: Tensor  # [M] bool: did the encoder see this very token?
    timesteps: Tensor | None  # [B] float32 in (0, 1]
    divisor: Tensor  # 0-d float32, what the weighted sum is divided by
    target_rows: Tensor | None = None  # [M] int64, the rows that are targets, in order; None: all, there is no context
    pair: Pair | None = None  # where a contrastive loss is added
    lesson: Any = None  # a `Lesson`, where a teacher is followed
    num_concepts: int | None = None  # C that the texts are read into; None: the configuration's

    @property
    def num_targets(self) -> int:
        return self.targets.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "View":
        def move(value):
            is_moved = hasattr(value, "to")
            return value.to(device, non_blocking=non_blocking) if is_moved else value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})


class Text(NamedTuple):
    """A packed batch of clean text as numpy arrays, the form in which objectives work."""

    ids: np.ndarray  # [T] int64
    positions: np.ndarray  # [T] int64
    lengths: np.ndarray  # [B] int64
    extents: np.ndarray  # [B] int64, as Packed.num_positions
    maskable: np.ndarray  # [T] bool: not a special token

    @property
    def sequence(self) -> np.ndarray:
        """[T] int64: the sequence each token belongs to."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


def clean_text(batch: Packed, keys: Sequence[SampleKey], tokens: SpecialTokens) -> Text:
    """Checks one key per sequence and unpacks the batch.

    Raises:
        ValueError: the number of keys is not B, or a token id lies outside the vocabulary.
    """
    if len(keys) != batch.num_sequences:
        raise ValueError(f"keys: expected one for each of the B = {batch.num_sequences} sequences, got {len(keys)}")
    ids = batch.input_ids.numpy()
    if len(ids) and (ids.min() < 0 or ids.max() >= tokens.vocab_size):
        worst = int(ids.max()) if ids.max() >= tokens.vocab_size else int(ids.min())
        raise ValueError(
            f"input_ids: expected ids in [0, {tokens.vocab_size}), got {worst}; is this the tokenizer of the run?"
        )
    maskable = ~np.isin(ids, np.fromiter(tokens.special_ids, dtype=np.int64))
    lengths = np.diff(batch.cu_seqlens.numpy()).astype(np.int64)
    return Text(ids, batch.position_ids.numpy(), lengths, batch.num_positions().numpy(), maskable)


def per_sequence(text: Text, keys: Sequence[SampleKey], stream: int, draw: Callable) -> np.ndarray:
    """[T]: ``draw(generator, N)`` of each sequence end to end. A sequence's draw depends on its own key only."""
    parts = [draw(key.generator(stream), int(n)) for key, n in zip(keys, text.lengths, strict=True)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])  # of integers still, where there is no sequence


def low_discrepancy_t(keys: Sequence[SampleKey], eps: float) -> np.ndarray:
    """[B] float64 in (0, 1]: t = 1 - (1 - eps) * frac(u(seed, epoch) + index * golden).

    Any run of consecutive indices is spread evenly over (eps, 1], in whatever way it is cut into batches and ranks.
    """
    shift = {}
    for key in keys:
        if (key.seed, key.epoch) not in shift:
            shift[key.seed, key.epoch] = SampleKey(key.seed, key.epoch, 0).generator(SHIFT_STREAM).random()
    index = np.array([key.index for key in keys], dtype=np.int64)
    start = np.array([shift[key.seed, key.epoch] for key in keys], dtype=np.float64)
    return 1.0 - (1.0 - eps) * ((start + index * GOLDEN) % 1.0)


def build_view(
    encoder: Packed, text: Text, rows: np.ndarray, decoder_ids: np.ndarray, weights: np.ndarray, seen: np.ndarray,
    timesteps: np.ndarray | None, divisor: float, context: np.ndarray | None = None,
) -> View:  # fmt: skip
    """Assembles a view from numpy parts; ``rows`` [M] are the target rows of ``text`` in rising order.

    ``decoder_ids``, ``weights`` and ``seen`` are [M]. ``context`` [T] bool: further rows, none of them a target, that
    the decoder is told as they are.
    """
    shown, shown_ids, target_rows = rows, decoder_ids, None
    if context is not None:
        shown = np.union1d(rows, np.flatnonzero(context))
        target_rows = np.searchsorted(shown, rows)
        shown_ids = text.ids[shown]
        shown_ids[target_rows] = decoder_ids
    num_rows = np.bincount(text.sequence[shown], minlength=len(text.lengths)).astype(np.int64)
    decoder = pack_flat(shown_ids, text.positions[shown], num_rows)
    return View(
        encoder=encoder,
        decoder_position_ids=decoder.position_ids,
        decoder_input_ids=decoder.input_ids,
        decoder_cu_seqlens=decoder.cu_seqlens,
        decoder_max_seqlen=decoder.max_seqlen,
        targets=torch.from_numpy(text.ids[rows]),
        weights=torch.from_numpy(weights.astype(np.float32)),
        seen=torch.from_numpy(seen.astype(bool)),
        timesteps=None if timesteps is None else torch.from_numpy(timesteps.astype(np.float32)),
        divisor=torch.tensor(divisor, dtype=torch.float32),
        target_rows=None if target_rows is None else torch.from_numpy(target_rows.astype(np.int64)),
    )


def keep_rows(text: Text, rows: np.ndarray) -> Packed:
    """The encoder's batch when only ``rows`` [T] bool are left: the others are absent, positions stay."""
    lengths = np.bincount(text.sequence[rows], minlength=len(text.lengths)).astype(np.int64)
    return pack_flat(text.ids[rows], text.positions[rows], lengths, text.extents)


def hide_rows(text: Text, is_hidden: np.ndarray, tokens: SpecialTokens, hidden: str) -> Packed:
    """The encoder's batch when ``is_hidden`` [T] is kept from it: absent ("drop"), or [MASK] in its place ("mask")."""
    if hidden == "drop":
        return keep_rows(text, ~is_hidden)
    ids = np.where(is_hidden, tokens.mask_id, text.ids)
    return pack_flat(ids, text.positions, text.lengths, text.extents)


def check_option(name: str, value: object, expected: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
