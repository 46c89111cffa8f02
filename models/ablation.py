"""What a score owes to the concepts: take them away, or give every text those of another, and measure again.

B texts, C concepts, d model width.
"""

import torch

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
    if ablate == "zero":
        return ConceptEncoderOutput(torch.zeros_like(encoded.last_hidden_state), encoded.anchors)
    if ablate != "shuffle":
        raise ValueError(f"ablate: expected 'zero', 'shuffle' or None, got {ablate!r}")
    num_texts = encoded.last_hidden_state.shape[0]
    if num_texts == step:
        raise ValueError("ablate: 'shuffle' needs two texts in a batch or more, so that none keeps its own; got 1")
    return ConceptEncoderOutput(encoded.last_hidden_state.roll(step, 0), encoded.anchors.roll(step, 0))
