"""What reads texts: a concept encoder, any encoder of transformers, and the floors that they are held against.

n texts, P parts of a text, C concepts, e width of a vector.
"""

import functools
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from ...engine.data.cache import cache_folder, fingerprint
from ...engine.data.teacher import Teacher, fingerprint_of
from ...engine.errors import InputError
from ...engine.jobs.peer import load_with_head
from ...engine.labelled.examples import Example
from ...engine.labelled.joint import Input, Joint, read_note
from ...engine.labelled.task import Task
from ...engine.model_folder import find, finished, in_one_line, kind_of
from ...engine.saved_model import load_model, load_vocabulary, quiet
from ...models.config import ConceptConfig
from ...models.encoder import ConceptEncoder
from ...models.objectives.distill import stretch_bounds
from ...models.packing import pack
from ...models.shares import share_means
from ..analysis.embedding import span_of

BATCH_TOKENS = 8192
AT_ONCE = 1024  # sentences that are kept in one file
CONCEPTS = "concepts"  # the names of the readers of one model
BAG, UNTRAINED = "bag of embeddings", "untrained encoder"


class Read(NamedTuple):
    """What is left of a text once it has been read."""

    vectors: np.ndarray  # [P, e] float32: of its parts
    whole: np.ndarray  # [e]
    spans: np.ndarray  # [P, 2] int64: the characters that each part stands for
    seen: int  # tokens that were read, of
    given: int


class Reader(Protocol):
    name: str
    fingerprint: str  # of the weights

    def whole(self, texts: Sequence[str]) -> np.ndarray:
        """[n, e] float32: one vector a text."""

    def parts(self, texts: Sequence[str]) -> list[Read]: ...

    def count(self, texts: Sequence[str]) -> tuple[int, int]:
        """(tokens that are read, tokens of the texts)."""


class Stored:
    """Readings kept in a folder of the cache, named after what reads and how: a file each document, and one a list of
    sentences. A run that was killed goes on from them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.near: dict[str, tuple[np.ndarray, ...]] = {}  # of this process

    def one_by_one(
        self, texts: Sequence[str], make: Callable[[list[str]], list[tuple[np.ndarray, ...]]]
    ) -> list[tuple[np.ndarray, ...]]:
        """What ``make`` makes of every text, each made once."""
        names = [name_of(text) for text in texts]
        todo = {name: text for name, text in zip(names, texts, strict=True) if not self.load(name)}
        order = sorted(todo, key=lambda name: len(todo[name]))
        for start, stop in batches([len(todo[name]) // 4 for name in order]):
            group = order[start:stop]
            for name, made in zip(group, make([todo[name] for name in group]), strict=True):
                self.save(name, made)
        return [self.near[name] for name in names]

    def at_once(self, texts: Sequence[str], make: Callable[[list[str]], np.ndarray]) -> np.ndarray:
        """What ``make`` makes of all texts, in files of AT_ONCE."""
        found = []
        for start in range(0, len(texts), AT_ONCE):
            some = list(texts[start : start + AT_ONCE])
            name = name_of("\0".join(some))
            if not self.load(name):
                self.save(name, (make(some),))
            found.append(self.near[name][0])
        return np.concatenate(found)

    def load(self, name: str) -> bool:
        path = self.folder / f"{name}.npz"
        if name not in self.near and path.is_file():
            with np.load(path, allow_pickle=False) as arrays:
                self.near[name] = tuple(arrays[key] for key in sorted(arrays.files))
        return name in self.near

    def save(self, name: str, made: tuple[np.ndarray, ...]) -> None:
        self.near[name] = made
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f".{name}.npz"
        with unfinished.open("wb") as file:
            np.savez(file, **{f"a{i}": array for i, array in enumerate(made)})
        unfinished.replace(self.folder / f"{name}.npz")


def name_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def batches(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(first, end) of runs of about BATCH_TOKENS."""
    bounds, first, total = [], 0, 0
    for i, length in enumerate(lengths):
        if i > first and total + length > BATCH_TOKENS:
            bounds.append((first, i))
            first, total = i, 0
        total += length
    return [*bounds, (first, len(lengths))] if len(lengths) else bounds


class ConceptReader:
    """A model of this package: its concepts as parts, and its pooled vector.

    Concepts that start from a backbone's states are brought back among these, without their rows.

    Args:
        kind: CONCEPTS; BAG: the means of the same stretches of bare token embeddings; UNTRAINED: the same architecture
            with weights as they are drawn.
        piece: a longer text is cut into equal pieces of at most so many tokens, whose concepts are put one after the
            other; None: read at once.
        concepts: of a question or a sentence, of which only the pooled vector is asked; None: as many as of a document.
    """

    def __init__(
        self, folder: Path, kind: str = CONCEPTS, piece: int | None = None, cache: str | None = None,
        concepts: int | None = None,
    ) -> None:  # fmt: skip
        self.name, self.kind, self.piece, self.concepts = kind, kind, piece, concepts
        model = load_model(folder)
        self.model, self.encoder = model, getattr(model, "encoder", model)
        self.config, self.vocabulary = model.config, load_vocabulary(folder, model.config)
        if kind == UNTRAINED:
            device = next(self.encoder.parameters()).device
            torch.manual_seed(0)
            self.encoder = ConceptEncoder(self.config).to(device).eval()
        if kind != CONCEPTS:
            self.config = ConceptConfig.from_dict({**self.config.to_dict(), "task": None})  # the head is not theirs
        self.fingerprint = fingerprint_of(folder)
        key = fingerprint([self.fingerprint, kind, piece])
        self.stored = Stored(cache_folder(cache) / f"downstream-{key}")
        key = fingerprint([self.fingerprint, kind, piece, *([concepts] if concepts else [])])
        self.pooled = Stored(cache_folder(cache) / f"downstream-{key}")

    def count(self, texts: Sequence[str]) -> tuple[int, int]:
        given = sum(len(ids) for ids in self.vocabulary.encode(list(texts)))
        return given, given

    def whole(self, texts: Sequence[str]) -> np.ndarray:
        return self.pooled.at_once(texts, self.read_whole)

    def parts(self, texts: Sequence[str]) -> list[Read]:
        made = self.stored.one_by_one(texts, self.read_parts)
        return [Read(vectors.astype(np.float32), whole, spans, int(given), int(given))
                for vectors, whole, spans, given in made]  # fmt: skip

    def read_whole(self, texts: list[str]) -> np.ndarray:
        return np.stack(self.read(self.vocabulary.encode(texts), with_parts=False)[1])

    def read_parts(self, texts: list[str]) -> list[tuple[np.ndarray, ...]]:
        encodings = [self.vocabulary.plain.encode(text, add_special_tokens=False) for text in texts]
        cut, owners = [], []
        for number, encoding in enumerate(encodings):
            num = max(1, -(-len(encoding.ids) // self.piece)) if self.piece else 1
            for begin, end in stretch_bounds(len(encoding.ids), num):
                cut.append(encoding.ids[begin:end])
                owners.append((number, begin))
        vectors, pooled = self.read(cut)
        made = []
        for number, encoding in enumerate(encodings):
            mine = [i for i, (owner, _) in enumerate(owners) if owner == number]
            spans = [span_of(encoding.offsets, owners[i][1] + begin, owners[i][1] + end)
                     for i in mine for begin, end in stretch_bounds(len(cut[i]), len(vectors[i]))]  # fmt: skip
            sizes = np.array([max(1, len(cut[i])) for i in mine])
            whole = np.average([pooled[i] for i in mine], axis=0, weights=sizes).astype(np.float32)
            together = np.concatenate([vectors[i] for i in mine]).astype(np.float16)
            made.append((together, whole, np.array(spans, dtype=np.int64), np.array(len(encoding.ids))))
        return made

    @torch.inference_mode()
    def read(
        self, texts: Sequence[Sequence[int]], with_parts: bool = True
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """([C, e] a text, or nothing, and [e] a text)"""
        device = next(self.encoder.parameters()).device
        order = np.argsort([len(ids) for ids in texts], kind="stable")
        vectors: list[Any] = [None] * len(texts)
        pooled: list[Any] = [None] * len(texts)
        for start, stop in batches([len(texts[i]) for i in order]):
            members = order[start:stop]
            batch = pack([np.array(texts[i], dtype=np.int64) for i in members]).to(device)
            num_concepts = None if with_parts else self.concepts
            if self.kind == BAG:
                rows = self.encoder.get_input_embeddings()(batch.input_ids)
                found = share_means(rows, batch, num_concepts or self.config.num_concepts)
                means = found.mean(1)
            else:
                encoded = self.encoder(packed=batch, num_concepts=num_concepts, return_dict=True)
                found, means = self.as_vectors(encoded.last_hidden_state), encoded.pooler_output
            for i, of_text, mean in zip(members, found.float().cpu().numpy(), means.float().cpu().numpy(), strict=True):
                vectors[i], pooled[i] = (of_text if with_parts else None), mean
        return vectors, pooled

    def as_vectors(self, concepts_BCd: Tensor) -> Tensor:
        is_state = self.config.init_queries == "state"
        return self.encoder.as_states(concepts_BCd) if is_state else concepts_BCd


class PeerReader:
    """Any encoder of transformers: the beginning of a text, as far as it reads, and one vector of it. One that was
    fine-tuned here also has the head of its task."""

    def __init__(self, place: str, cache: str | None = None) -> None:
        self.name, self.folder, self.note = "peer", Path(place), read_note(Path(place))
        self.teacher = Teacher(place)
        self.fingerprint = self.teacher.fingerprint
        self.stored = Stored(cache_folder(cache) / f"downstream-{self.teacher.fingerprint}")
        self.last: tuple[Task, list[Example], Joint, list[list[Input]]] | None = None

    @functools.cached_property
    def head(self) -> nn.Module:
        """
        Raises:
            InputError: config.json says that there is one, and the weights have none.
        """
        with in_one_line(self.folder, "--model"), quiet():
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
            model, drawn = load_with_head(self.folder, config)
        if drawn:
            raise InputError(f"--model {self.folder}: {len(drawn)} weights of its head are missing, {drawn[0]} among "
                             "them; export the model again")  # fmt: skip
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def joint(self, task: Task, given: Sequence[Example]) -> tuple[Joint, list[list[Input]]]:
        """How it reads question and document together, and what it then reads of each example; kept until it is asked
        of others, since answering and counting both need it."""
        if self.last is None or self.last[:2] != (task, list(given)):
            most = self.note.max_tokens if self.note else sys.maxsize
            joint = Joint(self.teacher.tokenizer, self.teacher.model, task, most, f"--model {self.folder}")
            self.last = (task, list(given), joint, joint.read(given))
        return self.last[2:]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.teacher.tokenizer(
            list(texts), add_special_tokens=False, truncation=False, padding=False, verbose=False
        ).input_ids  # fmt: skip

    def count(self, texts: Sequence[str]) -> tuple[int, int]:
        lengths = [len(ids) for ids in self.ids(texts)]
        return sum(min(length, self.teacher.max_tokens) for length in lengths), sum(lengths)

    def whole(self, texts: Sequence[str]) -> np.ndarray:
        return self.stored.at_once(texts, lambda texts: np.stack([vector for vector, *_ in self.read(texts)]))

    def parts(self, texts: Sequence[str]) -> list[Read]:
        return [Read(whole[None], whole, spans, int(seen), int(given))
                for whole, spans, seen, given in self.stored.one_by_one(texts, self.read)]  # fmt: skip

    @torch.inference_mode()
    def read(self, texts: list[str]) -> list[tuple[np.ndarray, ...]]:
        teacher, ids = self.teacher, self.ids(texts)
        kept = [words[: teacher.max_tokens] for words in ids]
        pooled = []
        for start, stop in batches([len(words) for words in kept]):
            rows = [[*teacher.opening, *words, *teacher.closing] for words in kept[start:stop]]
            pooled += list(teacher.pool(rows).float().cpu().numpy())
        return [
            (vector, np.array([[0, len(text)]], dtype=np.int64), np.array(len(some)), np.array(len(all_)))
            for vector, text, some, all_ in zip(pooled, texts, kept, ids, strict=True)
        ]


class Ablated:
    """Another reader without what it read: all vectors zero, or those of the text before (the first has the last's)."""

    def __init__(self, reader: Reader, how: str) -> None:
        self.name, self.reader, self.how = f"concepts {how}", reader, how
        self.fingerprint = reader.fingerprint

    def count(self, texts: Sequence[str]) -> tuple[int, int]:
        return self.reader.count(texts)

    def whole(self, texts: Sequence[str]) -> np.ndarray:
        vectors = self.reader.whole(texts)
        return np.zeros_like(vectors) if self.how == "zeroed" else vectors[others(texts)]

    def parts(self, texts: Sequence[str]) -> list[Read]:
        made = self.reader.parts(texts)
        if self.how == "zeroed":
            return [read._replace(vectors=0 * read.vectors, whole=0 * read.whole) for read in made]
        return [read._replace(vectors=other.vectors, whole=other.whole, spans=moved(read, other))
                for read, other in zip(made, (made[i] for i in others(texts)), strict=True)]  # fmt: skip


def others(texts: Sequence[str]) -> list[int]:
    """Of every text the place of another one: that of the different text before it."""
    distinct = list(dict.fromkeys(texts))
    before = {text: distinct[i - 1] for i, text in enumerate(distinct)}
    place = {text: i for i, text in reversed(list(enumerate(texts)))}
    return [place[before[text]] for text in texts]


def moved(read: Read, other: Read) -> np.ndarray:
    """Where the parts of another text would stand in this one."""
    end = max(1, int(other.spans[-1, 1]))
    return (other.spans * (int(read.spans[-1, 1]) / end)).astype(np.int64)


def open_reader(
    place: str, piece: int | None, cache: str | None, concepts: int | None = None
) -> tuple[Reader, dict[str, Callable[[], Reader]]]:
    """The reader of a model, and its floors by name, which are opened when they are asked for.

    Raises:
        InputError: there is no such model, or a run has not finished.
    """
    folder = find(finished(place, f"--model {place}"), "--model")
    kind = kind_of(folder, "--model")
    if kind is None:
        raise InputError(f"--model {place}: expected a model folder, there is no config.json")
    if kind != ConceptConfig.model_type:
        return PeerReader(str(folder), cache), {}
    kinds = {kind: functools.cache(functools.partial(ConceptReader, folder, kind, piece, cache, concepts))
             for kind in (BAG, UNTRAINED)}  # fmt: skip
    return ConceptReader(folder, CONCEPTS, piece, cache, concepts), kinds
