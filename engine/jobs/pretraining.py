"""Pre-training on text: the objective of a recipe, with what is added to it."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...models.flops import view_flops
from ...models.masked_lm import ConceptForMaskedLM, smoothing_floor
from ...models.objectives import Distillation, Mixed, ReadBack, StateReader, View
from ...models.pretraining import Cached, Pretraining, Totals, cache
from ...models.recursion import draw_iterations
from ...models.sharding import shard_view
from ..backbone import KEPT, identity
from ..beginning import begin
from ..card import About
from ..checkpoints.retention import METRICS
from ..data.cache import cache_folder
from ..data.concepts import Drawn, Fixed
from ..data.corpus import Corpus, open_corpus
from ..data.lessons import learn
from ..data.loader import Loader
from ..data.phrases import open_phrases
from ..data.stages import Stages
from ..data.states import open_states
from ..data.stream import Streamed, seed_of
from ..data.teacher import Teacher
from ..data.windows import Windows
from ..export import export
from ..launching.launch import World
from ..layers import set_up
from ..recipe.schema import Recipe
from .evaluation import evaluate, of_states
from .job import Loss


def counted(recipe: Recipe, world: World) -> Recipe:
    """The recipe, with the phrases of its text if it asks for them. Collective."""
    if not recipe.needs_phrases:
        return recipe
    return recipe.with_phrases(world.first_then_others(lambda: open_phrases(recipe.data)))


class PretrainingJob:
    """See `Job`."""

    def __init__(self, recipe: Recipe, world: World, corpora: Sequence[Corpus] | None = None) -> None:
        """``corpora``: what to read in each stage of length; left out: what the recipe names."""
        self.recipe, self.world, self.beginning, self.files = recipe, world, "", {}
        self.figures: dict[str, Any] = {}  # of the last evaluation
        self.objective, self.contrastive = recipe.build_objective(), recipe.build_contrastive()
        *shorter, self.corpus = corpora or [self.open(window) for _, window in recipe.stages()]
        stages = zip([*shorter, self.corpus], recipe.stages(), recipe.concepts(), strict=True)
        self.loader = Stages([
            self.read_stage(corpus, first_step, concepts) for corpus, (first_step, _), concepts in stages
        ])  # fmt: skip
        self.held_out = self.read(self.corpus.validation)
        self.distill = recipe.build_distill()
        self.teacher = self.take_lessons() if self.distill else {}
        self.loss_floor = smoothing_floor(recipe.train.label_smoothing, self.corpus.tokens.vocab_size)

    def open(self, window: int) -> Corpus:
        data = self.recipe.data.model_copy(update={"window": window})
        return self.world.first_then_others(lambda: open_corpus(data))

    def read_stage(self, corpus: Corpus, first_step: int, concepts: Drawn | Fixed | None) -> Loader | Streamed:
        """The training text of a stage of length."""
        if corpus.blocks is None:
            return self.read(corpus.train, first_step, concepts)
        seed = self.recipe.run.seed

        def read(windows: Windows, first_step: int, number: int) -> Loader:
            return self.read(windows, first_step, concepts, seed_of(seed, number))

        later = [start for start, _ in self.recipe.stages() if start > first_step]
        stop = min([*later, self.recipe.train.steps])
        reads_ahead = self.world.local_rank == 0
        return Streamed(corpus.blocks, read, first_step, stop, self.recipe.batch.tokens, reads_ahead)

    def read(
        self, windows: Windows, first_step: int = 0, concepts: Drawn | Fixed | None = None, seed: int | None = None
    ) -> Loader:
        """``seed``: left out, the run's."""
        recipe, contrastive, world = self.recipe, self.contrastive, self.world
        return Loader(
            windows, self.objective, self.corpus.tokens, seed=recipe.run.seed if seed is None else seed,
            tokens_per_step=recipe.batch.tokens, micro_tokens=recipe.batch.micro_tokens * recipe.train.sequence_ranks,
            rank=world.data_rank, world_size=world.data_size, part=self.part, first_step=first_step,
            by_length=recipe.batch.by_length, concepts=concepts, contrastive=contrastive,
            contrastive_from=math.ceil(contrastive.start * recipe.train.steps) if contrastive else 0,
        )  # fmt: skip

    @property
    def part(self) -> Callable[[View], View] | None:
        """What this rank holds of a view that several share."""
        world = self.world
        if world.sequence_group is None:
            return None
        config = self.recipe.build_config(vocab_size=self.corpus.tokens.vocab_size)
        return partial(shard_view, rank=world.sequence_rank, size=world.sequence_ranks, config=config)

    def take_lessons(self) -> dict[str, Any]:
        """Gives every loader the teacher's vectors of what it will read, computed where they are missing. Collective.

        Returns a record of the teacher.
        """
        recipe, world, tokenizer = self.recipe, self.world, self.corpus.tokenizer
        tokenizer_id, cache = self.corpus.description["tokenizer"]["id"], cache_folder(recipe.data.cache)
        teacher = world.first_then_others(lambda: Teacher(self.distill.teacher, world.device))
        for loader, rows in self.wanted():
            loader.lessons = world.first_then_others(
                lambda windows=loader.windows, rows=rows: learn(
                    windows, rows, teacher, tokenizer, tokenizer_id, self.distill, cache
                )
            )
        return teacher.record

    def take_states(self, network: ConceptForMaskedLM, is_filled: bool) -> None:
        """Gives every loader the backbone's states of what it will read, computed where they are missing. Collective.

        ``is_filled``: the backbone has its weights; a run that goes on has them only after its module is built, and
        finds what it stored when it began.
        """
        recipe, world, cache = self.recipe, self.world, cache_folder(self.recipe.data.cache)
        backbone = network.encoder.backbone.to(world.device)
        key = [self.corpus.description["tokenizer"]["id"], identity(network.config)]
        for loader, rows in self.wanted():
            loader.states = world.first_then_others(
                lambda windows=loader.windows, rows=rows: open_states(
                    cache, windows, rows, backbone if is_filled else None, len(backbone.mean), key,
                    recipe.data.states_gb,
                )
            )

    def wanted(self) -> Iterator[tuple[Loader, np.ndarray]]:
        """Every loader with the windows that the run will read of it."""
        of_steps: dict[int, list[np.ndarray]] = {}
        for step in range(self.recipe.train.steps):
            loader = self.loader.at(step)
            of_steps.setdefault(loader.first_step, []).append(loader.samples(step).windows)
        for loader in self.loader.loaders:
            yield loader, np.concatenate(of_steps[loader.first_step])
        yield self.held_out, self.held_out.evaluation_rows(self.recipe.eval.tokens)

    def identity(self) -> dict[str, dict[str, Any]]:
        num_micro_batches = self.held_out.num_micro_batches * self.world.data_size
        teacher = {"teacher": {"teacher's weights": self.teacher["fingerprint"]}} if self.teacher else {}
        populations = self.recipe.populations(num_micro_batches)
        return {"text": text_identity(self.corpus), "populations": populations, **teacher}

    def describe(self) -> str:
        millions = self.corpus.train.num_tokens / 1e6
        if self.corpus.blocks is not None:
            return f"training text streamed, {millions:.2f} M tokens of it at a time"
        text = f"{millions:.2f} M tokens of training text ({self.loader.at(0).steps_per_epoch} steps an epoch)"
        lost = sum(len(source.get("unreadable", ())) for source in self.corpus.description["sources"])
        text += f" without the rest of {lost} unreadable files" if lost else ""
        return f"{text}, distilled from {self.teacher['teacher']}" if self.teacher else text

    def build(self, is_new: bool) -> Pretraining:
        recipe = self.recipe
        bare, self.beginning, self.files = begin(recipe, self.corpus, self.world, is_new)
        self.files["data.json"] = json.dumps(self.corpus.description, indent=1, allow_nan=False)
        if recipe.data.states_gb:
            self.take_states(bare, KEPT in self.files)
        set_up(bare, recipe.train, self.world.device)
        distillation = None
        if self.distill:
            bare.config.distilled_from = self.teacher
            are_bare = bare.config.init_queries == "state"
            distillation = Distillation(self.distill, bare.config.hidden_size, self.teacher["width"], are_bare)
        reader = None
        if self.reads_states:
            reader = StateReader(self.objective, bare.config.hidden_size, bare.config.token_dim)
        module = Pretraining(
            bare, self.contrastive, recipe.build_regularization(), recipe.has_task, distillation, reader
        )  # fmt: skip
        module.share_texts(self.world.sequence_group)
        return module

    @property
    def reads_states(self) -> bool:
        """Whether states of a backbone are read back."""
        return isinstance(self.objective, ReadBack) and self.objective.states > 0

    def batches(self, start: int, stop: int) -> Iterator[list[View]]:
        return self.loader.prefetch(start, stop)

    def num_tokens(self, step: int) -> int:
        return self.loader.num_tokens(step)

    def flops(self, engine: Any, batches: Sequence[View]) -> int:
        """Of the objective, at the mean number of iterations: not of contrast, a teacher or regularisers."""
        config = engine.module.model.config
        return sum(view_flops(config, view) for view in batches) if self.recipe.has_task else 0

    def contents(self, step: int) -> dict[str, Any]:
        return {"windows": self.loader.windows(step)}

    def labels(self, step: int) -> dict[str, Any]:
        """Which part of a mixture a step belongs to, and how many concepts it has where that changes."""
        mixed, concepts = self.objective, self.loader.at(step).concepts
        found: dict[str, Any] = {"objective": mixed.names[mixed.place(step)]} if isinstance(mixed, Mixed) else {}
        if isinstance(concepts, Drawn):
            found["tokens_per_concept"] = concepts.ratio(step)
        elif any(self.recipe.concepts()):
            found["num_concepts"] = self.recipe.most_concepts if concepts is None else concepts.count
        return found

    def prepare(self, engine: Any, step: int, batches: Sequence[View], seeds: Sequence[int]) -> list[dict[str, Any]]:
        totals = Totals.of(batches, self.world.sum, self.world.size)
        num_iterations = draw_iterations(engine.module.model.config, (self.recipe.run.seed, step))
        ahead = look_ahead(engine, batches, seeds, totals, num_iterations)
        shared = {"totals": totals, "step": step, "num_iterations": num_iterations,
                  "smoothing": self.recipe.train.label_smoothing}  # fmt: skip
        return [{"view": view, "cached": cached, **shared} for view, cached in zip(batches, ahead, strict=True)]

    def loss(self, engine: Any, given: dict[str, Any]) -> Loss:
        return Loss(*engine(**given))

    def after_backward(self, engine: Any, num_batches: int) -> dict[str, Tensor]:
        scale = engine.module.cap_scale
        return {} if scale is None else {"cap_scale": scale / num_batches}

    def evaluate(self, engine: Any) -> dict[str, Any]:
        """Of text that is read into all concepts; and "ratios", of the same text at each of several ratios."""
        self.figures = self.of_held_out(engine, self.held_out)
        ratios = self.recipe.train.tokens_per_concept or ()
        if len(ratios) > 1:
            self.figures["ratios"] = {f"r={ratio:g}": self.at_ratio(engine, ratio) for ratio in ratios}
        return self.figures

    def at_ratio(self, engine: Any, ratio: float) -> dict[str, Any]:
        """The figures that a run can choose by, where batches have a concept for every ``ratio`` tokens."""
        drawn = Drawn((ratio,), self.recipe.most_concepts, self.recipe.run.seed)
        found = self.of_held_out(engine, self.held_out.reading_into(drawn))
        return {name: figure for name, figure in found.items() if name in (*METRICS, "parts")}

    def of_held_out(self, engine: Any, held_out: Loader) -> dict[str, Any]:
        given = engine, held_out, self.recipe.eval.tokens, self.world
        return evaluate(*given) | (of_states(*given) if self.reads_states else {})

    def export(self, module: nn.Module, folder: Path) -> Path:
        recipe = self.recipe
        about = About(recipe.run.name, recipe.data.window, recipe.resolved(), described(self.corpus), self.figures)
        return export(self.world, module.model, self.corpus.tokenizer, folder, about)


def look_ahead(
    engine: Any, views: Sequence[View], seeds: Sequence[int], totals: Totals, num_iterations: int | None
) -> list[Cached | None]:
    """The gradient of a contrastive loss over all micro-batches, for each, if there are several. Collective."""
    contrastive = engine.module.contrastive
    pairs = [view.pair for view in views]
    if contrastive is None or contrastive.negatives != "step" or len(views) == 1 or pairs[0] is None:
        return [None] * len(views)
    compared = []
    with torch.no_grad():
        for view, seed in zip(views, seeds, strict=True):
            torch.manual_seed(seed)
            given = {"num_iterations": num_iterations, "num_concepts": view.num_concepts}
            compared.append(engine(pair=view.pair, encoder=view.encoder, **given))
    return cache(compared, [pair.ids for pair in pairs], contrastive, totals)


def described(corpus: Corpus) -> list[str]:
    """One line a source, for the model card."""

    def of(source: dict[str, Any]) -> str:
        text = f"{source['path']}: {source['train']['tokens']:,} tokens in {source['train']['documents']:,} documents"
        lost = len(source.get("unreadable", ()))
        return text + (f"; {lost} of its files could not be read to their end" if lost else "")

    return [of(source) for source in corpus.description["sources"]]


def text_identity(corpus: Corpus) -> dict[str, Any]:
    """What must be the same for a resumed run to read the same text in the same words."""
    return {
        "vocabulary size": corpus.tokens.vocab_size,
        "tokenizer": corpus.description["tokenizer"]["id"],
        "tokens of training text": corpus.train.num_tokens,
        "training text": hashlib.sha256(corpus.train.lengths.tobytes()).hexdigest()[:16],  # lengths stand for the text
    }
