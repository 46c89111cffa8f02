"""The schema of a recipe that fine-tunes: a finished model, and one of the tasks that ship with the package."""

from typing import Any, Literal

from pydantic import Field

from ...models.config import ConceptConfig
from ...models.decisions import FIELDS
from ..errors import InputError
from ..labelled.task import Task, load_task
from . import kinds
from .checker import unknown
from .reader import one_line
from .schema import Section, Training

OF_THE_TASK = ("num_labels", "problem_type", "label_offset", "label_scale")  # fields of ConceptConfig that it decides


class Learned(Section):
    """What is learned from: a split of a task, less the part that says when it is learned."""

    name: kinds.Text  # such as glue/stsb
    data: kinds.PathOrNothing = None  # a folder with it; none: the hub
    train: list[kinds.Text] = Field(default_factory=list)  # splits, in place of the task's own
    limit: kinds.Count | None = None  # pairs, or documents
    fold: kinds.CountOrZero = 0  # which draw of the training split is held out, to choose by
    max_tokens: kinds.Count = 65536  # of a text, or of what a model of transformers reads at once, within its own
    # limit; the rest of a longer one is not read, which the log says
    cache: kinds.PathOrNothing = None  # where stored states are kept
    states_gb: kinds.Positive | None = None  # room for the states of a frozen backbone, made once


class Finetune(Training):
    """One run that learns a task. `model` holds fields of `ConceptConfig` that differ from those of the source; a model
    of transformers has none."""

    source: kinds.Path  # a folder, a run, or a hub id: of a model of this package, or any encoder of transformers
    task: Learned
    model: dict[str, Any] = Field(default_factory=dict)
    learned: Literal["head", "all"] = "all"  # head: the encoder stays as it is

    def open_task(self) -> Task:
        """
        Raises:
            InputError: there is no such task, or none that is learned from labels.
        """
        task = load_task(self.task.name)
        if task.answer not in ("labels", "values", "choice") or not (self.task.train or task.splits.train):
            raise InputError(f"task.name: {task.name} is not learned: it has no labels to learn from")
        return task

    def build_config(self, source: ConceptConfig, task: Task, **labels: Any) -> ConceptConfig:
        """The source's configuration with the recipe's fields, and what the task decides.

        Raises:
            InputError: a field is unknown or does not fit.
        """
        for name in self.model:
            if name in OF_THE_TASK:
                raise InputError(f"model.{name}: the task decides it; leave it out")
            if name not in FIELDS:
                raise InputError(f"model.{name}: {unknown(name, FIELDS)}")
        names = {name: value for name, value in source.to_dict().items() if name not in ("id2label", "label2id")}
        try:
            return ConceptConfig.from_dict({**names, **self.model, **labels})
        except (ValueError, TypeError) as error:
            raise InputError(f"model: {one_line(error)}") from error


def is_finetune(tree: dict[str, Any]) -> bool:
    return "task" in tree and "objective" not in tree
