"""The training loop."""

import errno
import hashlib
import math
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models.config import ConceptConfig
from ..models.heads import ConceptForMaskedLM
from ..models.objectives.view import View
from ..models.recursion import draw_iterations
from . import checkpoint, compat, launch, zero
from .data.corpus import Corpus, open_corpus
from .data.loader import Loader
from .errors import InputError
from .evaluation import evaluate
from .export import export
from .launch import StopRequest, World
from .optimizer import build_optimizer
from .recipe import Recipe, load_recipe
from .run import RunFolder
from .schedule import learning_rate
from .telemetry import Clock, Telemetry, duration, peak_memory_bytes

MAX_FAILED_SAVES = 3  # in a row, after which the run stops
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def train(recipe_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Runs a recipe to its end and returns the run's folder. Every rank calls it.

    Args:
        recipe_path: a YAML file, see `recipe.py`.
        overrides: `section.field=value`.

    Raises:
        InputError: the recipe, the data or the run folder cannot be used; nothing has been written then. Also when the
            disk is full or gradients stay non-finite: the last good checkpoint stays.
        SystemExit: SIGTERM or SIGINT came; a checkpoint was saved. The code is 128 plus the signal's number.
    """
    recipe, stop = load_recipe(recipe_path, overrides), StopRequest()
    with launch.world() as world, RunFolder(recipe, world) as run:
        notes = run.inspect()
        if run.is_finished:
            if world.is_first:
                print(f"{run.path}: finished already ({run.progress.step} steps); the model is in {run.model}")
            return run.path
        trainer = Trainer(recipe, world, stop, run)
        try:
            with stop:
                trainer.fit(notes)
        except OSError as error:
            if error.errno not in DISK_FAULTS:
                raise
            raise InputError(f"{run.path}: cannot be written ({error.strerror}); {trainer.way_back()}") from error
    return run.path


class Trainer:
    """Everything a run needs, built and checked before its folder is touched."""

    def __init__(self, recipe: Recipe, world: World, stop: StopRequest, run: RunFolder) -> None:
        self.recipe, self.world, self.stop, self.run, self.progress = recipe, world, stop, run, run.progress
        self.corpus: Corpus = world.first_then_others(lambda: open_corpus(recipe.data))
        self.identity = {
            "trajectory": recipe.trajectory(),
            "text": text_identity(self.corpus),
            "topology": {"ranks": world.size, "stage": recipe.zero.stage, "micro_tokens": recipe.batch.micro_tokens},
        }
        run.compare("text", self.identity["text"])
        objective = recipe.build_objective()
        self.loader, self.held_out = (
            Loader(
                windows, objective, self.corpus.tokens, seed=recipe.run.seed, tokens_per_step=recipe.batch.tokens,
                micro_tokens=recipe.batch.micro_tokens, rank=world.rank, world_size=world.size,
            )
            for windows in (self.corpus.train, self.corpus.validation)
        )  # fmt: skip
        torch.manual_seed(recipe.run.seed)  # the same initial weights on every rank
        model = ConceptForMaskedLM(self.build_config())
        if run.found:
            checkpoint.load_weights(run.found, model)
        model.to(world.device).train()
        self.engine = zero.initialize(model, build_optimizer(model, recipe.optim), recipe)
        if run.found:
            checkpoint.load_moments(run.found, self.engine, self.progress.optimizer_steps)
        compat.set_timeouts(recipe.run.timeout_s)
        self.clock, self.bad_steps, self.failed_saves = Clock(), 0, 0

    def build_config(self) -> ConceptConfig:
        """The model's config, if the objective provides what the model asks for."""
        tokens = self.corpus.tokens
        config = self.recipe.build_config(
            vocab_size=tokens.vocab_size, mask_token_id=tokens.mask_id, pad_token_id=self.corpus.tokenizer.pad_token_id
        )
        if config.timestep_conditioning and self.loader.step(0)[0].timesteps is None:
            name = self.recipe.objective["name"]
            raise InputError(f"model.timestep_conditioning: objective {name} has no timesteps; set it to false")
        return config

    def fit(self, notes: Sequence[str]) -> None:
        """The loop, in the order in which things happen."""
        recipe, progress, clock, total = self.recipe, self.progress, self.clock, self.recipe.train.steps
        self.run.create()
        self.telemetry = telemetry = Telemetry(self.run.path, self.world, progress.step, total)
        self.announce(notes)
        progress.identity = self.identity
        steps = range(progress.step, total)
        for step, views in zip(steps, self.loader.prefetch(steps.start, steps.stop), strict=True):
            lr = learning_rate(
                step, lr=recipe.optim.lr, warmup_steps=recipe.optim.warmup_steps, total_steps=total,
                min_lr_ratio=recipe.optim.min_lr_ratio,
            )  # fmt: skip
            loss, stopping = self.update(step, views, lr)
            applied = self.engine.was_step_applied()

            tokens = int(self.loader.windows.lengths[self.loader.samples(step).windows].sum())
            speed = clock.step(tokens)
            progress.step, progress.tokens = step + 1, progress.tokens + tokens
            progress.optimizer_steps += applied
            telemetry.record(
                "train", progress.step, loss=finite(loss), lr=lr, grad_norm=finite(self.engine.get_global_grad_norm()),
                tokens=progress.tokens, tokens_per_s=speed, elapsed_s=progress.elapsed_s + clock.elapsed_s,
            )  # fmt: skip
            telemetry.step(progress.step, loss, clock.tokens_per_s)
            self.check_applied(step, applied)

            is_last = progress.step == total
            if is_last or due(progress.step, recipe.eval.every):
                figures = evaluate(self.engine, self.held_out, recipe.eval.tokens, self.world)
                telemetry.evaluation(progress.step, figures)
            if is_last or stopping or due(progress.step, recipe.checkpoint.every):
                self.save(must_succeed=is_last or stopping)
            if stopping and not is_last:
                self.leave()
            clock.restart()
        self.finish()

    def update(self, step: int, views: list[View], lr: float) -> tuple[float, bool]:
        """Forward and backward over this rank's micro-batches, then one step of the optimizer.

            loss = sum of weight * nll over the targets of all ranks and micro-batches, / sum of their divisors

        DeepSpeed averages gradients over ranks and adds them up over micro-batches, hence the factor `world.size`.
        Returns the loss, and whether any rank was asked to stop.
        """
        engine, world = self.engine, self.world
        views = [view.to(world.device, non_blocking=True) for view in views]
        divisor = world.sum(torch.stack([view.divisor for view in views]).sum())
        divisor = torch.where(divisor > 0, divisor, 1.0) / world.size
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        num_iterations = draw_iterations(engine.module.config, (self.recipe.run.seed, step))
        total = torch.zeros(2, dtype=torch.float64, device=world.device)  # the loss, and how many ranks want to stop
        for i, view in enumerate(views):
            torch.manual_seed(dropout_seed(self.recipe.run.seed, step, i, world.rank))
            engine.set_gradient_accumulation_boundary(i == len(views) - 1)
            output = engine(
                view=replace(view, divisor=divisor), label_smoothing=self.recipe.train.label_smoothing,
                num_iterations=num_iterations,
            )  # fmt: skip
            engine.backward(output.loss)
            total[0] += output.loss.detach() / world.size
        engine.step()
        total[1] = self.stop.pending
        loss, stopping = world.sum(total).tolist()
        return loss, stopping > 0

    def check_applied(self, step: int, applied: bool) -> None:
        """Counts steps that DeepSpeed skipped, on every rank alike, because a gradient was not finite."""
        self.bad_steps = 0 if applied else self.bad_steps + 1
        if applied:
            return
        windows = self.loader.samples(step).windows.tolist()
        self.telemetry.record("bad_step", step + 1, in_a_row=self.bad_steps, windows=windows)
        self.telemetry.say(f"step {step + 1}: a gradient is not finite; the step was skipped, its windows are recorded")
        if self.bad_steps >= self.recipe.train.max_bad_steps:
            raise InputError(
                f"{self.run.path}: {self.bad_steps} steps in a row had a gradient that is not finite, stopped at step "
                f"{step + 1}; lower optim.lr or look at the windows listed in metrics.jsonl, and start another run.name"
            )

    def save(self, must_succeed: bool) -> None:
        """A failed periodic save costs a warning; three in a row, or the last one, end the run. Earlier ones stay."""
        state = replace(self.progress, elapsed_s=self.progress.elapsed_s + self.clock.elapsed_s)
        try:
            checkpoint.save(self.world, self.run.checkpoints, self.engine, state, self.recipe.checkpoint.keep)
            self.failed_saves = 0
        except OSError as error:
            self.failed_saves += 1
            problem = f"{self.run.checkpoints}: step {state.step} could not be saved: {error}"
            if must_succeed or self.failed_saves >= MAX_FAILED_SAVES:
                raise InputError(f"{problem}; {self.way_back()}") from error
            self.telemetry.say(f"warning: {problem}; training goes on, the next attempt is the next checkpoint")

    def way_back(self) -> str:
        kept = checkpoint.list_checkpoints(self.run.checkpoints)
        if not kept:
            return "there is no checkpoint yet; make room and start again with resume=auto"
        return f"{kept[0].name} is intact; make room and go on with resume=auto"

    def leave(self) -> None:
        self.telemetry.say(f"stopped after step {self.progress.step}; go on with resume=auto")
        self.telemetry.close()
        raise SystemExit(128 + (self.stop.signum or signal.SIGTERM))

    def finish(self) -> None:
        try:
            model = export(self.world, self.engine, self.corpus.tokenizer, self.run.model)
        except OSError as error:
            raise InputError(f"{self.run.model}: could not be written: {error}; {self.way_back()}") from error
        seconds = self.progress.elapsed_s + self.clock.elapsed_s
        self.telemetry.record(
            "end", self.progress.step, train_seconds=seconds, tokens=self.progress.tokens,
            tokens_per_s=self.clock.tokens_per_s, peak_memory_bytes=peak_memory_bytes(self.world.device),
        )  # fmt: skip
        self.telemetry.say(f"finished {self.progress.step} steps in {duration(seconds)}; the model is in {model}")
        self.telemetry.close()

    def announce(self, notes: Sequence[str]) -> None:
        say, world = self.telemetry.say, self.world
        for note in notes:
            say(note)
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters())
        say(
            f"{self.run.path}: {parameters / 1e6:.1f} M parameters, {self.corpus.train.num_tokens / 1e6:.2f} M tokens "
            f"of training text ({self.loader.steps_per_epoch} steps an epoch), {world.size} x {world.device.type}, "
            f"{self.recipe.train.precision}, ZeRO {self.recipe.zero.stage}"
        )
        if self.run.found:
            same = self.progress.identity["topology"] == self.identity["topology"]
            say(
                f"going on from {self.run.found}"
                + ("" if same else ", with other ranks, stage or micro-batches: exact but for rounding")
            )


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def finite(value: Any) -> float | None:
    """JSON knows no NaN and no infinity."""
    return float(value) if math.isfinite(value) else None


def dropout_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """Dropout as a pure function of the step, so that there is no generator state to save."""
    return int(np.random.SeedSequence((seed, step, micro_batch, rank)).generate_state(1, np.uint64)[0] >> 1)


def text_identity(corpus: Corpus) -> dict[str, Any]:
    """What must be the same for a resumed run to read the same text in the same words."""
    return {
        "vocabulary size": corpus.tokens.vocab_size,
        "tokenizer": corpus.description["tokenizer"]["id"],
        "tokens of training text": corpus.train.num_tokens,
        "training text": hashlib.sha256(corpus.train.lengths.tobytes()).hexdigest()[:16],  # lengths stand for the text
    }
