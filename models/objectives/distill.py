"""Concepts that mean what a sentence encoder says of their text.

B texts, C concepts, S stretches of a text, d model width, e width of the teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..packing import Packed
from ..ranges import LEAST, PLACE, at_least, check, count, given, positive
from ..similarity import product, unit, wide
from .view import View, check_option


@dataclass(frozen=True)
class Lesson:
    """What a teacher says of the texts of a micro-batch."""

    whole: Tensor  # [B, e] float16, of norm 1: of the whole text
    stretches: Tensor  # [B, S, e] float16: of its S equal parts; 0 where a part is too short to mean something
    texts: Packed | None = None  # the clean texts; None: they are what the encoder reads for the task

    @property
    def is_heard(self) -> Tensor:
        """[B, S] bool: the stretches that count."""
        return self.stretches.abs().amax(-1) > 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Lesson":
        texts = None if self.texts is None else self.texts.to(device, non_blocking)
        move = {"device": device, "non_blocking": non_blocking}
        return replace(self, whole=self.whole.to(**move), stretches=self.stretches.to(**move), texts=texts)


@dataclass(frozen=True)
class Distill:
    """Alignment of concepts with a teacher's vectors, and of their similarities with the teacher's.

        loss = weight * ( whole * mean over texts of 1 - cos(mean of the concepts, teacher of the text)
                        + similarity * mean over pairs of texts of (cos of the student - cos of the teacher)^2
                        + stretch * mean over stretches of 1 - cos(mean of the stretch's concepts, teacher of it)
                        + contrast * mean over stretches of -ln softmax over all stretches t of
                                     cos(mean of the stretch's concepts, teacher of t) / temperature, at its own )

    A student of another width than the teacher is first projected. Concepts of a stretch are those whose anchors lie in
    it. They pass one more linear map, the identity at the start, with a vector for each place added, so that what
    concepts have in common there need not mean anything; concepts that start from a backbone's states come without
    their rows already (``ConceptEncoder.meanings``) and pass nothing.

    Source: Hinton et al. 2015 (distillation), arXiv:1503.02531; Reimers & Gurevych 2020 (of sentence vectors),
    arXiv:2004.09813; Tung & Mori 2019 (similarity matching), arXiv:1907.09682.
    """

    teacher: str = given("", PLACE)  # a folder or a hub id of a sentence encoder
    weight: float = positive(1.0)
    whole: float = at_least(0, 1.0)
    similarity: float = at_least(0, 10.0)  # its population is the micro-batch
    stretch: float = at_least(0, 0.0)  # 0: stretches are not asked for
    contrast: float = at_least(0, 0.0)  # its population too; of the texts themselves where stretches are not asked for
    temperature: float = positive(0.05)
    stretches: int = count(8)  # S, a divisor of the number of concepts
    shortest: int = count(8)  # tokens of a stretch that still means something
    max_gib: float = positive(4.0)  # of stored vectors, above which a run does not begin

    def __post_init__(self):
        check_option("teacher", self.teacher, "a folder or a hub id", self.teacher != "")
        check(self)
        check_option("whole", self.whole, "a number above 0 where similarity, stretch and contrast are 0",
                     max(self.whole, self.similarity, self.stretch, self.contrast) >= LEAST)  # fmt: skip

    @property
    def num_stretches(self) -> int:
        """S, or 0 where they are not asked for."""
        return self.stretches if self.stretch > 0 else 0


class Distillation(nn.Module):
    """The loss of ``Distill``, and the maps that belong to it; they stay behind when training is over."""

    def __init__(self, options: Distill, width: int, teacher_width: int, are_bare: bool = False):
        """``are_bare``: concepts come without what says their place only."""
        super().__init__()
        self.options = options
        self.project = nn.Identity() if width == teacher_width else nn.Linear(width, teacher_width, bias=False)
        self.of_stretch, self.places = None, None
        if options.num_stretches and not are_bare:
            self.of_stretch = nn.Linear(teacher_width, teacher_width, bias=False)
            nn.init.eye_(self.of_stretch.weight)
            self.places = nn.Parameter(torch.zeros(options.num_stretches, teacher_width))

    def whole(self, concepts_BCd: Tensor) -> Tensor:
        """[B, e] of norm 1."""
        return unit(self.project(wide(concepts_BCd).mean(1)))

    def stretches(self, concepts_BCd: Tensor) -> Tensor:
        """[B, S, e] of norm 1.

        Raises:
            ValueError: S is no divisor of C.
        """
        B, C, d = concepts_BCd.shape
        S = self.options.num_stretches
        if C % S:
            raise ValueError(f"concepts: expected a multiple of the S = {S} stretches, got C = {C}")
        means_BSe = self.project(wide(concepts_BCd).view(B, S, C // S, d).mean(2))
        return unit(means_BSe if self.of_stretch is None else self.of_stretch(means_BSe) + self.places)

    def forward(
        self, concepts_BCd: Tensor, lesson: Lesson, num_texts: Tensor | float, num_stretches: Tensor | float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch without ``weight``, 0-d float32, and its parts for the log.

        Args:
            num_texts, num_stretches: of the whole step, over the number of ranks; each mean's divisor.
        """
        options, B = self.options, len(concepts_BCd)
        a_Be, b_Be = self.whole(concepts_BCd), unit(lesson.whole)
        parts = {"whole": (1 - (a_Be * b_Be).sum(-1)).sum() / num_texts}
        if options.similarity > 0:
            others = ~torch.eye(B, dtype=torch.bool, device=a_Be.device)
            gaps = (product(a_Be, a_Be.T) - product(b_Be, b_Be.T)).square() * others
            parts["similarity"] = gaps.sum() / max(B - 1, 1) / num_texts
        compared, taught, count = a_Be, b_Be, num_texts
        if options.num_stretches:
            a_BSe, b_BSe = self.stretches(concepts_BCd), unit(lesson.stretches)
            parts["stretch"] = ((1 - (a_BSe * b_BSe).sum(-1)) * lesson.is_heard).sum() / num_stretches
            compared, taught, count = a_BSe[lesson.is_heard], b_BSe[lesson.is_heard], num_stretches
        if options.contrast > 0:
            scores = product(compared, taught.T) / options.temperature
            own = torch.arange(len(scores), device=scores.device)
            parts["contrast"] = torch.nn.functional.cross_entropy(scores, own, reduction="sum") / count
        loss = sum(getattr(options, name) * part for name, part in parts.items())
        return loss, {f"distill/{name}": part.detach() for name, part in parts.items()}

    @torch.no_grad()
    def agreement(self, concepts_BCd: Tensor, lesson: Lesson) -> Tensor:
        """[4] float64: the sum of the cosines of texts, their number, and the same of stretches."""
        whole_B = (self.whole(concepts_BCd) * unit(lesson.whole)).sum(-1).double()
        sums = [whole_B.sum(), whole_B.new_tensor(len(whole_B))]
        if self.options.num_stretches:
            heard = lesson.is_heard.double()
            cosines_BS = (self.stretches(concepts_BCd) * unit(lesson.stretches)).sum(-1).double()
            return torch.stack([*sums, (cosines_BS * heard).sum(), heard.sum()])
        return torch.stack([*sums, *2 * [whole_B.new_zeros(())]])


def stretch_bounds(num_tokens: int, num_stretches: int) -> list[tuple[int, int]]:
    """(begin, end) of S equal parts of N tokens, in the order of the text: part s from floor(s N / S)."""
    edges = [s * num_tokens // num_stretches for s in range(num_stretches + 1)]
    return list(pairwise(edges))


def num_heard(views: Sequence[View]) -> Tensor:
    """0-d: the stretches that count in all these views."""
    return torch.stack([view.lesson.is_heard.sum() for view in views]).sum()
