"""Fine-tuning on labels: a finished model learns a task; documents are read once for all questions about them.

D documents, Q questions, L labels.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...models.config import ConceptConfig
from ...models.folder import read_config
from ...models.packing import Packed, pack
from ...models.tasks.flops import pair_flops, questions_flops
from ...models.tasks.heads import ConceptForSequenceClassification
from ...models.tasks.questions import ConceptForQuestions
from ..card import About
from ..data.cache import cache_folder
from ..data.loader import Batches
from ..data.order import Samples
from ..data.states import StateStore, open_states
from ..data.teacher import fingerprint_of
from ..data.windows import Part, Windows
from ..errors import InputError
from ..export import export
from ..labelled.examples import Example, examples, hold_out
from ..launching.launch import World
from ..layers import set_up
from ..recipe.finetune import Finetune
from ..saved_model import load_vocabulary, quiet
from .job import Loss


class Asked(NamedTuple):
    """A micro-batch: texts, the questions about them, and what is right."""

    texts: Packed  # D
    questions: Packed  # Q; of options those of a question follow each other
    owners: Tensor  # [Q] int64: which text a question is about
    labels: Tensor  # [Q], or one for each group of options; int64, or float32 values

    def to(self, device: torch.device, non_blocking: bool = False) -> "Asked":
        return Asked(*(part.to(device, non_blocking=non_blocking) for part in self))


class Group(NamedTuple):
    """A document with all that is asked about it."""

    document: np.ndarray  # int64
    questions: list[np.ndarray]
    labels: list[float]
    names: list[str]  # of the examples

    @property
    def num_tokens(self) -> int:
        return len(self.document) + sum(map(len, self.questions))

    @property
    def content(self) -> bytes:
        """By which a run that goes on knows its texts."""
        return self.document.tobytes()


def grouped(given: Sequence[Example], encode: Any, max_tokens: int, is_pair: bool) -> list[Group]:
    """Examples by their document, in the order in which documents come first; of a pair each by itself."""
    texts = list(dict.fromkeys(text for each in given for text in (each.document, each.question)))
    texts += [f"{each.question} {option}" for each in given for option in each.options]
    ids = {text: np.array(words[:max_tokens], dtype=np.int64)
           for text, words in zip(texts, encode(texts), strict=True)}  # fmt: skip
    groups: dict[str, Group] = {}
    for each in given:
        key = each.id if is_pair else each.document
        group = groups.setdefault(key, Group(ids[each.document], [], [], []))
        asked = [f"{each.question} {option}" for option in each.options] or [each.question]
        group.questions.extend(ids[text] for text in asked)
        group.labels.append(each.truth)
        group.names.append(each.id)
    return list(groups.values())


class Groups(Batches):
    """Micro-batches of whole groups; a group is to `Batches` one window of all its tokens."""

    def __init__(self, groups: Sequence[Group], is_whole: bool, **order: Any) -> None:
        lengths = np.array([group.num_tokens for group in groups], dtype=np.int32)
        part = Part(np.zeros(0, dtype=np.uint16), np.zeros(len(groups), dtype=np.int64), lengths)
        super().__init__(Windows([part]), **order)
        self.groups, self.is_whole = groups, is_whole
        self.stores: tuple[StateStore, StateStore] | None = None  # of documents and questions

    def batch(self, step: int, samples: Samples) -> Asked:
        return self.of(samples.windows)

    def of(self, numbers: Sequence[int]) -> Asked:
        some = [self.groups[int(i)] for i in numbers]
        texts, questions = pack([each.document for each in some]), pack([q for each in some for q in each.questions])
        if self.stores is not None:
            firsts = np.cumsum([0, *(len(each.questions) for each in self.groups)])
            rows = [row for i in numbers for row in range(firsts[int(i)], firsts[int(i) + 1])]
            texts = attached(texts, self.stores[0], np.asarray(numbers))
            questions = attached(questions, self.stores[1], np.asarray(rows))
        owners = torch.tensor([i for i, each in enumerate(some) for _ in each.questions], dtype=torch.int64)
        labels = [label for each in some for label in each.labels]
        return Asked(texts, questions, owners, torch.tensor(labels, dtype=torch.int64 if self.is_whole else None))


def attached(batch: Packed, store: StateStore, rows: np.ndarray) -> Packed:
    return store.attach(batch, rows) if len(rows) else batch


def windows_of(texts: Sequence[np.ndarray]) -> Windows:
    lengths = np.array([len(text) for text in texts], dtype=np.int32)
    tokens = np.concatenate(texts).astype(np.uint32)
    return Windows([Part(tokens, np.cumsum(lengths, dtype=np.int64) - lengths, lengths)])


class FinetuningJob:
    """See `Job`. Of pairs of sentences the model is a ``ConceptForSequenceClassification`` that encodes each by itself,
    of questions about documents a ``ConceptForQuestions``.

    Learned from is the training split of the task without the part that is held out of it, which says how well: the
    split that is reported is not opened.
    """

    def __init__(self, recipe: Finetune, world: World, folder: Path) -> None:
        """``folder``: of the source."""
        self.recipe, self.world, self.folder, self.beginning, self.files = recipe, world, folder, "", {}
        self.loss_floor, self.figures = 0.0, {}
        self.task = task = recipe.open_task()
        self.open()
        self.is_pair, self.is_whole = task.form == "pair", task.answer != "values"
        data = Path(recipe.task.data).expanduser() if recipe.task.data else None
        splits = recipe.task.train or task.splits.train
        every = [each for split in splits for each in examples(task, split, data, recipe.task.limit)]
        train, held = hold_out(every, recipe.task.fold)
        self.num_options = len(every[0].options) or None if task.answer == "choice" else None
        if self.num_options and any(len(each.options) != self.num_options for each in every):
            raise InputError(f"{task.name}: expected as many options of every question as of the first")
        truth = np.array([each.truth for each in train], dtype=np.float64)
        self.middle, self.spread = (float(truth.mean()), float(truth.std()) or 1.0) if not self.is_whole else (0.0, 1.0)
        self.loader, self.held_out = self.read(train), self.read(held)

    def open(self) -> None:
        """What of the source is needed before its weights."""
        self.source = ConceptConfig.from_dict(read_config(self.folder))
        self.vocabulary = load_vocabulary(self.folder, self.source)

    def grouped(self, given: Sequence[Example]) -> Sequence[Any]:
        return grouped(given, self.vocabulary.encode, self.recipe.task.max_tokens, self.is_pair)

    def dealt(self, groups: Sequence[Any], **order: Any) -> Groups:
        return Groups(groups, self.is_whole, **order)

    def cut(self) -> str:
        """In words, what of the texts is not read."""
        most = self.recipe.task.max_tokens
        cut = sum(len(group.document) == most for part in (self.loader, self.held_out) for group in part.groups)
        return f", {cut} documents read up to task.max_tokens = {most}" if cut else ""

    def read(self, given: Sequence[Example]) -> Groups:
        recipe, groups = self.recipe, self.grouped(given)
        longest = max(group.num_tokens for group in groups)
        for field, room in (("tokens", recipe.batch.tokens), ("micro_tokens", recipe.batch.micro_tokens)):
            if room < longest:
                raise InputError(
                    f"batch.{field}: expected room for the longest document with its questions, {longest} tokens, got "
                    f"{room}; raise it or lower task.max_tokens"
                )
        return self.dealt(
            groups, seed=recipe.run.seed, tokens_per_step=recipe.batch.tokens,
            micro_tokens=recipe.batch.micro_tokens, by_length=recipe.batch.by_length, rank=self.world.rank,
            world_size=self.world.size,
        )  # fmt: skip

    def identity(self) -> dict[str, dict[str, Any]]:
        digest = hashlib.sha256()
        for group in self.loader.groups:
            digest.update(group.content)
            digest.update(json.dumps([group.names, group.labels], allow_nan=False).encode())
        count, source = sum(len(group.labels) for group in self.loader.groups), fingerprint_of(self.folder)
        return {"task": {"examples": count, "texts and labels": digest.hexdigest()[:16], "source": source}}

    def describe(self) -> str:
        parts = (self.loader, "learned from"), (self.held_out, "held out")
        words = [f"{sum(len(group.labels) for group in part.groups)} examples {what}" for part, what in parts]
        return f"{self.task.name}: {', '.join(words)} ({self.loader.steps_per_epoch} steps an epoch{self.cut()})"

    def of_head(self) -> dict[str, Any]:
        """The fields of a configuration that say what its head tells apart, by transformers' names."""
        names = self.task.labels
        if self.is_whole and not self.num_options:
            numbered = dict(enumerate(names))
            return {"num_labels": len(names), "problem_type": "single_label_classification", "id2label": numbered,
                    "label2id": {name: i for i, name in numbered.items()}}  # fmt: skip
        return {"num_labels": 1, "problem_type": None if self.is_whole else "regression"}

    def build_config(self) -> ConceptConfig:
        task, labels = self.task, self.of_head()
        if self.is_pair:
            labels["pair"] = "separate"
        if not self.is_whole:
            is_cosine = self.is_pair and self.recipe.model.get("pair_features") == "cosine"
            low, high = task.bounds or (self.middle, self.middle + self.spread)
            labels["label_offset"] = low if is_cosine else self.middle
            labels["label_scale"] = high - low if is_cosine else self.spread
        config = self.recipe.build_config(self.source, task, **labels)
        config.task = task.name
        return config

    def build(self, is_new: bool) -> nn.Module:
        kind = ConceptForSequenceClassification if self.is_pair else ConceptForQuestions
        config = self.build_config()
        try:
            with quiet():
                options = {"config": config, "use_safetensors": True}
                model = kind.from_pretrained(self.folder, **options) if is_new else kind(config)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"source: {self.recipe.source}: {' '.join(str(error).split())}") from error
        if self.recipe.learned == "head":
            model.encoder.requires_grad_(False)
        if is_new:
            self.beginning = f"from {self.recipe.source}: {model.load_report}"
        self.store_states(model, is_filled=is_new)
        set_up(model, self.recipe.train, self.world.device)
        return Learner(model, self.num_options)

    def store_states(self, model: nn.Module, is_filled: bool) -> None:
        """Makes the states of a frozen backbone once, for all steps. Collective.

        ``is_filled``: the backbone has its weights; a run that goes on finds what it stored when it began.
        """
        room, backbone = self.recipe.task.states_gb, model.encoder.backbone
        if room is None:
            return
        if backbone is None or backbone.trained != "none":
            raise InputError("task.states_gb: expected nothing: no backbone is frozen, its states change")
        backbone.to(self.world.device)
        cache, key = cache_folder(self.recipe.task.cache), {"source": fingerprint_of(self.folder)}
        for loader in (self.loader, self.held_out):
            documents = windows_of([group.document for group in loader.groups])
            questions = windows_of([question for group in loader.groups for question in group.questions])
            loader.stores = tuple(
                self.world.first_then_others(
                    lambda some=some: open_states(
                        cache, some, np.arange(len(some)), backbone if is_filled else None, len(backbone.mean), key,
                        room, field="task.states_gb",
                    )
                )
                for some in (documents, questions)
            )

    def batches(self, start: int, stop: int) -> Iterator[list[Asked]]:
        return self.loader.prefetch(start, stop)

    def num_tokens(self, step: int) -> int:
        return int(self.loader.windows.lengths[self.loader.samples(step).windows].sum())

    def flops(self, engine: Any, batches: Sequence[Asked]) -> int:
        config, is_trained = engine.module.model.config, self.recipe.learned == "all"
        if self.is_pair:
            return sum(pair_flops(config, asked.questions, asked.texts, is_trained) for asked in batches)
        return sum(questions_flops(config, *asked[:3], is_trained) for asked in batches)

    def contents(self, step: int) -> dict[str, Any]:
        numbers = self.loader.samples(step).windows
        return {"examples": [name for i in numbers for name in self.loader.groups[int(i)].names]}

    def labels(self, step: int) -> dict[str, Any]:
        return {}

    def prepare(self, engine: Any, step: int, batches: Sequence[Asked], seeds: Sequence[int]) -> list[dict[str, Any]]:
        counts = torch.tensor(float(sum(len(batch.labels) for batch in batches)), device=self.world.device)
        divisor = self.world.sum(counts) / self.world.size
        return [{"asked": batch, "divisor": divisor} for batch in batches]

    def loss(self, engine: Any, given: dict[str, Any]) -> Loss:
        loss, _ = engine(**given)
        return Loss(loss, {"loss": loss.detach()})

    def after_backward(self, engine: Any, num_batches: int) -> dict[str, Tensor]:
        return {}

    @torch.no_grad()
    def evaluate(self, engine: Any) -> dict[str, Any]:
        """The loss of the held-out part, and the share of right answers or the correlation with the values."""
        engine.module.eval()
        rows = []
        for _, numbers in self.held_out.evaluation_bins(int(self.held_out.windows.lengths.sum(dtype=np.int64))):
            asked = self.held_out.of(numbers).to(self.world.device)
            loss, logits = engine(asked=asked, divisor=torch.ones((), device=self.world.device))
            answers = logits.argmax(-1) if self.is_whole else logits.view(-1)
            rows.append((float(loss), answers.double().tolist(), asked.labels.double().tolist()))
        engine.module.train()
        rows = [row for of_rank in self.world.gather(rows) for row in of_rank]
        found, truth = (np.concatenate([row[i] for row in rows]) for i in (1, 2))
        self.figures = {"loss": sum(row[0] for row in rows) / max(len(truth), 1)}
        if self.is_whole:
            self.figures["accuracy"] = float(np.mean(found == truth))
        elif min(np.ptp(found), np.ptp(truth)) > 0:
            self.figures["pearson"] = float(np.corrcoef(found, truth)[0, 1])
        return self.figures

    def export(self, module: nn.Module, folder: Path) -> Path:
        longest = max(len(group.document) for group in self.loader.groups)
        return export(self.world, module.model, self.vocabulary.tokenizer, folder, self.about(longest))

    def about(self, longest: int) -> About:
        """``longest``: tokens of the longest text that was learned from."""
        recipe = self.recipe
        return About(recipe.run.name, longest, recipe.resolved(), [self.describe()], self.figures)


class Learner(nn.Module):
    """A model of either kind with its loss, over the whole step."""

    def __init__(self, model: nn.Module, num_options: int | None) -> None:
        super().__init__()
        self.model, self.num_options = model, num_options

    def forward(self, asked: Asked, divisor: Tensor) -> tuple[Tensor, Tensor]:
        """(the sum of the losses over ``divisor``, 0-d; logits)"""
        if isinstance(self.model, ConceptForQuestions):
            found = self.model(asked.texts, asked.questions, asked.owners, asked.labels, num_options=self.num_options)
        else:
            found = self.model(packed=asked.questions, packed_b=asked.texts, labels=asked.labels)
        return found.loss * len(asked.labels) / divisor, found.logits
