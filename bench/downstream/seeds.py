"""The protocol of the seeds of this project: what their notes say of a fine-tuning run, as overrides of a recipe."""

from collections.abc import Sequence
from pathlib import Path

from ...engine.errors import InputError
from ...engine.labelled.examples import several
from ...engine.labelled.task import Task
from .readers import ConceptReader, PeerReader

RECIPE, RATE, PAIRS = "finetune/seeds.yaml", 1e-5, 96
EPOCHS = {"glue/mrpc": 20, "glue/stsb": 20, "paws": 5, "sick/relatedness": 10, "sick/entailment": 10}
ON_DEVELOPMENT = ("glue/mrpc", "glue/stsb")  # whose test labels are hidden: the seeds report the development split


def report_of(task: Task) -> tuple[str, ...]:
    """
    Raises:
        InputError: the notes do not say how the task was run.
    """
    if task.name not in EPOCHS:
        raise InputError(f"--protocol seeds: {task.name}: expected one of {', '.join(EPOCHS)}; the notes have no other")
    return ("validation",) if task.name in ON_DEVELOPMENT else tuple(task.splits.report)


def overrides(
    task: Task, reader: ConceptReader | PeerReader, splits: Sequence[str], data: Path | None, limit: int | None
) -> list[str]:  # fmt: skip
    """Steps and batch in tokens, for the epochs and pairs a step of the notes."""
    given = several(task, splits or task.splits.train, data, limit)
    if isinstance(reader, PeerReader):
        lengths = [sum(len(one.ids) for one in inputs) for inputs in reader.joint(task, given)[1]]
        longest = max(lengths)
    else:
        lengths = list(map(len, reader.vocabulary.encode([t for e in given for t in (e.question, e.document)])))
        longest = 2 * max(lengths)
    room = max(longest, round(PAIRS * sum(lengths) / len(given)))
    steps = max(1, round(EPOCHS[task.name] * len(given) / PAIRS))
    return [f"train.steps={steps}", f"batch.tokens={room}", f"batch.micro_tokens={room}"]
