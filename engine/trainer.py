"""The training loop."""

import argparse
import contextlib
import errno
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..kernels.environment import check_environment
from . import compat, zero
from .checkpoints import checkpoint
from .checkpoints.retention import Retention
from .checkpoints.writer import Writer
from .errors import InputError
from .failures.out_of_memory import OutOfMemory
from .failures.rewind import rewind
from .failures.spikes import Spikes
from .failures.watch import Watch
from .jobs.job import Job
from .jobs.peer import finetuning
from .jobs.pretraining import PretrainingJob, counted
from .launching import launch
from .launching.launch import StopRequest, World
from .meter import Meter, peak_memory_bytes
from .optimizing.ema import Average
from .optimizing.optimizer import build_optimizer
from .optimizing.schedule import learning_rate
from .precision import settled
from .profiled import Profiled
from .recipe.finetune import Finetune
from .recipe.load import load_any
from .recipe.schema import Training
from .record import trajectory
from .run import RunFolder
from .telemetry import Clock, Telemetry, duration
from .update import update
from .weights_and_biases import check_project

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
    recipe, stop = load_any(recipe_path, overrides), StopRequest()
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(launch.world(recipe.run.join_minutes)).divided(recipe.train.sequence_ranks)
        world.first_then_others(lambda: check_variables(world))
        world.first_then_share(lambda: check_project(recipe))
        typed = [str(recipe_path), *overrides]
        is_finetune = isinstance(recipe, Finetune)
        recipe = recipe if is_finetune else counted(recipe, world)
        run = stack.enter_context(RunFolder(settled(recipe, world), world, typed))
        notes, recipe = run.inspect(), run.recipe
        if run.is_finished:
            if world.is_first:
                print(f"{run.path}: finished already ({run.progress.step} steps); the model is in {run.model}")
            return run.path
        memory = stack.enter_context(OutOfMemory(recipe, world))
        job = (finetuning if is_finetune else PretrainingJob)(recipe, world)
        memory.trainer = trainer = Trainer(recipe, world, stop, run, job)
        try:
            with stop, trainer.watch, trainer.writer:
                trainer.fit(notes)
        except OSError as error:
            if error.errno not in DISK_FAULTS:
                raise
            raise InputError(f"{run.path}: cannot be written ({error.strerror}); {trainer.way_back()}") from error
    return run.path


def check_variables(world: World) -> None:
    """Refuses what our operators could not use in the environment, before anything is read or written."""
    try:
        check_environment(world.device)
    except ValueError as error:
        raise InputError(f"environment: {error}") from error


def main(options: argparse.Namespace) -> None:
    """The command line."""
    train(options.recipe, options.overrides)


class Trainer:
    """How a job is trained: steps, checkpoints, the record. All is built and checked before its folder is touched."""

    def __init__(self, recipe: Training, world: World, stop: StopRequest, run: RunFolder, job: Job) -> None:
        self.recipe, self.world, self.stop, self.run, self.progress = recipe, world, stop, run, run.progress
        self.job = job
        self.identity = {
            "trajectory": trajectory(recipe),
            "topology": topology(recipe, world),
            **job.identity(),
        }
        for name in job.identity():
            run.compare(name, self.identity[name])
        of = recipe.checkpoint
        self.retention = Retention(of.keep_last, of.keep_every, of.keep_best)
        self.writer = Writer(world, run.checkpoints, self.retention, of.async_)
        self.spikes = Spikes(recipe.train, self.progress.spikes)
        self.engine = self.open(run.found)
        self.watch = Watch(world, recipe.run.hang_minutes, lambda: self.way_back(""))
        self.meter = Meter(world.device, recipe.train.precision)
        self.clock, self.bad_steps, self.failed_saves, self.rewound = Clock(), 0, 0, []

    def open(self, found: Path | None) -> Any:
        """A DeepSpeed engine with the weights and moments of a checkpoint, or with the first weights. Collective."""
        torch.manual_seed(self.recipe.run.seed)  # the same initial weights on every rank
        module = self.job.build(is_new=not found)
        if found:
            checkpoint.load_weights(found, module)
        module.to(self.world.device).train()
        engine = zero.initialize(module, build_optimizer(module, self.recipe.optim), self.recipe)
        if found:
            checkpoint.load_moments(found, engine, self.progress.optimizer_steps)
        compat.set_timeouts(60 * self.recipe.run.hang_minutes + 60)  # `Watch` knows more, and speaks first
        self.spikes.attach(engine)
        self.average = Average(engine, self.recipe.ema)
        return engine

    def fit(self, notes: Sequence[str]) -> None:
        """The loop, in the order in which things happen."""
        recipe, job, progress, clock, total = self.recipe, self.job, self.progress, self.clock, self.recipe.train.steps
        self.run.create()
        floor = job.loss_floor
        self.telemetry = telemetry = Telemetry(self.run.path, self.world, progress.step, total, floor, recipe)
        self.announce(notes)
        progress.identity, meter = self.identity, self.meter
        profiled = Profiled(recipe.profile.steps, self.run.path / "profile", self.world)
        steps = range(progress.step, total)
        meter.watch.begin()
        for step, batches in zip(steps, job.batches(steps.start, steps.stop), strict=True):
            lr = learning_rate(step, recipe.optim, total)
            profiled.begin(step + 1)
            figures, asked = update(
                self.engine, self.world, job, step, batches, lr=lr, seed=recipe.run.seed, asks=self.asks,
                spikes=self.spikes, lap=meter.watch.lap,
            )  # fmt: skip
            is_finite, stopping = self.engine.was_step_applied(), asked["stopping"] > 0
            norm = float(self.engine.get_global_grad_norm())
            norm = figures.pop("grad_norm", norm) if is_finite else norm  # the first is measured beside Muon
            if is_finite and not self.spikes.is_skipped:
                progress.optimizer_steps += 1
                self.average.update(progress.optimizer_steps)
            if asked["written"] == self.world.size:
                self.tend(self.writer.advance)
            if folder := profiled.end(step + 1):
                telemetry.say(f"profile of steps {profiled.first} to {profiled.last}: {folder}")

            tokens = job.num_tokens(step)
            speed, used = clock.step(tokens), meter.figures(figures.pop("flops", None))
            progress.step, progress.tokens = step + 1, progress.tokens + tokens
            self.watch.pulse(progress.step)
            telemetry.record(
                "train", progress.step, **as_tree({**figures, "grad_norm": norm}), **job.labels(step), lr=lr,
                tokens=progress.tokens, tokens_per_s=speed,
                elapsed_s=progress.elapsed_s + clock.elapsed_s, **used,
                **({"smoothing_floor": floor} if floor else {}),
            )  # fmt: skip
            telemetry.step(progress.step, figures["loss"], clock.tokens_per_s)
            self.check_finite(step, is_finite)
            self.check_spike()

            is_last = progress.step == total
            if is_last or due(progress.step, recipe.eval.every):
                with self.average.served():
                    found = job.evaluate(self.engine)
                telemetry.evaluation(progress.step, found)
                self.check_collapse(found.get("collapse", ""))
                progress.best = self.retention.improved(progress.best, progress.step, found)
            is_best = progress.best.get("step") == progress.step
            is_due = due(progress.step, recipe.checkpoint.every) and not self.spikes.is_open
            if is_last or stopping or is_best or is_due:
                self.save(must_succeed=is_last or stopping)
            if stopping and not is_last:
                self.leave()
            clock.restart()
            meter.watch.begin()
        self.finish()

    def asks(self) -> dict[str, bool]:
        """What this rank has to say at the end of a step; ranks are counted."""
        return {"stopping": self.stop.pending, "written": self.writer.is_ready}

    def check_finite(self, step: int, is_finite: bool) -> None:
        """Counts steps that DeepSpeed skipped, on every rank alike, because a gradient was not finite."""
        self.bad_steps = 0 if is_finite else self.bad_steps + 1
        if is_finite:
            return
        contents = self.job.contents(step)
        named = " and ".join(contents)
        self.telemetry.record("bad_step", step + 1, in_a_row=self.bad_steps, **contents)
        self.telemetry.say(f"step {step + 1}: a gradient is not finite; the step was skipped, its {named} are recorded")
        if self.bad_steps >= self.recipe.train.max_bad_steps:
            self.tend(self.writer.finish)
            raise InputError(
                f"{self.run.path}: {self.bad_steps} steps in a row had a gradient that is not finite, stopped at step "
                f"{step + 1}; lower optim.lr or look at the {named} listed in metrics.jsonl, and start another run.name"
            )

    def check_spike(self) -> None:
        """Says what `Spikes` has found in a step and done about it; rewinds where a stretch of them is to be undone."""
        spikes, step = self.spikes, self.progress.step
        if not spikes.found:
            return
        self.telemetry.record("spike", step, **spikes.found, **self.job.contents(step - 1))
        self.telemetry.say(spikes.in_words())
        if not spikes.is_stretch:
            return
        first = spikes.first
        if spikes.on == "rewind" and rewind(self, first):
            return
        spikes.begin_anew()
        self.telemetry.say(f"step {step}: it has been so since step {first}; compared with what comes from now on")

    def check_collapse(self, reason: str) -> None:
        """Says, or ends the run with, why concepts carry next to no content; not in the first tenth of the steps."""
        recipe, step = self.recipe, self.progress.step
        if not reason or step < recipe.train.steps / 10:
            return
        self.telemetry.record("collapse", step, reason=reason)
        advice = "see conceptron analyze, or start from the text (model.init_queries), hide more, contrast"
        if recipe.train.on_collapse == "warn" or step == recipe.train.steps:
            self.telemetry.say(f"warning: step {step}: the concepts have collapsed: {reason}; {advice}")
            return
        self.save(must_succeed=True)
        raise InputError(
            f"{self.run.path}: stopped at step {step}, the concepts have collapsed: {reason}; {advice}; to go on all "
            "the same: resume=auto train.on_collapse=warn"
        )

    def save(self, must_succeed: bool) -> None:
        """Begins a checkpoint when the one before is done; ``must_succeed``: and waits for its end."""
        elapsed_s = self.progress.elapsed_s + self.clock.elapsed_s
        state = replace(self.progress, elapsed_s=elapsed_s, spikes=self.spikes.state())
        self.tend(self.writer.finish)
        self.tend(lambda: self.writer.save(self.engine, state), must_succeed)
        if must_succeed:
            self.tend(self.writer.finish, must_succeed)

    def tend(self, part: Callable[[], None], must_succeed: bool = False) -> None:
        """A failed periodic save costs a warning; three in a row, or the last one, end the run. Earlier ones stay."""
        saved = self.writer.num_saved
        try:
            part()
            self.failed_saves = 0 if self.writer.num_saved > saved else self.failed_saves
        except OSError as error:
            self.failed_saves += 1
            problem = f"{self.run.checkpoints}: step {self.writer.step} could not be saved: {error}"
            if must_succeed or self.failed_saves >= MAX_FAILED_SAVES:
                raise InputError(f"{problem}; {self.way_back()}") from error
            self.telemetry.say(f"warning: {problem}; training goes on, the next attempt is the next checkpoint")

    def way_back(self, first: str = "make room and ") -> str:
        kept = checkpoint.list_checkpoints(self.run.checkpoints)
        if not kept:
            return f"there is no checkpoint yet; {first}start again with resume=auto"
        return f"{kept[0].name} is intact; {first}go on with resume=auto"

    def leave(self) -> None:
        self.telemetry.say(f"stopped after step {self.progress.step}; go on with resume=auto")
        self.telemetry.close()
        raise SystemExit(128 + (self.stop.signum or signal.SIGTERM))

    def finish(self) -> None:
        try:
            with self.average.served():
                model = self.job.export(self.engine.module, self.run.model)
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
        ranks = f"{world.size} x {world.device.type}"
        ranks += f", {world.sequence_ranks} of which share each text" if world.sequence_ranks > 1 else ""
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters())
        how = f"ZeRO {self.recipe.zero.stage}" + (", compiled" if self.recipe.train.compile else "")
        if self.recipe.ema.decay is not None and self.recipe.ema.use:
            how += f"; evaluations and the model have averaged weights (ema.decay {self.recipe.ema.decay})"
        say(
            f"{self.run.path}: {parameters / 1e6:.1f} M parameters, {self.job.describe()}, "
            f"{ranks}, {self.recipe.train.precision}, {how}"
        )
        if self.job.beginning:
            say(self.job.beginning)
        for name, text in self.job.files.items() if world.is_first else ():
            (self.run.path / name).write_text(text + "\n", encoding="utf-8")
        if self.run.found:
            same = self.progress.identity["topology"] == self.identity["topology"]
            say(
                f"going on from {self.run.found}"
                + ("" if same else ", with other ranks, stage or micro-batches: exact but for rounding")
            )


def topology(recipe: Training, world: World) -> dict[str, int]:
    """What moves nothing but rounding."""
    ranks, stage, micro_tokens = world.size, recipe.zero.stage, recipe.batch.micro_tokens
    shared = {"sequence_ranks": world.sequence_ranks} if world.sequence_ranks > 1 else {}
    return {"ranks": ranks, "stage": stage, "micro_tokens": micro_tokens, **shared}


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def as_tree(figures: dict[str, float]) -> dict[str, Any]:
    """{"terms/vicreg": 1.0} -> {"terms": {"vicreg": 1.0}}"""
    tree: dict[str, Any] = {}
    for name, value in figures.items():
        section, _, figure = name.rpartition("/")
        (tree.setdefault(section, {}) if section else tree)[figure] = value
    return tree
