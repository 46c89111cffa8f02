"""Fine-tuning of any encoder of transformers, under the recipe, the data and the hold-out of a model of this package.

An example is an input, question and document read together by ``AutoModelForSequenceClassification``; of several
options each is one, with one score.

S inputs, L labels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
)

from ...models.config import ConceptConfig
from ...models.folder import not_finite, of_other_shapes
from ..data.tokenizer import load as load_tokenizer
from ..errors import InputError
from ..export import export_peer
from ..labelled.examples import Example
from ..labelled.joint import NOTE, Input, Joint, Note, Padded
from ..launching.launch import World
from ..model_folder import find, finished, has_tokenizer, in_one_line, kind_of
from ..recipe.finetune import Finetune
from ..saved_model import quiet
from .finetuning import FinetuningJob, Groups


def finetuning(recipe: Finetune, world: World) -> FinetuningJob:
    """The job of a recipe that learns a task, by the model that it begins with. Collective.

    Raises:
        InputError: there is no such model, or the recipe asks for what cannot be done with it.
    """
    source = finished(recipe.source, f"source: {recipe.source}")
    folder = world.first_then_others(lambda: find(source, "source"))
    kind = kind_of(folder, "source")
    if kind is None:
        raise InputError(f"source: {recipe.source}: expected a model folder, there is no config.json")
    return (FinetuningJob if kind == ConceptConfig.model_type else PeerJob)(recipe, world, folder)


class Joined(NamedTuple):
    """A micro-batch: inputs and what is right."""

    inputs: Padded  # S; of options those of a question follow each other
    labels: Tensor  # one for each input, or for each group of options; int64, or float32 values

    def to(self, device: torch.device, non_blocking: bool = False) -> "Joined":
        return Joined(*(part.to(device, non_blocking=non_blocking) for part in self))


class Question(NamedTuple):
    """An example; what `Group` is to a model that reads a document once."""

    inputs: list[Input]  # one, or as many as there are options
    labels: list[float]  # one
    names: list[str]  # one
    document: str

    @property
    def num_tokens(self) -> int:
        return sum(len(each.ids) for each in self.inputs)

    @property
    def content(self) -> bytes:
        return b"".join(each.ids.tobytes() for each in self.inputs)


class Questions(Groups):
    """Micro-batches of whole examples."""

    def __init__(self, questions: Sequence[Question], is_whole: bool, joint: Joint, **order: Any) -> None:
        super().__init__(questions, is_whole, **order)
        self.joint = joint

    def of(self, numbers: Sequence[int]) -> Joined:
        some = [self.groups[int(i)] for i in numbers]
        labels = torch.tensor([each.labels[0] for each in some], dtype=torch.int64 if self.is_whole else torch.float32)
        return Joined(self.joint.pad([one for each in some for one in each.inputs]), labels)


class PeerJob(FinetuningJob):
    """See `Job`."""

    def open(self) -> None:
        recipe, where = self.recipe, f"source: {self.recipe.source}"
        with in_one_line(recipe.source, "source"), quiet():
            self.source = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        self.refuse()
        if not has_tokenizer(self.folder):
            raise InputError(f"{where}: no tokenizer.json; an encoder reads text in its own tokens")
        self.tokenizer = load_tokenizer(str(self.folder), "source")
        with in_one_line(recipe.source, "source"), torch.device("meta"):
            bare = AutoModel.from_config(self.source)
        self.joint = Joint(self.tokenizer, bare, self.task, recipe.task.max_tokens, where)

    def refuse(self) -> None:
        """What a recipe may ask of a model of this package only.

        Raises:
            InputError: the recipe asks for it.
        """
        recipe, kind = self.recipe, self.source.model_type
        if self.source.is_encoder_decoder or type(self.source) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise InputError(f"source: {recipe.source}: expected an encoder that transformers classifies texts with, "
                             f"got {kind}")  # fmt: skip
        for name in recipe.model:
            raise InputError(f"model.{name}: a field of this package's models, and {recipe.source} is a {kind}; leave "
                             "them out with model={}")  # fmt: skip
        asked = {"task.states_gb": recipe.task.states_gb, "optim.muon": recipe.optim.muon} | {
            f"train.{name}": getattr(recipe.train, name) for name in ("keep", "checkpoint_backbone", "compile")
        }
        for name, value in asked.items():
            if value not in (None, False):
                raise InputError(f"{name}: expected nothing: it is for this package's models, and {recipe.source} is a "
                                 f"{kind}")  # fmt: skip

    def grouped(self, given: Sequence[Example]) -> list[Question]:
        return [Question(inputs, [each.truth], [each.id], each.document)
                for each, inputs in zip(given, self.joint.read(given), strict=True)]  # fmt: skip

    def dealt(self, groups: Sequence[Question], **order: Any) -> Questions:
        return Questions(groups, self.is_whole, self.joint, **order)

    def cut(self) -> str:
        every = [each for part in (self.loader, self.held_out) for each in part.groups]
        cut = {each.names[0] if self.is_pair else each.document for each in every
               if any(one.is_cut for one in each.inputs)}  # fmt: skip
        what = "pairs" if self.is_pair else "documents"
        return f", {len(cut)} {what} cut at the {self.joint.limit} tokens of an input" if cut else ""

    def build_config(self) -> Any:
        config = self.source
        for name, value in self.of_head().items():
            setattr(config, name, value)
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = self.joint.pad_id
        setattr(config, NOTE, Note(self.task.name, self.joint.limit, self.middle, self.spread)._asdict())
        config.dtype, config.return_dict = torch.float32, True
        return config

    def build(self, is_new: bool) -> nn.Module:
        recipe, config = self.recipe, self.build_config()
        with in_one_line(recipe.source, "source"), quiet():
            if is_new:
                model, drawn = load_with_head(self.folder, config)
                self.beginning = f"from {recipe.source}: drawn are {', '.join(drawn) or 'no weights, all are there'}"
            else:
                model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        if recipe.learned == "head":
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not is_body(model, name))
        if recipe.train.recompute:
            if not model.supports_gradient_checkpointing:
                raise InputError(f"train.recompute: expected false: a {config.model_type} of transformers cannot")
            model.activation_checkpointing_enable({"use_reentrant": False})
        return Judge(model, self.num_options, None if self.is_whole else (self.middle, self.spread))

    def flops(self, engine: Any, batches: Sequence[Joined]) -> None:
        """Not counted: transformers does not say what a pass of its models takes."""

    def export(self, module: nn.Module, folder: Path) -> Path:
        longest = max(len(one.ids) for each in self.loader.groups for one in each.inputs)
        return export_peer(self.world, module.model, self.tokenizer, folder, self.about(longest))


def load_with_head(folder: Path, config: Any) -> tuple[nn.Module, list[str]]:
    """(the model of a configuration with the weights of a folder, names of those that it lacks and that are drawn)

    Raises:
        ValueError: a weight of the encoder itself is missing, has another shape, or is not finite.
    """
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, config=config, trust_remote_code=False, use_safetensors=True, dtype=torch.float32,
        output_loading_info=True, ignore_mismatched_sizes=True,
    )  # fmt: skip
    if missing := sorted(name for name in info["missing_keys"] if is_body(model, name)):
        raise ValueError(f"{folder}: {len(missing)} weights are missing, {missing[0]} among them; get the model again")
    shapes = info["mismatched_keys"]
    if problem := of_other_shapes({"mismatched_keys": [each for each in shapes if is_body(model, each[0])]}):
        raise ValueError(f"{folder}: {problem}; get the model again")
    if problem := not_finite(model.state_dict().items()):
        raise ValueError(f"{folder}: {problem}; get the model again")
    return model, sorted({*info["missing_keys"], *(name for name, *_ in shapes)})


def is_body(model: nn.Module, name: str) -> bool:
    """Whether a weight is of the encoder itself; what pools its states belongs to the head."""
    return name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name


class Judge(nn.Module):
    """A model of transformers with its loss, over the whole step."""

    def __init__(self, model: nn.Module, num_options: int | None, scaling: tuple[float, float] | None) -> None:
        """``scaling``: offset and scale of values; None: labels."""
        super().__init__()
        self.model, self.num_options, self.scaling = model, num_options, scaling

    def forward(self, asked: Joined, divisor: Tensor) -> tuple[Tensor, Tensor]:
        """(the sum of the losses over ``divisor``, 0-d; logits, [S, L], of options [groups, options])"""
        num_inputs = len(asked.labels) * (self.num_options or 1)  # a batch of none has a row of padding
        logits = scores(self.model, asked.inputs)[:num_inputs]
        if self.num_options:
            logits = logits.view(-1, self.num_options)
        if self.scaling is None:
            return F.cross_entropy(logits, asked.labels, reduction="sum") / divisor, logits
        offset, scale = self.scaling
        losses = (logits[:, 0] - (asked.labels - offset) / scale).square()
        return losses.sum() / divisor, offset + scale * logits


def scores(model: nn.Module, inputs: Padded) -> Tensor:
    """[S, L] float32."""
    given = {name: part for name, part in inputs._asdict().items() if part is not None}
    return model(**given).logits.float()
