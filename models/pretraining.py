"""Pretraining: a masked language model with everything that is only there to train it.

B texts of a micro-batch, C concepts, d model width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .ablation import ablated
from .masked_lm import ConceptForMaskedLM, ConceptMaskedLMOutput
from .objectives.contrastive import Contrastive, Temperature
from .objectives.distill import Distillation, Lesson, num_heard
from .objectives.read_back import StateReader
from .objectives.view import Pair, View, check_option
from .packing import Packed
from .ranges import one_of, positive, share, switch
from .regularizers import Regularization, Regularizer


@dataclass(frozen=True)
class ContrastiveTerm(Contrastive):
    """``Contrastive``, and how it is added to the loss of the task.

        loss = task + weight * contrastive

    ``start``: the share of the run that is over before it begins.
    ``learnable_temperature``: ``temperature`` is where it starts, and it never falls below ``temperature_floor``.
    ``negatives``, for each text:
        "step"         all other texts of the step. Where a step has several micro-batches, the pairs of all are first
                       encoded without a graph, for the loss and its gradient by what it compares, then once more, each
                       micro-batch with its share of that gradient (Gao et al. 2021, GradCache, arXiv:2101.06983). The
                       result does not depend on how a step is cut; it costs one more forward pass over the pairs.
        "micro_batch"  the texts of the same micro-batch on all ranks. Nothing extra, and fewer negatives.
    """

    weight: float = positive(0.1)
    start: float = share(0.0)
    learnable_temperature: bool = switch()
    temperature_floor: float = positive(0.01)
    negatives: str = one_of("step", "micro_batch")

    def __post_init__(self):
        super().__post_init__()
        if self.learnable_temperature:
            expected = f"a number above temperature_floor = {self.temperature_floor:g}"
            check_option("temperature", self.temperature, expected, self.temperature > self.temperature_floor)


class Totals(NamedTuple):
    """Sums over all micro-batches of all ranks of a step, divided by the number of ranks; 0-d float32 each.

    What is divided by them adds up over micro-batches, and its mean over ranks is the figure of the whole step, which
    is how a data-parallel engine treats gradients.
    """

    divisor: Tensor  # of the task
    num_pairs: Tensor  # texts in the contrastive loss
    num_texts: Tensor
    num_stretches: Tensor | None = None  # of texts that a teacher speaks of

    @classmethod
    def of(
        cls, views: Sequence[View], sum_of_ranks: Callable[[Tensor], Tensor] = lambda sums: sums, num_ranks: int = 1
    ) -> "Totals":
        """``views``: the micro-batches of this rank."""
        divisor = torch.stack([view.divisor for view in views]).sum()
        ids = [view.pair.ids for view in views if view.pair is not None]
        num_pairs = (torch.cat(ids) >= 0).sum() if ids else torch.zeros_like(divisor)
        num_texts = torch.full_like(divisor, sum(view.encoder.num_sequences for view in views))
        num_stretches = num_heard(views) if views[0].lesson is not None else torch.zeros_like(divisor)
        sums = sum_of_ranks(torch.stack([divisor, num_pairs.to(divisor), num_texts, num_stretches.to(divisor)]))
        return cls(*(torch.where(sums > 0, sums, 1.0) / num_ranks))


class Compared(NamedTuple):
    """What a contrastive loss is a function of, or its gradient by each."""

    a: Tensor  # [B, e] what `Contrastive.embed` makes of the first views' concepts, float32
    b: Tensor  # [B, e] of the second
    temperature: Tensor  # 0-d


class Cached(NamedTuple):
    """What a pass ahead over all pairs of a step has found, as far as one micro-batch needs it."""

    loss: Tensor  # 0-d, of the step in its first micro-batch, and 0 in the others, as is the temperature's gradient
    gradient: Compared


class PretrainingOutput(NamedTuple):
    loss: Tensor  # 0-d
    figures: dict[str, Tensor]  # for the log, 0-d and without a graph: sums over micro-batches, means over ranks


class Pretraining(nn.Module):
    """loss = task + weight * contrastive + weight * distill + regularisation, where the last three are asked for.

    The regularisers see the concepts from which the task is answered (without a task: those of the whole text if there
    is a teacher, else the first view of each pair), with their gradient capped. Their population is the micro-batch: a
    term over the batch depends on its size. Only ``model`` is what training is for; the parameters of temperature,
    weighting and a teacher's maps stay behind.
    """

    def __init__(
        self, model: ConceptForMaskedLM, contrastive: ContrastiveTerm | None = None,
        regularization: Regularization | None = None, has_task: bool = True, distillation: Distillation | None = None,
        state_reader: StateReader | None = None,
    ):  # fmt: skip
        super().__init__()
        self.distillation, self.state_reader = distillation, state_reader
        self.model, self.contrastive, self.has_task = model, contrastive, has_task
        learns = contrastive is not None and contrastive.learnable_temperature
        self.temperature = Temperature(contrastive.temperature, contrastive.temperature_floor) if learns else None
        self.regularizer = None if regularization is None else Regularizer(regularization)
        if not has_task:  # weight decay alone must not move a decoder
            of_encoder = {id(parameter) for parameter in model.encoder.parameters()}
            for parameter in model.parameters():
                parameter.requires_grad_(parameter.requires_grad and id(parameter) in of_encoder)

    def forward(
        self, view: View | None = None, *, totals: Totals | None = None, step: int = 0, smoothing: float = 0.0,
        num_iterations: int | None = None, cached: Cached | None = None, pair: Pair | None = None,
        encoder: Packed | None = None, return_nll: bool = False, lesson: Lesson | None = None,
        return_states: bool = False, num_concepts: int | None = None,
    ) -> PretrainingOutput | ConceptMaskedLMOutput | Compared | Tensor:  # fmt: skip
        """
        Args:
            view: a micro-batch, with ``totals`` of its step; left out: it is all of it. Steps are counted from 0.
            num_iterations: of a tied encoder, the same on every rank and for all micro-batches of a step.
            cached: where negatives come from the whole step and that has several micro-batches.
            return_nll: instead, the loss of each target of the view, for evaluation.
            return_states: instead, how well the backbone's states of its targets are read, see ``states_read``.
            pair: instead of a view, what is to be compared, with the ``encoder`` batch that it may share. The random
                numbers that dropout draws for it are those that a pass with the view draws from the same state.
            num_concepts: C of the texts of a pair or a lesson; a view says its own.
            lesson: instead of a view, how far the concepts of its texts agree with it, see ``Distillation.agreement``.
        """
        if return_nll:
            return self.model(view=view, return_nll=True)
        if return_states:
            return self.states_read(view)
        if pair is not None:
            texts_BCd = self.encode(pair.texts, num_iterations, num_concepts)
            first_BCd = self.encode(encoder, num_iterations, num_concepts) if pair.shares_encoder else None
            return self.compared(pair, texts_BCd, first_BCd)
        if lesson is not None:
            read_BCd = self.encode(lesson.texts, num_iterations, num_concepts)
            return self.distillation.agreement(self.meanings(read_BCd), lesson)
        totals = Totals.of([view]) if totals is None else totals
        pair, C, figures, loss = view.pair, view.num_concepts, {}, 0.0
        if self.state_reader is not None:
            view = self.with_states(view)
        texts_BCd = None if pair is None else self.encode(pair.texts, num_iterations, C)  # first, see ``pair`` above
        encoded = self.model.encode(view.encoder, num_iterations, C) if self.has_task else None
        if self.has_task:
            z_BCd = encoded.last_hidden_state
        else:
            is_taught = view.lesson is not None
            z_BCd = self.encode(view.encoder, num_iterations, C) if is_taught else texts_BCd.chunk(2)[0]
        z_BCd, for_terms_BCd = (z_BCd, None) if self.regularizer is None else self.regularizer.cap(z_BCd)
        if self.has_task:
            encoded.last_hidden_state = z_BCd
            of_step = replace(view, divisor=totals.divisor)
            reads = self.state_reader is not None
            task = self.model(view=of_step, encoded=encoded, smoothing=smoothing, output_token_states=reads)
            loss = task.loss
            figures["task"] = loss.detach()
            if reads:
                error = self.state_reader(task.token_states, view, self.centred(view), totals.divisor)
                loss = loss + self.state_reader.options.states * error
                figures["state_error"] = error.detach()
            if encoded.convergence is not None:  # of the last iteration, averaged over texts
                figures["convergence"] = encoded.convergence[-1].sum() / totals.num_texts
        if pair is not None:
            is_first = pair.shares_encoder or not (self.has_task or view.lesson)
            compared = self.compared(pair, texts_BCd, z_BCd if is_first else None)
            contrast = self.contrast(compared, pair.ids, totals, cached)
            loss = loss + self.contrastive.weight * contrast
            share = (pair.ids >= 0).sum() / totals.num_pairs
            figures |= {"contrastive": contrast.detach(), "temperature": share * compared.temperature.detach()}
        if view.lesson is not None:
            texts = view.lesson.texts
            taught_BCd = self.meanings(z_BCd if texts is None else self.encode(texts, num_iterations, C))
            distill, parts = self.distillation(taught_BCd, view.lesson, totals.num_texts, totals.num_stretches)
            loss = loss + self.distillation.options.weight * distill
            figures |= {"distill/loss": distill.detach(), **parts}
        if self.regularizer is not None:
            added, share = self.regularizer(for_terms_BCd, step), len(z_BCd) / totals.num_texts
            loss = loss + share * added.loss
            figures["regularization"] = share * added.loss.detach()
            for kind, values in (("terms", added.terms), ("weights", added.weights)):
                figures |= {f"{kind}/{name}": share * value for name, value in values.items()}
        return PretrainingOutput(loss, {"loss": loss.detach(), **figures})

    def encode(self, packed: Packed, num_iterations: int | None, num_concepts: int | None = None) -> Tensor:
        """[B, C, d]"""
        given = {"num_iterations": num_iterations, "num_concepts": num_concepts}
        return self.model.encoder(packed=packed, **given).last_hidden_state

    def with_states(self, view: View) -> View:
        """With the backbone's states of what the encoder reads: stored, or computed here and only here."""
        encoder = view.encoder
        if encoder.states is not None:
            return view
        return replace(view, encoder=encoder._replace(states=self.model.encoder.backbone(encoder)))

    def centred(self, view: View) -> Tensor:
        return self.model.encoder.backbone.centred(view.encoder.states)

    def states_read(self, view: View) -> Tensor:
        """[3] float64: squared errors of the states of a view's targets read from its concepts, the same from concepts
        that are zero, both as sums, and the number of targets."""
        view = self.with_states(view)
        encoded = self.model.encode(view.encoder, num_concepts=view.num_concepts)
        sums = [
            self.state_reader.errors(
                self.model.decode_view(ablated(encoded, ablate), view), view, self.centred(view)
            ).double().sum()
            for ablate in (None, "zero")
        ]  # fmt: skip
        return torch.stack([*sums, sums[0].new_tensor(view.num_targets)])

    def meanings(self, concepts_BCd: Tensor) -> Tensor:
        return self.model.encoder.meanings(concepts_BCd)

    def compared(self, pair: Pair, texts_BCd: Tensor, first_BCd: Tensor | None) -> Compared:
        """``first_BCd``: concepts of the first views, where they are not those of ``texts_BCd``."""
        first, second = (first_BCd, texts_BCd) if pair.shares_encoder else texts_BCd.chunk(2)
        if self.temperature is None:
            temperature = second.new_full((), self.contrastive.temperature, dtype=torch.float32)
        else:
            temperature = self.temperature()
        first = first if first_BCd is None else first_BCd
        return Compared(self.contrastive.embed(first), self.contrastive.embed(second), temperature)

    def contrast(self, compared: Compared, ids: Tensor, totals: Totals, cached: Cached | None) -> Tensor:
        """The contrastive loss of a micro-batch, 0-d: of its own texts, or its part of what is cached."""
        if cached is None:
            return self.contrastive.loss_of(compared.a, compared.b, ids, compared.temperature, totals.num_pairs)
        slope = sum((value * gradient).sum() for value, gradient in zip(compared, cached.gradient, strict=True))
        return cached.loss + slope - slope.detach()  # the value of the one, the gradient of the other

    def share_texts(self, group: ProcessGroup | None) -> None:
        """From now on the devices of ``group`` each hold a part of every text: views are ``sharding.shard_view``."""
        self.model.encoder.group = group
        if self.regularizer is not None:
            self.regularizer.cap.group = group

    @property
    def cap_scale(self) -> Tensor | None:
        """What the regularisers' gradient was multiplied by in the last backward pass, 0-d; None without a cap."""
        return None if self.regularizer is None else self.regularizer.cap.scale


def cache(parts: list[Compared], ids: list[Tensor], contrastive: Contrastive, totals: Totals) -> list[Cached]:
    """The contrastive loss over all micro-batches of a step, and for each of them its gradient. Collective.

    ``parts`` and ``ids``: of each micro-batch of this rank, encoded without a graph.
    """
    a, b = torch.cat([part.a for part in parts]), torch.cat([part.b for part in parts])
    leaves = [x.detach().requires_grad_() for x in (a, b, parts[0].temperature)]
    with torch.enable_grad():
        loss = contrastive.loss_of(*leaves[:2], torch.cat(ids), leaves[2], totals.num_pairs)
    *by_view, by_temperature = torch.autograd.grad(loss, leaves)
    sizes = [len(each) for each in ids]
    splits = zip(*(gradient.split(sizes) for gradient in by_view), strict=True)
    is_first = [1.0] + [0.0] * (len(parts) - 1)
    return [
        Cached(loss.detach() * first, Compared(*views, by_temperature * first))
        for views, first in zip(splits, is_first, strict=True)
    ]
