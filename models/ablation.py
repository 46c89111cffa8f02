"""What a score owes to the concepts: take them away, or give every text those of another, and measure again.

B texts, C concepts, d model width.
"""

import torch
from torch import Tensor

from .encoder import ConceptEncoderOutput


def ablated(encoded: ConceptEncoderOutput, ablate: str | None, step: int = 1) -> ConceptEncoderOutput:
    """The concepts [B, C, d] as an ablation leaves them; ``None`` leaves them alone.

    "zero"     all concepts are zero.
    "shuffle"  text b gets the concepts of text b - step, and where they stand; the first gets those of the last. What
               is not read from concepts (queries that know their token, positions) stays the text's own.

    Args:
        step: texts that belong together and move together, such as the choices of one question.

    Raises:
        ValueError: another ``ablate``, or a batch in which a text would keep its own concepts.
    """
    if ablate is None:
        return encoded
    if ablate not in ("zero", "shuffle"):
        raise ValueError(f"ablate: expected 'zero', 'shuffle' or None, got {ablate!r}")
    if ablate == "shuffle" and encoded.last_hidden_state.shape[0] == step:
        raise ValueError("ablate: 'shuffle' needs two texts in a batch (two questions, for choices) or more, got 1")

    def other(x: Tensor) -> Tensor:
        return torch.zeros_like(x) if ablate == "zero" else x.roll(step, 0)

    return ConceptEncoderOutput(
        last_hidden_state=other(encoded.last_hidden_state),
        anchors=encoded.anchors if ablate == "zero" else other(encoded.anchors),
        hidden_states=None if encoded.hidden_states is None else tuple(map(other, encoded.hidden_states)),
    )
