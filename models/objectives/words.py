"""Where words begin in packed text."""

import numpy as np

from .view import ENDS_WORD, OPENS_WORD, SpecialTokens, Text


def word_starts(text: Text, tokens: SpecialTokens) -> np.ndarray:
    """[T] bool: does the row begin a word? The first row of a sequence, a special token and what follows it always do.

    A word is a run of letters and digits, with the space before it; a punctuation mark is a word of its own.

    Raises:
        ValueError: the tokenizer does not tell.
    """
    if tokens.word_edges is None:
        raise ValueError(
            "word_edges: expected a table of word boundaries, got None: this tokenizer does not tell where words begin"
        )
    edges = np.frombuffer(tokens.word_edges, dtype=np.uint8)[text.ids]
    starts = ((edges & OPENS_WORD) != 0) | run_starts(text)
    starts[1:] |= (edges[:-1] & ENDS_WORD) != 0
    return starts


def run_starts(text: Text) -> np.ndarray:
    """[T] bool: the first row of a sequence, special tokens and what follows them."""
    starts = ~text.maskable
    starts[1:] |= ~text.maskable[:-1]
    starts[(np.cumsum(text.lengths) - text.lengths)[text.lengths > 0]] = True
    return starts
