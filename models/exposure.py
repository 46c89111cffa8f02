"""What the decoder gets of the concepts: all of them, a part, or for some texts none.

B sequences, C concepts, K of them that are kept, d model width.
"""

import torch
from torch import Tensor, nn

from .config import ConceptConfig
from .queries import NullConcepts


def nested_order(num_concepts: int, device: torch.device | str = "cpu") -> Tensor:
    """[C] int64, the order in which concepts are kept: any first K of them are spread evenly over the text.

    Bit reversal (van der Corput 1935): 0, 1/2, 1/4, 3/4, 1/8, ... of C, with the indices that a power of two would
    have beyond C left out. Each K adds one concept to those of K - 1.
    """
    index_C = torch.arange(num_concepts, device=device)
    num_bits = (num_concepts - 1).bit_length()
    reversed_C = torch.zeros_like(index_C)
    for bit in range(num_bits):
        reversed_C += (index_C >> bit & 1) << (num_bits - 1 - bit)
    return reversed_C.argsort()


class Exposure(nn.Module):
    """In training, withholds concepts from the decoder, so that each has to be useful by itself:

    ``condition_dropout``: for this share of the texts, drawn each by itself, all concepts are replaced by the null
        concepts; anchors stay, so that the length of the text is still known. Source: Ho & Salimans 2022
        (classifier-free guidance), arXiv:2207.12598.
    ``nested_concepts``: the first k in ``nested_order`` are kept, k drawn evenly from 1 .. C. Source: Kusupati et al.
        2022 (Matryoshka), arXiv:2205.13147.

    Which ones is the same for a whole micro-batch: concepts are then simply fewer, [B, K, d], and no operator needs a
    mask. Draws come from torch's generators, as dropout does; that of k from the one of the CPU, since it is a size;
    torch.compile breaks the graph there.
    """

    def __init__(self, config: ConceptConfig):
        super().__init__()
        self.null = NullConcepts(config) if config.condition_dropout > 0 else None
        self.condition_dropout = config.condition_dropout
        self.nested = config.nested_concepts

    def forward(
        self, concepts_BCd: Tensor, anchors_BC: Tensor, num_concepts: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Concepts [B, K, d] and anchors [B, K]; outside training all, or the first ``num_concepts`` if that is given.

        Raises:
            ValueError: ``num_concepts`` lies outside 1 .. C.
        """
        (B, C, _), device = concepts_BCd.shape, concepts_BCd.device
        if num_concepts is not None and not 1 <= num_concepts <= C:
            raise ValueError(f"num_concepts: expected 1 to the model's C = {C}, got {num_concepts}")
        if self.training and self.null is not None:
            concepts_BCd = self.null(concepts_BCd, torch.rand(B, device=device) < self.condition_dropout)
        kept = C if num_concepts is None else num_concepts
        if self.training and self.nested and num_concepts is None:
            kept = int(torch.randint(1, C + 1, ()))
        if kept == C:
            return concepts_BCd, anchors_BC
        order_K = nested_order(C, device)[:kept].sort().values
        return concepts_BCd[:, order_K], anchors_BC[:, order_K]

    def withhold(self, concepts_BCd: Tensor) -> Tensor:
        """The null concepts [B, C, d] in place of these.

        Raises:
            ValueError: the model was not trained with ``condition_dropout``.
        """
        if self.null is None:
            raise ValueError("guidance: expected 0 for a model without null concepts; train it with condition_dropout")
        return self.null(concepts_BCd, concepts_BCd.new_ones(len(concepts_BCd), dtype=torch.bool))
