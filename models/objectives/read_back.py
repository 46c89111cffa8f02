"""Text read back from its concepts: the words of some of its tokens, and what a backbone made of these.

B texts, T packed tokens, M tokens that are asked for, d model width, e width of a backbone's state.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..packing import Packed, sequence_ids
from ..ranges import at_least, check, portion, positive
from .view import SampleKey, SpecialTokens, View, build_view, clean_text, per_sequence

CHOICE = 0  # stream of a key


@dataclass(frozen=True)
class ReadBack:
    """The encoder reads the whole text; a share of its tokens is asked for, by their places alone.

        loss = words * mean of -ln p(word)  +  states * mean of |s^ - s|^2 / e            both over the M tokens

    s is the state that a frozen backbone gave to the token, centred and of mean square 1 over the text on which that
    was measured; those of short texts lie farther out (``StateReader``). Every target is *seen*: it is copied through
    C concepts, and only the same decoder on no concepts, or on those of another text, tells what they hold.
    """

    probability: float = portion(0.15)
    words: float = positive(1.0)
    states: float = at_least(0, 0.0)

    def __post_init__(self):
        check(self)

    def view(self, batch: Packed, keys: Sequence[SampleKey], tokens: SpecialTokens) -> View:
        """A pure function of its arguments; what is asked of a sequence depends on its own key only."""
        text = clean_text(batch, keys, tokens)
        draws = per_sequence(text, keys, CHOICE, np.random.Generator.random)
        rows = np.flatnonzero(text.maskable & (draws < self.probability))
        return build_view(
            encoder=batch, text=text, rows=rows, decoder_ids=np.full(len(rows), tokens.mask_id),
            weights=np.full(len(rows), self.words), seen=np.ones(len(rows)), timesteps=None, divisor=float(len(rows)),
        )  # fmt: skip

    def evaluation_views(self, batch: Packed, keys: Sequence[SampleKey], tokens: SpecialTokens) -> dict[str, View]:
        return {"read_back": self.view(batch, keys, tokens)}


class StateReader(nn.Module):
    """A linear map from the decoder's rows to a backbone's states; it stays behind when training is over."""

    def __init__(self, options: ReadBack, width: int, state_width: int):
        super().__init__()
        self.options = options
        self.project = nn.Linear(width, state_width)
        nn.init.zeros_(self.project.weight)  # begins at the mean of all states
        nn.init.zeros_(self.project.bias)

    def errors(self, rows_Md: Tensor, view: View, centred_Te: Tensor) -> Tensor:
        """[M] float32, the mean squared error of each asked token's state.

        Args:
            rows_Md: the decoder's, of the view's targets.
            centred_Te: of the tokens that the encoder reads, which are whole texts.
        """
        owner_M = sequence_ids(view.decoder_cu_seqlens, len(rows_Md))
        tokens_M = view.encoder.cu_seqlens.long()[owner_M] + view.decoder_position_ids
        gaps_Me = self.project(rows_Md).float() - centred_Te[tokens_M].detach().float()
        return gaps_Me.square().mean(-1)

    def forward(self, rows_Md: Tensor, view: View, centred_Te: Tensor, divisor: Tensor) -> Tensor:
        """The mean over a step's targets, 0-d, without ``states``; ``divisor``: as for the words."""
        return self.errors(rows_Md, view, centred_Te).sum() / torch.where(divisor > 0, divisor, 1.0)
