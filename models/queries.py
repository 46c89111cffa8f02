"""The concepts before they have read anything.

B sequences, T packed tokens, C concepts, d model width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ConceptConfig
from .packing import Packed
from .positions import segment_offsets


def orthogonal_rows(num_rows: int, width: int) -> Tensor:
    """[C, d] rows of norm sqrt(d), orthogonal in blocks of at most d rows."""
    blocks = [nn.init.orthogonal_(torch.empty(min(width, num_rows - i), width)) for i in range(0, num_rows, width)]
    return torch.cat(blocks) * math.sqrt(width)


class ConceptQueries(nn.Module):
    """The C concepts before they have read anything: [B, C, d]."""

    def __init__(self, config: ConceptConfig):
        super().__init__()
        self.from_segments, self.eps = config.init_queries == "segment", config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.num_concepts, config.hidden_size))

    def forward(self, tokens_Td: Tensor, packed: Packed) -> Tensor:
        B, (C, d) = packed.num_sequences, self.weight.shape
        if not self.from_segments:
            return self.weight.expand(B, C, d)
        offsets = segment_offsets(packed, C)
        # unsafe skips a check of the offsets that would synchronise; they are right by construction
        means = torch.segment_reduce(tokens_Td.float(), "mean", offsets=offsets, axis=0, unsafe=True, initial=0)
        means_BCd = F.rms_norm(means, (d,), eps=self.eps).view(B, C, d)
        return self.weight + means_BCd.to(self.weight.dtype)


class NullConcepts(nn.Module):
    """What the decoder is given where the concepts of a text are withheld: C learned vectors, in their place."""

    def __init__(self, config: ConceptConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_concepts, config.hidden_size))

    def forward(self, concepts_BCd: Tensor, is_withheld_B: Tensor) -> Tensor:
        return torch.where(is_withheld_B[:, None, None], self.weight.to(concepts_BCd.dtype), concepts_BCd)
