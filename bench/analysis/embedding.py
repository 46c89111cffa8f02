"""Vectors of texts and of their parts, by a model of this package or by any sentence encoder.

n texts, P parts of a text, C concepts, e width of a vector.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ...engine.data.teacher import Teacher
from ...engine.errors import InputError
from ...engine.model_folder import kind_of, of_run
from ...engine.precision import reads_mixed
from ...engine.saved_model import load_model, load_vocabulary
from ...models.backbone import cut
from ...models.config import ConceptConfig
from ...models.objectives.distill import stretch_bounds
from ...models.packing import pack

BATCH_TOKENS = 8192


class Parts(NamedTuple):
    """What a text is searched by."""

    vectors: np.ndarray  # [P, e] float32
    spans: np.ndarray  # [P, 2] int64: the characters that each stands for
    starts: np.ndarray  # [N] int64: the first characters of the text's tokens
    windows: "Parts | None" = None  # of a model on a backbone: what that makes of each of its windows, averaged


class ConceptEmbedder:
    """The mean of the concepts for a text, each concept for the tokens around its anchor."""

    def __init__(self, folder: Path) -> None:
        self.model = load_model(folder)
        self.encoder: nn.Module = getattr(self.model, "encoder", self.model)
        self.config = self.model.config
        self.vocabulary = load_vocabulary(folder, self.config)
        self.distilled_from = getattr(self.config, "distilled_from", None)
        self.backbone = (self.config.backbone or {}).get("name")
        self.num_parts = self.config.num_concepts
        self.device, self.folder = next(self.encoder.parameters()).device, folder
        self.is_mixed = reads_mixed(self.config.hidden_size, self.device.type)  # of long texts, as `conceptron embed`

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[n, e] float32 of norm 1."""
        concepts = self.concepts(self.vocabulary.encode(list(texts)), as_meanings=True)
        return directions(concepts.mean(1))

    def parts(self, texts: Sequence[str]) -> list[Parts]:
        return [self.parts_of(text) for text in texts]  # one at a time: they are long

    @torch.inference_mode()
    def parts_of(self, text: str) -> Parts:
        ids, offsets = self.tokens(text)
        batch, windows = pack([np.array(ids, dtype=np.int64)]).to(self.device), None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_mixed):
            if self.encoder.backbone is not None:
                batch = batch._replace(states=self.encoder.backbone(batch))
                windows = self.windows_of(batch.states, offsets)
            concepts = self.encoder(packed=batch).last_hidden_state
        (vectors,) = self.encoder.meanings(concepts).float().cpu().numpy()
        spans = [span_of(offsets, *bounds) for bounds in stretch_bounds(len(ids), len(vectors))]
        return Parts(vectors, np.array(spans), starts_of(offsets), windows)

    def windows_of(self, states: torch.Tensor, offsets: Sequence[tuple[int, int]]) -> Parts:
        backbone = self.encoder.backbone
        edges = cut(np.array([len(states)]), backbone.capacity, backbone.overlap)
        bounds = list(zip(edges.first.tolist(), edges.end.tolist(), strict=True))
        vectors = [states[begin:end].mean(0).float().cpu().numpy() for begin, end in bounds]
        return Parts(np.stack(vectors), np.array([span_of(offsets, *each) for each in bounds]), starts_of(offsets))

    def tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and the characters of each."""
        encoding = self.vocabulary.plain.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    @torch.inference_mode()
    def concepts(self, texts: Sequence[Sequence[int]], as_meanings: bool = False) -> np.ndarray:
        """[n, C, e] float32 of token ids; ``as_meanings``: as they compare with vectors of other texts."""
        order = np.argsort([len(ids) for ids in texts], kind="stable")
        batch_of = np.cumsum([len(texts[i]) for i in order]) // BATCH_TOKENS
        made: list[Any] = [None] * len(texts)
        for number in np.unique(batch_of):
            members = order[batch_of == number]
            batch = pack([np.array(texts[i], dtype=np.int64) for i in members]).to(self.device)
            found = self.encoder(packed=batch).last_hidden_state
            found = self.encoder.meanings(found) if as_meanings else found
            for i, concepts in zip(members, found.float().cpu().numpy(), strict=True):
                made[i] = concepts
        return np.stack(made)


class SentenceEmbedder:
    """A sentence encoder: a text's own vector, and one for each window that it reads at once."""

    distilled_from = backbone = None

    def __init__(self, place: str) -> None:
        self.teacher = Teacher(place)
        self.num_parts = None  # as many as a text has windows

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return self.teacher.embed(texts)

    def parts(self, texts: Sequence[str]) -> list[Parts]:
        found = []
        for text in texts:
            _, offsets = self.tokens(text)
            count = max(1, -(-len(offsets) // self.teacher.max_tokens))
            spans = [span_of(offsets, *bounds) for bounds in stretch_bounds(len(offsets), count)]
            vectors = self.teacher.embed([text[begin:end] for begin, end in spans])
            found.append(Parts(vectors, np.array(spans), starts_of(offsets)))
        return found

    def tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and the characters of each."""
        encoding = self.teacher.tokenizer(
            text, add_special_tokens=False, truncation=False, padding=False, return_offsets_mapping=True, verbose=False
        )  # fmt: skip
        return encoding.input_ids, encoding.offset_mapping


def first_tokens(model: ConceptEmbedder | SentenceEmbedder, text: str, count: int) -> str:
    """The text up to the end of so many tokens."""
    _, offsets = model.tokens(text)
    return text[: offsets[count - 1][1]] if len(offsets) >= count else text


def open_embedder(place: str) -> ConceptEmbedder | SentenceEmbedder:
    """
    Raises:
        InputError: the folder has no config.json, or is a run that has not finished.
    """
    folder = of_run(Path(place).expanduser())
    if folder.exists():
        kind = kind_of(folder)
        if kind is None:
            raise InputError(f"{folder}: expected a model folder, there is no config.json")
        if kind == ConceptConfig.model_type:
            return ConceptEmbedder(folder)
    return SentenceEmbedder(str(place))


def directions(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def starts_of(offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """[N] int64."""
    return np.array([begin for begin, _ in offsets], dtype=np.int64)


def span_of(offsets: Sequence[tuple[int, int]], begin: int, end: int) -> tuple[int, int]:
    """The characters of tokens begin to end - 1; empty, where the next token would begin, if there is none."""
    if begin == end:
        place = offsets[begin][0] if begin < len(offsets) else (offsets[-1][1] if offsets else 0)
        return place, place
    return offsets[begin][0], offsets[end - 1][1]
