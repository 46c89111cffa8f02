"""Vectors of texts of any length, and of the stretches that their concepts stand for.

B texts, n queries, N tokens of one text, C concepts, d width of a vector.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...models.config import ConceptConfig
from ...models.layers import ResidualLinear
from ...models.packing import Packed, pack
from ...models.shares import share_bounds
from ..data.teacher import fingerprint_of
from ..errors import InputError
from ..model_folder import find, kind_of, of_run
from ..precision import reads_mixed
from ..saved_model import load_model, load_vocabulary

BATCH_ROWS = 16384  # tokens and concepts of one forward pass, unless one text alone has more
WINDOW_CHARS = 1 << 20  # of texts that are sorted by length together; bounds the memory


class Reading(NamedTuple):
    """What a text becomes."""

    vector: np.ndarray  # [d] float32 of norm 1; 0 of a text without a token
    concepts: np.ndarray  # [C, d] float32 of norm 1
    spans: np.ndarray  # [C, 2] int64: the characters begin to end - 1 that each stands for; neighbours may overlap


class ConceptModel:
    """A finished model as a reader of text. Needs no network. On a device with units for bfloat16 a model of some width
    multiplies in it, which changes cosines in the fourth decimal; ``is_mixed = False`` gives float32 everywhere.

        model = ConceptModel.from_pretrained("runs/read/model")
        vectors = model.embed(texts)                  # [B, d]
        concepts, spans = model.concepts(texts)       # [B, C, d], [B, C, 2]
        model.similarity(model.embed_queries(["what is asked"]), concepts)

    Where concepts start from the states of a backbone (``init_queries: state``), all vectors lie in the backbone's own
    space: a concept without its row is a state, and a query is the mean of the backbone's states.
    """

    def __init__(self, folder: Path, device: torch.device | str | None = None) -> None:
        self.folder = folder
        model = load_model(folder)
        self.encoder: nn.Module = getattr(model, "encoder", model)
        if device is not None:
            self.encoder.to(device)
        self.config: ConceptConfig = model.config
        self.vocabulary = load_vocabulary(folder, self.config)
        self.device = next(self.encoder.parameters()).device
        self.has_states = self.config.init_queries == "state"
        if self.has_states and adds_nothing(self.encoder):
            self.encoder.layers = nn.ModuleList()  # as they start: exactly the identity, and a cost
        self.is_mixed = reads_mixed(self.config.hidden_size, self.device.type)

    @classmethod
    def from_pretrained(cls, place: str | Path, device: torch.device | str | None = None) -> "ConceptModel":
        """
        Args:
            place: a folder of this package, a finished run, or a hub id.
            device: by default a GPU, if there is one.

        Raises:
            InputError: there is no such model, or it is of another kind.
        """
        folder = of_run(find(str(place), "--model"))
        kind = kind_of(folder, "--model")
        if kind is None:
            raise InputError(f"--model: {folder}: no config.json; give the folder of a finished model")
        if kind != ConceptConfig.model_type:
            raise InputError(
                f"--model: {folder}: a model of type {kind!r}; conceptron build makes one of this package of it"
            )
        return cls(folder, device)

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @cached_property
    def fingerprint(self) -> str:
        """Of everything in the folder that decides a vector."""
        return fingerprint_of(self.folder)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[B, d] float32 of norm 1: the pooled concepts; 0 for a text without a token."""
        vectors = [reading.vector for reading in self.read(texts)]
        return np.stack(vectors) if vectors else np.zeros((0, self.width), np.float32)

    def concepts(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Concepts [B, C, d] float32 of norm 1, and the characters [B, C, 2] int64 that each stands for."""
        found, C = list(self.read(texts)), self.config.num_concepts
        if not found:
            return np.zeros((0, C, self.width), np.float32), np.zeros((0, C, 2), np.int64)
        return np.stack([reading.concepts for reading in found]), np.stack([reading.spans for reading in found])

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """[n, d] float32 of norm 1, in the space of the concepts: by the backbone alone, where its states are that
        space, which costs no concept; else as ``embed`` has it."""
        if not self.has_states:
            return self.embed(texts)
        batch = pack(self.vocabulary.encode(list(texts)))
        means = batch.input_ids.new_zeros((batch.num_sequences, self.width), dtype=torch.float32)
        with torch.inference_mode(), self.autocast():
            states = self.encoder.backbone(batch.to(self.device)).float().cpu()
        means.index_add_(0, batch.sequence_ids(), states)  # of norm 1 in the end: a sum is as good as a mean
        return unit(means.numpy())

    @staticmethod
    def similarity(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """[n, B] float32: cosines of [n, d] with [B, d]; with concepts [B, C, d] the largest of each text (MaxSim).

        Raises:
            ValueError: a shape does not fit.
        """
        if queries.ndim != 2 or documents.ndim not in (2, 3) or queries.shape[-1] != documents.shape[-1]:
            shapes = f"{list(queries.shape)} and {list(documents.shape)}"
            raise ValueError(f"documents: expected [n, d] and [B, d] or [B, C, d], got {shapes}")
        cosines = unit(queries) @ unit(documents).reshape(-1, documents.shape[-1]).T
        return cosines if documents.ndim == 2 else cosines.reshape(len(queries), *documents.shape[:2]).max(-1)

    def read(
        self, texts: Sequence[str], tokens_per_concept: int | None = None,
        progress: Callable[[int], object] = lambda _: None,
    ) -> Iterator[Reading]:  # fmt: skip
        """Readings in the order of the texts.

        Args:
            tokens_per_concept: short texts get fewer concepts than the model has: powers of two, so that there is one
                for at least so many tokens. A text's reading never depends on the others.
            progress: is told of the characters that were read, batch by batch.
        """
        texts = iter(texts)
        while part := take_chars(texts, WINDOW_CHARS):
            yield from self.read_window(part, tokens_per_concept, progress)

    def read_window(
        self, texts: list[str], tokens_per_concept: int | None, progress: Callable[[int], object]
    ) -> list[Reading]:
        encoded = self.vocabulary.plain.encode_batch(texts, add_special_tokens=False)
        lengths = np.array([len(each.ids) for each in encoded], dtype=np.int64)
        counts = np.array([self.num_concepts(int(N), tokens_per_concept) for N in lengths])
        made: list[Reading | None] = [None] * len(texts)
        for members in batches(lengths, counts):
            C = int(counts[members[0]])
            vectors, concepts = self.forward(pack([encoded[i].ids for i in members]), C)
            for i, vector, rows in zip(members, vectors, concepts, strict=True):
                is_empty = lengths[i] == 0
                made[i] = Reading(vector * (not is_empty), rows * (not is_empty), spans_of(encoded[i].offsets, C))
            progress(sum(len(texts[i]) for i in members))
        return made

    def num_concepts(self, num_tokens: int, tokens_per_concept: int | None) -> int:
        most = self.config.num_concepts
        if tokens_per_concept is None:
            return most
        wanted = max(1, -(-num_tokens // tokens_per_concept))
        return min(most, 1 << (wanted - 1).bit_length())

    @torch.inference_mode()
    def forward(self, packed: Packed, num_concepts: int) -> tuple[np.ndarray, np.ndarray]:
        """Vectors [B, d] and concepts [B, C, d] of norm 1."""
        with self.autocast():
            encoded = self.encoder(packed=packed.to(self.device), num_concepts=num_concepts)
            rows: Tensor = encoded.last_hidden_state
            rows = self.encoder.as_states(rows) if self.has_states else rows
        return unit(encoded.pooler_output.float().cpu().numpy()), unit(rows.float().cpu().numpy())

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_mixed)


def adds_nothing(encoder: nn.Module) -> bool:
    """Whether the layers of an encoder write zero to its concepts, as untrained ones with init_queries = state do."""
    if encoder.config.layer_kind != "cross" or encoder.config.tie_layers:
        return False
    writes = [module.weight for module in encoder.layers.modules() if isinstance(module, ResidualLinear)]
    return not any(bool(weight.any()) for weight in writes)


def take_chars(texts: Iterator[str], limit: int) -> list[str]:
    """The next texts, until they have so many characters; at least one, if there is any."""
    taken, chars = [], 0
    for text in texts:
        taken.append(text)
        chars += len(text)
        if chars >= limit:
            break
    return taken


def batches(lengths: np.ndarray, counts: np.ndarray) -> Iterator[np.ndarray]:
    """Numbers of texts that are read at once: of as many concepts and about one length, ``BATCH_ROWS`` of both."""
    batch: list[int] = []
    used = 0
    for i in np.lexsort((lengths, counts)):
        rows = int(lengths[i] + counts[i])
        if batch and (counts[i] != counts[batch[0]] or used + rows > BATCH_ROWS):
            yield np.array(batch)
            batch, used = [], 0
        batch.append(int(i))
        used += rows
    if batch:
        yield np.array(batch)


def spans_of(offsets: Sequence[tuple[int, int]], num_concepts: int) -> np.ndarray:
    """[C, 2] characters of the tokens that each concept stands for; nothing of a text without tokens."""
    if not offsets:
        return np.zeros((num_concepts, 2), np.int64)
    edges = np.array(offsets, dtype=np.int64)
    bounds = share_bounds(len(offsets), num_concepts)
    return np.stack((edges[bounds[:, 0], 0], edges[bounds[:, 1] - 1, 1]), axis=1)


def unit(vectors: np.ndarray) -> np.ndarray:
    """[..., d] float32 of norm 1; 0 stays 0."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)
