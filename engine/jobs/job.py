"""What is trained, apart from how: the one interface between `Trainer` and a kind of training."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class Loss(NamedTuple):
    """Of one micro-batch, so scaled that it adds up over the micro-batches of a step and its mean over ranks is the
    loss of the step, which is how a data-parallel engine treats gradients."""

    loss: Tensor  # 0-d
    figures: dict[str, Tensor]  # for the log, "loss" among them: 0-d, without a graph, scaled in the same way


class Job(Protocol):
    """Everything that `Trainer` and `update` ask about a model and its data; they know nothing else about either.

    A job is built, and its data checked, before the run's folder is touched. It owns no state: batches and whatever is
    random in them are functions of the step, so that a run goes on from the step's number and the weights alone. Ranks,
    seeds of dropout, the optimizer, checkpoints, logging and what happens after a failure belong to the trainer.

    Pre-training on text is one job (`pretraining.py`). Fine-tuning on labelled data would be the next; it supplies
        identity   the rows of its training split, the labels, and a digest of the weights it begins with
        build      an encoder with a head for its labels, first weights from an exported folder
        batches    packed documents with their labels, dealt to steps by `data/loader.py`'s `Batches`
        prepare    the number of labels in the whole step, which each micro-batch's loss is divided by
        loss       cross entropy or squared error over the labels of a micro-batch
        evaluate   the metric on rows held out of the training split, never on those that are reported
        export     the folder of a model for its task, with the names of the labels
    and trains on stored token states where its batches carry them.
    """

    loss_floor: float  # nats: what label smoothing alone keeps the loss above; 0 without
    beginning: str  # after `build`: where the first weights came from, for people; empty: drawn
    files: dict[str, str]  # after `build`: small files for the run's folder, by name

    def identity(self) -> dict[str, dict[str, Any]]:
        """By section, what of the data must not differ when a run is resumed."""

    def describe(self) -> str:
        """The data in a few words."""

    def build(self, is_new: bool) -> nn.Module:
        """The module that is trained, drawn from torch's generator. ``is_new``: no checkpoint fills it. Collective."""

    def batches(self, start: int, stop: int) -> Iterator[list[Any]]:
        """This rank's micro-batches of each of the steps ``start`` to ``stop - 1``; each has ``to(device)``. There are
        as many in every step and on every rank, and some may be empty."""

    def num_tokens(self, step: int) -> int:
        """Read in a step, by all ranks."""

    def flops(self, engine: Any, batches: Sequence[Any]) -> int | None:
        """Of matrix products in the forward and backward pass of these micro-batches; None: nobody has counted."""

    def contents(self, step: int) -> dict[str, Any]:
        """What was in a step, for the record of one that went wrong."""

    def labels(self, step: int) -> dict[str, Any]:
        """What the log says about a step besides its figures."""

    def prepare(self, engine: Any, step: int, batches: Sequence[Any], seeds: Sequence[int]) -> list[dict[str, Any]]:
        """What the forward pass of each micro-batch is given: what depends on the whole step. Collective.

        Args:
            engine: a DeepSpeed engine around what `build` returned.
            batches: on the device.
            seeds: of torch's generator at the start of each micro-batch's pass.
        """

    def loss(self, engine: Any, given: dict[str, Any]) -> Loss:
        """The forward pass of a micro-batch with its part of what `prepare` returned."""

    def after_backward(self, engine: Any, num_batches: int) -> dict[str, Tensor]:
        """Figures of a micro-batch, one of ``num_batches``, that only its backward pass brings."""

    def evaluate(self, engine: Any) -> dict[str, Any]:
        """Figures on held-out data; under "collapse", in words, why the model has collapsed, if it has. Collective."""

    def export(self, module: nn.Module, folder: Path) -> Path:
        """Writes the finished model. Collective. Raises OSError on every rank."""
