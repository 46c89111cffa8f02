"""All that is known about a subject when its report is written, and how it is put in words."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...engine.errors import InputError
from ...engine.telemetry import duration, read_history
from ...models.folder import read_json
from ..measure import environment
from . import gates, heldout
from .does import Does, does
from .geometry import metrics
from .known import of_losses, of_training
from .probes import Probe, probes
from .reads import Reads, reads
from .subject import Subject

NATS = "nats per token"


class Training(NamedTuple):
    """What metrics.jsonl says about a run; None where it says nothing."""

    steps: int
    tokens: int | None
    train_seconds: float | None
    tokens_per_s: float | None
    peak_memory_bytes: int | None


class Findings(NamedTuple):
    """All that a report tells."""

    subject: Subject
    history: list[dict[str, Any]]  # the lines of metrics.jsonl; empty for a bare checkpoint
    training: Training | None
    losses: heldout.Losses | None  # None for an encoder without a decoder
    concepts: heldout.Concepts
    geometry: dict[str, float]
    reads: Reads | None  # None where there is no attention map of single tokens
    does: Does | None  # None for an encoder without a decoder
    probes: list[Probe]
    figures: dict[str, float | None]  # all of them by name
    verdicts: list[gates.Verdict]
    samples: list[heldout.Sample]
    environment: dict[str, Any]  # in which the report was made


def find(subject: Subject) -> Findings:
    """
    Raises:
        InputError: a model with a single concept, of which there is nothing to compare.
    """
    if subject.encoder.config.num_concepts < 2:
        raise InputError(f"{subject.folder}: expected a model with two concepts or more, got one: nothing to compare")
    history = read_history(subject.folder / "metrics.jsonl")
    subject.model.eval()
    run_environment(subject.folder)  # read later; that it can be read is known before anything is measured
    with a_second_thread() as second:
        asked = second.submit(losses_of, subject)  # about as much as all the rest
        concepts = heldout.concepts(subject.encoder, subject.loader)
        geometry = metrics.geometry(concepts.values)
        read = reads(subject.encoder, subject.loader, subject.tokenizer)
        usage = [slot.usage for slot in read.slots] if read else None
        done = does(subject.model, subject.loader, usage) if subject.can_predict else None
        probed = probes(subject.encoder, subject.loader)
        losses, samples = asked.result()
    figures = {
        **geometry, **(of_losses(asdict(losses)) if losses else {}), **(read.figures if read else {}),
        **(done.figures if done else {}), **of_training(history, objective_name(subject)),
    }  # fmt: skip
    return Findings(
        subject=subject,
        history=history,
        training=training_of(history),
        losses=losses,
        concepts=concepts,
        geometry=geometry,
        reads=read,
        does=done,
        probes=probed,
        figures=figures,
        verdicts=gates.judge(figures, int(geometry["num_concepts"]), gates.read_gates()),
        samples=samples,
        environment=environment.environment(subject.seed),
    )


def losses_of(subject: Subject) -> tuple[heldout.Losses | None, list[heldout.Sample]]:
    if not subject.can_predict:
        return None, []
    losses = heldout.losses(subject.model, subject.loader, subject.train, subject.num_tokens)
    return losses, heldout.samples(subject.model, subject.loader, subject.tokenizer, from_concepts=losses.is_seen)


@contextlib.contextmanager
def a_second_thread() -> Iterator[Executor]:
    """A thread beside this one; each has half of the cores. A small model's operations are too small to be divided."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, num_threads // 2))
    try:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="losses") as second:
            yield second
    finally:
        torch.set_num_threads(num_threads)


def training_of(history: Sequence[Mapping[str, Any]]) -> Training | None:
    steps = [line for line in history if line["kind"] == "train"]
    if not steps:
        return None
    last = steps[-1]
    end = next((line for line in reversed(history) if line["kind"] == "end"), {})
    return Training(
        steps=last["step"],
        tokens=end.get("tokens", last.get("tokens")),
        train_seconds=end.get("train_seconds", last.get("elapsed_s")),
        tokens_per_s=end.get("tokens_per_s"),
        peak_memory_bytes=end.get("peak_memory_bytes"),
    )


# --- in words ---------------------------------------------------------------------------------------------------------


def objective_name(subject: Subject) -> str:
    name = subject.recipe.objective["name"] if subject.recipe else type(subject.loader.objective).__name__.lower()
    taught = getattr(subject.model.config, "distilled_from", None)
    return f"{name}, distilled from {taught['teacher']}" if taught else name


def training_line(findings: Findings) -> str:
    training, subject = findings.training, findings.subject
    parts = [objective_name(subject), f"{num_parameters(subject) / 1e6:.1f} M parameters", f"{training.steps:,} steps"]
    if training.tokens:
        parts.append(f"{training.tokens / 1e6:.1f} M tokens")
    if training.train_seconds:
        parts.append(f"{duration(training.train_seconds)} on {device_name(findings)}")
    return ", ".join(parts)


def targets_line(losses: heldout.Losses) -> str:
    if losses.is_seen:
        return f"{losses.num_targets:,} tokens that the encoder SAW: copying, not to be held against an entropy"
    return f"{losses.num_unseen:,} tokens that the encoder did not see"


def num_parameters(subject: Subject) -> int:
    return sum(parameter.numel() for parameter in subject.model.parameters())


def device_name(findings: Findings) -> str:
    environment = run_environment(findings.subject.folder) or findings.environment
    name, threads = environment.get("device", "cpu"), environment.get("num_threads", environment.get("threads", 1))
    threads *= environment.get("world_size", 1)
    return name if name != "cpu" else f"{threads} CPU thread{'s' * (threads != 1)}"


def run_environment(folder: Path) -> dict[str, Any]:
    """environment.json of a run: where it was trained, which need not be where the report is made."""
    path = folder / "environment.json"
    if not path.is_file():
        return {}
    try:
        found = read_json(path)
    except ValueError as error:
        raise InputError(f"{error}, or move it away") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected an object; restore it or move it away")
    return found


def label_smoothing(subject: Subject) -> float:
    return subject.recipe.train.label_smoothing if subject.recipe else 0.0


def vocab_size(subject: Subject) -> int:
    return subject.model.config.vocab_size
