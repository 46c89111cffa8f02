"""The phrases of the training text, for masked language modelling that hides them as a whole; counted once."""

from pathlib import Path
from typing import Any

import numpy as np

from ...models.objectives import pmi
from ..recipe.data import DataRecipe
from .cache import built, cache_folder, fingerprint, say
from .corpus import open_corpus
from .order import raw

MOST_TOKENS = 20_000_000  # of the text that is counted; 3 GB of memory


def open_phrases(data: DataRecipe) -> Path:
    """The list that `pmi.build` makes of the training text, in the data cache: a file for `Masking.phrases`.

    Of a larger text it is an even sample of windows of `MOST_TOKENS` in all.

    Raises:
        InputError: the text cannot be read, or the cache not be written.
    """
    corpus = open_corpus(data)
    windows = corpus.train
    order = np.argsort(raw(0, len(windows)), kind="stable")
    rows = np.sort(order[: np.searchsorted(np.cumsum(windows.lengths[order], dtype=np.int64), MOST_TOKENS) + 1])
    identity = [pmi.FORMAT, corpus.description["tokenizer"]["id"], MOST_TOKENS, fingerprint(windows.lengths.tolist())]
    folder = cache_folder(data.cache) / f"phrases-{fingerprint(identity)}"

    def build(unfinished: Path) -> dict[str, Any]:
        say(f"counting phrases in {int(windows.lengths[rows].sum()) / 1e6:.1f} M tokens")
        phrases = pmi.build([windows[row] for row in rows], corpus.tokens)
        pmi.save(phrases, unfinished / "phrases.json")
        return {"num_phrases": len(phrases.ids)}

    built(folder, build)
    return folder / "phrases.json"
