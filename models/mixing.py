"""How concepts see each other: C read C, at a cost that does not know how long the text is.

B sequences, C concepts, H heads, Hkv key/value heads, D head width, d model width, P places on either side.
"""

import math

import torch
from torch import Tensor, nn

from .config import ConceptConfig
from .layers import Attention, ConceptAttention
from .positions import Angles


class ConceptMixing(ConceptAttention):
    """The concepts of each text read each other; where they are anchored, near ones are read first. O(B * C^2)."""

    def __init__(self, config: ConceptConfig):
        super().__init__(config, is_placed=config.concept_positions == "rope")

    def forward(self, concepts_BCd: Tensor, angles: Angles | None) -> Tensor:
        B, C, _ = concepts_BCd.shape
        rows_Rd = concepts_BCd.flatten(0, 1)  # the concepts of all texts as one packed row of B * C
        row_angles = None if angles is None else tuple(part.flatten(0, 1) for part in angles)
        cu_concepts = torch.arange(B + 1, device=rows_Rd.device, dtype=torch.int32) * C
        return super().forward(concepts_BCd, angles, rows_Rd, row_angles, cu_concepts, C)


class CopeMixing(Attention):
    """The same with contextual positions: how far concept j is from i is counted in what i finds worth counting.

        s_ij = q_i . k_j / sqrt(D)                     g_ij = sigmoid(s_ij)
        p_ij = g_i,i+1 + ... + g_ij  for j > i         p_ij = -(g_ij + ... + g_i,i-1)  for j < i         p_ii = 0
        a_i  = softmax_j(s_ij + q_i . e(p_ij) / sqrt(D))

    e(p) lies on the line between e[floor p] and e[ceil p], one table of 2P + 1 vectors for all heads, zero at the
    start; beyond -P and P it is constant. Ours is two-sided and signed, along the order of the concepts, and leaves
    out the gate of i to itself, so that with all gates 1 it is attention with relative positions j - i.

    The bias depends on content, head, i and j, which ``concept_attention`` does not know; this is plain torch over
    [B, H, C, C], time and memory O(B * H * C^2), whatever the number of tokens. On a GPU the gradient of the table sums
    in no fixed order.
    Source: Golovneva et al. 2024 (CoPE), arXiv:2405.18719.
    """

    MAX_PLACES = 64  # P

    def __init__(self, config: ConceptConfig):
        super().__init__(config, is_placed=False)
        self.places = nn.Parameter(torch.empty(2 * self.MAX_PLACES + 1, config.head_dim))

    def forward(self, concepts_BCd: Tensor, angles: None = None) -> Tensor:
        q_BCHD, k_BCKD, v_BCKD = self.query(concepts_BCd, None), self.key(concepts_BCd, None), self.values(concepts_BCd)
        q_BHCD, k_BHCD, v_BHCD = (self.per_head(x) for x in (q_BCHD, k_BCKD, v_BCKD))
        at_least_float = torch.promote_types(q_BHCD.dtype, torch.float32)
        scale = 1 / math.sqrt(self.head_dim)
        scores_BHCC = (q_BHCD @ k_BHCD.mT).to(at_least_float) * scale
        bias_BHCP = (q_BHCD @ self.places.to(q_BHCD.dtype).T).to(at_least_float) * scale
        scores_BHCC = scores_BHCC + interpolate(bias_BHCP, contextual_positions(scores_BHCC.sigmoid()))
        read_BHCD = scores_BHCC.softmax(-1).to(v_BHCD.dtype) @ v_BHCD
        return self.out(read_BHCD.transpose(1, 2).flatten(-2))

    def per_head(self, x_BCKD: Tensor) -> Tensor:
        return x_BCKD.transpose(1, 2).repeat_interleave(self.query.num_heads // x_BCKD.shape[2], dim=1)


def contextual_positions(gates: Tensor) -> Tensor:
    """gates [..., C, C] of i to j -> p [..., C, C], signed and zero on the diagonal."""
    through, before = gates.cumsum(-1), gates.cumsum(-1) - gates
    to_right = through - through.diagonal(dim1=-2, dim2=-1)[..., None]
    to_left = before - before.diagonal(dim1=-2, dim2=-1)[..., None]
    steps = torch.arange(gates.shape[-1], device=gates.device)
    return torch.where(steps[:, None] < steps, to_right, to_left)


def interpolate(bias: Tensor, positions: Tensor) -> Tensor:
    """bias [..., C, 2P + 1] of places -P to P, read at positions [..., C, C] -> [..., C, C]."""
    last = bias.shape[-1] - 1
    where = (positions + last // 2).clamp(0, last)
    below = where.detach().floor()
    share = where - below
    low = below.long()
    return bias.gather(-1, low) * (1 - share) + bias.gather(-1, (low + 1).clamp_max(last)) * share


def concept_mixing(config: ConceptConfig) -> nn.Module:
    """[B, C, d] and the angles of the concepts -> [B, C, d], as ``concept_positions`` says."""
    return CopeMixing(config) if config.concept_positions == "cope" else ConceptMixing(config)
