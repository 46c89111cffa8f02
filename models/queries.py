"""The concepts before they have read anything.

B sequences, T packed tokens, C concepts, d model width.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .config import ConceptConfig
from .packing import Packed
from .positions import anchor_fractions, segment_offsets, sinusoids
from .sharding import sum_shards, summed
from .shares import share_means
from .similarity import wide
from .start.resize import resize
from .token_source import TokenSource, plain_means


def orthogonal_rows(num_rows: int, width: int) -> Tensor:
    """[C, d] rows of norm sqrt(d), orthogonal in blocks of at most d rows."""
    blocks = [nn.init.orthogonal_(torch.empty(min(width, num_rows - i), width)) for i in range(0, num_rows, width)]
    return torch.cat(blocks) * math.sqrt(width)


def concept_rows(module: nn.Module, name: str, num_concepts: int) -> Tensor:
    """[C, d] the parameter of this name with C rows, as the module's RESIZE says, if it has another number.

    Raises:
        ValueError: it has one row only.
    """
    rows = getattr(module, name)
    if len(rows) == num_concepts:
        return rows
    what = f"num_concepts {len(rows)} -> {num_concepts}: {name}"
    return resize(rows, (num_concepts, rows.shape[1]), module.RESIZE[name], what)


class AnchorFeatures(nn.Module):
    """[C] anchors as shares of the text -> [C, d] rows of norm sqrt(d), through a small network, for any C at all.

    The features are sin and cos of k * pi * share for k = 0 .. K-1: evenly spaced, so that up to K concepts start
    nearly orthogonal, and more of them lie on the curve between. tanh is odd: it adds nothing that all share.
    """

    NUM_FEATURES = 256

    def __init__(self, config: ConceptConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.up = nn.Linear(self.NUM_FEATURES, config.hidden_size)
        self.down = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, shares_C: Tensor) -> Tensor:
        steps = torch.arange(self.NUM_FEATURES // 2, device=shares_C.device, dtype=torch.float32)
        angles = math.pi * shares_C[:, None] * steps
        features = math.sqrt(2) * torch.cat((angles.sin(), angles.cos()), dim=-1)  # of mean square 1
        dtype = self.up.weight.dtype
        rows_Cd = self.down(torch.tanh(self.up(features.to(dtype))))
        return F.rms_norm(rows_Cd.to(dtype), rows_Cd.shape[-1:], eps=self.eps)  # the stream stays wide under autocast


class ConceptQueries(nn.Module):
    """The C concepts before they have read anything: [B, C, d].

        e_i = a learned row, or what a network makes of anchor i  (+ the normalised mean of the tokens around anchor i)
                                                                  (+ a learned or sinusoidal vector for place i)

    With init_queries = "state" the rows are fixed and sum to nothing, and the tokens are a backbone's states as they
    lie, not normalised: mean_i e_i is the mean of the states, exactly (``share_means``).

    Sinusoids are those of the anchor in thousandths of the text, whatever C is, and as large as e_i.
    """

    RESIZE: ClassVar = {"weight": ("concept rows",), "places": ("concepts",)}

    def __init__(self, config: ConceptConfig):
        super().__init__()
        self.config = config
        C, d = config.num_concepts, config.hidden_size
        from_anchors = config.init_queries == "anchor"
        if config.init_queries == "state":
            self.register_buffer("weight", torch.empty(C, d))
        else:
            self.weight = None if from_anchors else nn.Parameter(torch.empty(C, d))
        self.network = AnchorFeatures(config) if from_anchors else None
        self.places = nn.Parameter(torch.empty(C, d)) if config.concept_positions == "learned" else None

    def rows(self, num_concepts: int) -> Tensor:
        """[C, d]; of init_queries = "state" they sum to nothing for any C."""
        rows_Cd = concept_rows(self, "weight", num_concepts)
        is_resized = self.config.init_queries == "state" and num_concepts != self.config.num_concepts
        return rows_Cd - rows_Cd.mean(0) if is_resized else rows_Cd

    def forward(
        self, tokens: Tensor | TokenSource, packed: Packed, num_concepts: int | None = None,
        group: ProcessGroup | None = None,
    ) -> Tensor:  # fmt: skip
        """``num_concepts``: other than the configuration's C, which learned rows and places then follow as they do when
        a checkpoint is loaded with another C (``start.resize``). ``group``: of devices that hold the other tokens."""
        config, B = self.config, packed.num_sequences
        C, d = config.num_concepts if num_concepts is None else num_concepts, config.hidden_size
        shares_C = anchor_fractions(C, packed.cu_seqlens.device)
        rows_Cd = self.rows(C) if self.network is None else self.network(shares_C)
        if config.concept_positions == "learned":
            rows_Cd = rows_Cd + concept_rows(self, "places", C)
        elif config.concept_positions == "sinusoidal":
            size = config.initializer_range if config.init_queries == "embedding" else 1.0
            rows_Cd = rows_Cd + (math.sqrt(2) * size * sinusoids(1000.0 * shares_C, d)).to(rows_Cd.dtype)
        if config.init_queries == "state":
            return rows_Cd + share_means(wide(tokens), packed, C).to(rows_Cd.dtype)
        if config.init_queries != "segment":
            return rows_Cd.expand(B, C, d)
        offsets = segment_offsets(packed, C)
        if isinstance(tokens, TokenSource):
            means = tokens.segment_means(offsets)
        elif group is not None:
            sums = torch.segment_reduce(wide(tokens), "sum", offsets=offsets, axis=0, unsafe=True, initial=0)
            sums, counts = sum_shards(sums, group), summed(offsets.diff(), group)
            means = sums / counts.clamp_min(1)[:, None]
        else:
            means = plain_means(tokens, offsets)
        means_BCd = F.rms_norm(means, (d,), eps=config.norm_eps).view(B, C, d)
        return rows_Cd + means_BCd.to(rows_Cd.dtype)


class NullConcepts(nn.Module):
    """What the decoder is given where the concepts of a text are withheld: C learned vectors, in their place."""

    RESIZE: ClassVar = {"weight": ("concept rows",)}

    def __init__(self, config: ConceptConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_concepts, config.hidden_size))

    def forward(self, concepts_BCd: Tensor, is_withheld_B: Tensor) -> Tensor:
        rows_Cd = concept_rows(self, "weight", concepts_BCd.shape[1])
        return torch.where(is_withheld_B[:, None, None], rows_Cd.to(concepts_BCd.dtype), concepts_BCd)
