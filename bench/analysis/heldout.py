"""What a trained model makes of text that it was not trained on: loss, concepts, filled gaps."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...engine.data.loader import Loader
from ...engine.data.windows import Windows, unigram_entropy
from ...engine.jobs.evaluation import evaluate
from ...engine.launching.launch import World
from ...models.generation.canvas import fill
from ...models.generation.sampling import Sampling
from ...models.masked_lm import ConceptForMaskedLM
from ...models.objectives.view import SpecialTokens
from ...models.packing import pack

MAX_CONCEPT_TEXTS = 256
MAX_TRAIN_TOKENS = 4_000_000  # of the training text, for its unigram
NUM_SAMPLES, MIN_SAMPLE_TOKENS, MAX_SAMPLE_TOKENS = 3, 64, 96


@dataclass(frozen=True)
class Losses:
    """Nats per token on held-out text; None where the objective has no such targets."""

    heldout_nll: float | None  # of tokens that the encoder did not see
    heldout_nll_seen: float | None  # of tokens that it saw: copying, never to be held against an entropy
    objective_loss: float
    nll_by_view: dict[str, float]
    nll_of_other_concepts: float | None  # the same targets, each text decoded from the concepts of another text
    num_targets: int
    num_unseen: int
    num_tokens: int  # of the text read
    num_windows: int
    unigram_entropy: float  # of the tokens of this very text: the best that any guess without the text can do
    train_unigram: float | None  # cross entropy of the training text's token frequencies on it: an honest guess

    @property
    def is_seen(self) -> bool:
        return self.heldout_nll is None


def losses(model: nn.Module, loader: Loader, train: Windows | None, max_tokens: int) -> Losses:
    """Evaluates ``model`` as training does: same text, same fixed corruption, no label smoothing."""
    device = next(model.parameters()).device
    windows, tokens, rows = loader.windows, loader.tokens, loader.evaluation_rows(max_tokens)
    found = evaluate(model, loader, max_tokens, World(rank=0, local_rank=0, size=1, device=device), of_others=True)
    model.eval()
    return Losses(
        heldout_nll=found["nll_unseen"],
        heldout_nll_seen=found["nll_seen"],
        objective_loss=found["loss"],
        nll_by_view=found["nll_by_t"],
        nll_of_other_concepts=found["nll_of_others"],
        num_targets=found["num_targets"],
        num_unseen=found["num_unseen"],
        num_tokens=int(windows.lengths[rows].sum()),
        num_windows=len(rows),
        unigram_entropy=unigram_entropy(windows, rows, tokens.special_ids),
        train_unigram=None if train is None else unigram_cross_entropy(train, windows, rows, tokens),
    )


def unigram_cross_entropy(train: Windows, windows: Windows, rows: Sequence[int], tokens: SpecialTokens) -> float:
    """Nats per token of ``windows[rows]`` under the token frequencies of ``train``, one added to each count.

    Special tokens are not counted. At most 4 M training tokens are read, from windows spread over all of them.
    """
    step = max(1, -(-train.num_tokens // MAX_TRAIN_TOKENS))
    counts = 1.0 + count_tokens(train, range(0, len(train), step), tokens)
    wanted = count_tokens(windows, rows, tokens)
    counts[list(tokens.special_ids)] = 0
    wanted[list(tokens.special_ids)] = 0
    used = wanted > 0
    return float(-(wanted[used] * np.log(counts[used] / counts.sum())).sum() / wanted.sum())


def count_tokens(windows: Windows, rows: Sequence[int], tokens: SpecialTokens) -> np.ndarray:
    """[V] occurrences of each token."""
    counts = np.zeros(tokens.vocab_size, dtype=np.int64)
    for row in rows:
        counts += np.bincount(windows[int(row)], minlength=tokens.vocab_size)
    return counts


class Concepts(NamedTuple):
    values: Tensor  # [B, C, d]
    shortest: int  # tokens of the shortest text
    longest: int


def concepts(encoder: nn.Module, loader: Loader, max_texts: int = MAX_CONCEPT_TEXTS) -> Concepts:
    """The concepts of whole held-out windows, without anything hidden.

    Windows of fewer tokens than there are concepts leave some concepts nothing of their own to read, so they are used
    only when there are fewer than 32 longer ones.
    """
    windows = loader.windows
    rows = loader.evaluation_rows(windows.num_tokens)  # all of them, in a fixed order
    long_enough = rows[windows.lengths[rows] >= encoder.config.num_concepts]
    rows = (long_enough if len(long_enough) >= 32 else rows)[:max_texts]
    lengths = windows.lengths[rows]
    values = encode(encoder, [windows[int(row)] for row in rows], loader.micro_tokens)
    return Concepts(values, int(lengths.min()), int(lengths.max()))


@torch.no_grad()
def encode(encoder: nn.Module, texts: Sequence[np.ndarray], batch_tokens: int) -> Tensor:
    """The concepts [B, C, d] of whole texts, float32 on the CPU; about ``batch_tokens`` tokens are read at a time."""
    device = next(encoder.parameters()).device
    encoder.eval()
    batch_of = np.cumsum([len(ids) for ids in texts]) // batch_tokens
    parts = []
    for number in np.unique(batch_of):
        batch = pack([texts[i] for i in np.flatnonzero(batch_of == number)])
        parts.append(encoder(packed=batch.to(device)).last_hidden_state.float().cpu())
    return torch.cat(parts)


# --- samples ----------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """A held-out text, what of it was hidden, and what the model wrote there. Hidden parts stand in guillemets."""

    source: str
    hidden: str
    filled: str
    num_tokens: int
    num_hidden: int
    num_right: int  # tokens that are those of the source
    how: str


def samples(model: ConceptForMaskedLM, loader: Loader, tokenizer: Any, from_concepts: bool) -> list[Sample]:
    """Three held-out texts of at most 96 tokens, filled by taking the most probable tokens, the surest first.

    ``from_concepts``: the encoder reads the whole text, and all of it is written again from its concepts (the only
    thing that a model trained on copying can do). Else a sixth of each text is hidden, in runs of whole words.
    """
    rows = loader.evaluation_rows(loader.windows.num_tokens)
    long_enough = rows[loader.windows.lengths[rows] >= MIN_SAMPLE_TOKENS]
    if len(long_enough) < NUM_SAMPLES:
        long_enough = rows[np.argsort(-loader.windows.lengths[rows], kind="stable")]
    return [
        sample(model, loader.windows[int(row)], loader.tokens, tokenizer, from_concepts, number)
        for number, row in enumerate(long_enough[:NUM_SAMPLES])
    ]


def sample(
    model: ConceptForMaskedLM, ids: np.ndarray, tokens: SpecialTokens, tokenizer: Any, from_concepts: bool, seed: int,
) -> Sample:  # fmt: skip
    pieces = [tokenizer.decode([int(i)], clean_up_tokenization_spaces=False) for i in ids]
    first = next((i + 1 for i, piece in enumerate(pieces[:32]) if "\n" in piece), 0)  # not in the middle of a line
    pieces, ids = pieces[first : first + MAX_SAMPLE_TOKENS], ids[first : first + MAX_SAMPLE_TOKENS]
    is_hidden = ~np.isin(ids, list(tokens.special_ids))
    if not from_concepts:
        is_hidden &= hidden_words(pieces, np.random.Generator(np.random.Philox(seed)))
    sampling = Sampling(steps=16, temperature=0.0)
    source = pack([ids]) if from_concepts else None
    filled = fill(model, pack([np.where(is_hidden, tokens.mask_id, ids)]), tokens, sampling, source)
    written = filled.input_ids.cpu().numpy()
    return Sample(
        source=marked(ids, is_hidden, tokenizer, between=not from_concepts),
        hidden=marked(ids, is_hidden, tokenizer, blank="__"),
        filled=marked(written, is_hidden, tokenizer, between=not from_concepts),
        num_tokens=len(ids),
        num_hidden=int(is_hidden.sum()),
        num_right=int((written == ids)[is_hidden].sum()),
        how=(
            "The encoder read the whole text; every token of it was written again from its concepts alone."
            if from_concepts else
            "The encoder read the text without the hidden words; each __ is one hidden token."
        ),
    )  # fmt: skip


def hidden_words(pieces: Sequence[str], generator: np.random.Generator) -> np.ndarray:
    """[N] bool: runs of one or two words, about a sixth of the tokens.

    A word begins at a piece with a space before it, ends before the next one, lies in one line and has at most four
    pieces. In a text without such words every piece counts as one.
    """
    begins = [i for i, piece in enumerate(pieces) if piece[:1].isspace()] + [len(pieces)]
    words = [(start, stop) for start, stop in pairwise(begins) if is_word(pieces[start:stop])]
    words = words if len(words) > 3 else [(i, i + 1) for i in range(len(pieces))]
    is_hidden = np.zeros(len(pieces), dtype=bool)
    for k in generator.permutation(len(words)):
        if is_hidden.sum() >= len(pieces) // 6:
            break
        for start, stop in words[k : k + int(generator.integers(1, 3))]:
            is_hidden[start:stop] = True
    return is_hidden


def is_word(pieces: Sequence[str]) -> bool:
    text = "".join(pieces)
    return len(pieces) <= 4 and text[:1] == " " and text.isprintable() and any(letter.isalpha() for letter in text)


def marked(ids: np.ndarray, is_hidden: np.ndarray, tokenizer: Any, *, between: bool = False, blank: str = "") -> str:
    """The text, its hidden runs in guillemets (``between``, line ends shown) or each of their tokens as ``blank``."""
    parts = []
    edges = np.flatnonzero(np.diff(is_hidden.astype(int))) + 1
    for run in np.split(np.arange(len(ids)), edges):
        text = tokenizer.decode(ids[run].tolist(), clean_up_tokenization_spaces=False)
        if len(run) and is_hidden[run[0]]:
            body = " ".join([blank] * len(run)) if blank else text.strip(" ").replace("\n", "⏎")
            if blank or between:
                text = " " * text.startswith(" ") + (body if blank else f"«{body}»")
        parts.append(text)
    return "".join(parts)
