"""Generation across the bottleneck: the encoder reads one part of a text, the decoder denoises the rest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..packing import Packed, pack_flat, positions_within
from ..ranges import check, one_of, portion, switch, within
from .diffusion import CHOICE, EVALUATION_TIMES, WEIGHTINGS, Diffusion
from .view import (
    SampleKey,
    SpecialTokens,
    Text,
    View,
    build_view,
    check_option,
    clean_text,
    keep_rows,
    low_discrepancy_t,
    per_sequence,
)  # fmt: skip

SPLIT = 1  # stream of a key, beside diffusion's
DIRECTIONS = ("forward", "backward", "infill")
MIXED_TIMES = (0.5, 1.0)  # of each direction


@dataclass(frozen=True)
class PrefixDiffusion:
    """The encoder reads n of the N tokens as they are; the others are hidden with t and asked for, as in ``Diffusion``.

    n is drawn evenly from the whole numbers in [``shortest`` * N, ``longest`` * N] (if there is none, it is the nearest
    that leaves something on both sides; a single token is read, and nothing is asked).

    ``direction``: what is read, the first n tokens ("forward"), the last n ("backward"), or the first k and the last
        n - k with k drawn evenly from 1 .. n - 1 ("infill"); "mixed" draws one of the three for each sequence.
    ``positions``:
        "text"      both parts keep the positions of the whole text, and the concepts are anchored over all of it, the
                    missing part included. At generation: a canvas of the whole text, its given part as the source.
        "restart"   each part is counted from 0, and the concepts are anchored over the part that is read. For forward
                    and backward only: otherwise nothing would tell which part is missing.
    ``weighting``, ``eps``, ``t_floor``: as in ``Diffusion``, but with "mdlm" the divisor is the number of tokens of
        the hidden parts that can be hidden: a bound on the NLL of one part given the other.
    ``context``: also give the decoder the tokens of the hidden part that t left visible, as rows that are not asked
        for: for decoders that mix rows. Without it such tokens are known to nobody.

    All targets are *unseen*. Source: Hudson et al. 2023 (SODA), arXiv:2311.17901, for generating a related view through
    a bottleneck; Sahoo et al. 2024 (MDLM), arXiv:2406.07524, for the loss.
    """

    direction: str = one_of(*DIRECTIONS, "mixed")
    shortest: float = within(0.3)
    longest: float = within(0.5)
    positions: str = one_of("text", "restart")
    weighting: str = one_of(*WEIGHTINGS)
    context: bool = switch()
    eps: float = within(1e-3)
    t_floor: float = portion(0.1)

    def __post_init__(self):
        check(self)
        expected = f"a number in [shortest = {self.shortest:g}, 1)"
        check_option("longest", self.longest, expected, self.shortest <= self.longest)
        positions = ("text", "restart") if self.direction in ("forward", "backward") else ("text",)
        expected = f"{' or '.join(map(repr, positions))} with direction {self.direction}"
        check_option("positions", self.positions, expected, self.positions in positions)

    def noise(self) -> Diffusion:
        return Diffusion(weighting=self.weighting, eps=self.eps, t_floor=self.t_floor)

    def view(self, batch: Packed, keys: Sequence[SampleKey], tokens: SpecialTokens) -> View:
        """A pure function of its arguments; the split of a sequence depends on its own key and length only."""
        return self.view_at(low_discrepancy_t(keys, self.eps), batch, keys, tokens)

    def evaluation_views(self, batch: Packed, keys: Sequence[SampleKey], tokens: SpecialTokens) -> dict[str, View]:
        """Fixed times; when directions are mixed, fewer times of each direction by itself."""
        if self.direction != "mixed":
            return {f"t={t:.2f}": self.view_at(np.full(len(keys), t), batch, keys, tokens) for t in EVALUATION_TIMES}
        alone = {name: replace(self, direction=name) for name in DIRECTIONS}
        return {
            f"{name} t={t:.2f}": objective.view_at(np.full(len(keys), t), batch, keys, tokens)
            for name, objective in alone.items()
            for t in MIXED_TIMES
        }

    def view_at(self, t_B: np.ndarray, batch: Packed, keys: Sequence[SampleKey], tokens: SpecialTokens) -> View:
        """The view at given times [B]."""
        text = clean_text(batch, keys, tokens)
        is_read = per_sequence(text, keys, SPLIT, self.split).astype(bool)
        t_T = np.repeat(t_B, text.lengths)
        can_hide = text.maskable & ~is_read
        is_target = can_hide & (per_sequence(text, keys, CHOICE, np.random.Generator.random) < t_T)
        rows = np.flatnonzero(is_target)
        weights, divisor = self.noise().weights(t_T[rows], int(can_hide.sum()))
        return build_view(
            encoder=self.encoder(text, is_read), text=self.placed(text, is_read), rows=rows,
            decoder_ids=np.full(len(rows), tokens.mask_id), weights=weights, seen=np.zeros(len(rows), dtype=bool),
            timesteps=t_B, divisor=divisor, context=~is_read & ~is_target if self.context else None,
        )  # fmt: skip

    def split(self, g: np.random.Generator, num_tokens: int) -> np.ndarray:
        """[N] bool: which tokens of a sequence the encoder reads."""
        is_read = np.ones(num_tokens, dtype=bool)
        if num_tokens < 2:
            return is_read
        # 1e-9: a tenth of 30 tokens is 3, in floating point a little more
        low, high = math.ceil(self.shortest * num_tokens - 1e-9), math.floor(self.longest * num_tokens + 1e-9)
        if low > high:
            low = high = min(max(round((self.shortest + self.longest) / 2 * num_tokens), 1), num_tokens - 1)
        num_read = int(g.integers(low, high + 1))
        direction = DIRECTIONS[g.integers(3)] if self.direction == "mixed" else self.direction
        before = {"forward": num_read, "backward": 0, "infill": int(g.integers(1, max(num_read, 2)))}[direction]
        is_read[before : before + num_tokens - num_read] = False
        return is_read

    def encoder(self, text: Text, is_read: np.ndarray) -> Packed:
        packed = keep_rows(text, is_read)
        if self.positions == "text":
            return packed
        lengths = np.diff(packed.cu_seqlens.numpy()).astype(np.int64)
        return pack_flat(text.ids[is_read], positions_within(lengths), lengths)

    def placed(self, text: Text, is_read: np.ndarray) -> Text:
        """The text with the positions that the decoder's rows have."""
        if self.positions == "text":
            return text
        positions = text.positions.copy()
        lengths = np.bincount(text.sequence[~is_read], minlength=len(text.lengths)).astype(np.int64)
        positions[~is_read] = positions_within(lengths)
        return text._replace(positions=positions)
