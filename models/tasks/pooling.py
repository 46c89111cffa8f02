"""C concepts, or N token rows, -> one vector of a text.

B texts, T packed tokens, C concepts, H heads, Q pool queries, d model width.
"""

import torch
from torch import Tensor, nn

from ...kernels.concept_attention.op import concept_attention
from ..config import ConceptConfig
from ..layers import BranchNorm, FeedForward, ResidualLinear, ZeroLinear
from ..similarity import wide

DECODER_POOLS = ("decoder", "decoder_positions")  # the mean of the decoder's rows; all others pool concepts


def concept_pool(config: ConceptConfig) -> nn.Module | None:
    """The module that ``config.pool`` names, [B, C, d] -> [B, d]; None for a pool of decoder rows."""
    if config.pool == "mean":
        return MeanPool()
    if config.pool in ("weighted", "attention"):
        return WeightedPool(config, 1 if config.pool == "weighted" else config.num_attention_heads)
    if config.pool in ("cls_query", "multi_query"):
        return QueryPool(config, 1 if config.pool == "cls_query" else config.num_pool_queries)
    return None


class MeanPool(nn.Module):
    def forward(self, c_BCd: Tensor) -> Tensor:
        return c_BCd.mean(1)


class WeightedPool(nn.Module):
    """sum_c softmax_c(s_c) * concept_c with learned scores s, linear in the concept: one score ("weighted"), or one for
    each of H groups of channels ("attention").

    Scores start at zero, so that it starts as the mean. For C = 1 it is that concept.
    """

    def __init__(self, config: ConceptConfig, num_scores: int):
        super().__init__()
        self.score = ZeroLinear(config.hidden_size, num_scores, bias=False)

    def forward(self, c_BCd: Tensor) -> Tensor:
        weights_BCS = wide(self.score(c_BCd)).softmax(1).to(c_BCd.dtype)
        parts_BCSD = c_BCd.unflatten(-1, (weights_BCS.shape[-1], -1))
        return (weights_BCS[..., None] * parts_BCSD).sum(1).flatten(1)


class QueryPool(nn.Module):
    """Q learned queries read the concepts of a text; the mean of what they made of it.

        r_q = out(attention(query_q -> concepts));   pooled = mean_q( r_q + feed_forward(LN(r_q)) )

    Queries start small, so that each starts by reading about the mean. They have no place in the text: where a concept
    stands reaches them through what it holds. For C = 1 every query reads the same, so Q makes no difference.
    Source: Lee et al. 2019 (Set Transformer, pooling by multihead attention), arXiv:1810.00825.
    """

    def __init__(self, config: ConceptConfig, num_queries: int):
        super().__init__()
        d, self.head_dim, width = config.hidden_size, config.head_dim, config.num_key_value_heads * config.head_dim
        self.queries = nn.Embedding(num_queries, d)
        self.key = nn.Linear(d, width, bias=False)
        self.value = nn.Linear(d, width, bias=False)
        self.out = ResidualLinear(d, d, bias=False)
        self.feed_norm = BranchNorm(d, eps=config.norm_eps)
        self.feed = FeedForward(config)

    def forward(self, c_BCd: Tensor) -> Tensor:
        B, C, _ = c_BCd.shape
        queries_Qd = self.queries(torch.arange(self.queries.num_embeddings, device=c_BCd.device))
        q_QHD, k_RKD, v_RKD = (
            x.unflatten(-1, (-1, self.head_dim))
            for x in (queries_Qd, self.key(c_BCd).flatten(0, 1), self.value(c_BCd).flatten(0, 1))
        )
        cu_concepts = torch.arange(B + 1, device=c_BCd.device, dtype=torch.int32) * C
        read_BQd = self.out(concept_attention(q_QHD, k_RKD, v_RKD, cu_concepts, C).flatten(-2))
        return (read_BQd + self.feed(self.feed_norm(read_BQd))).mean(1)


def mean_of_rows(rows_Td: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[T, d] -> [B, d]: the mean over the rows of each sequence, zero where there are none."""
    return reduce_rows(wide(rows_Td), cu_seqlens, "mean", 0.0).to(rows_Td.dtype)


def reduce_rows(rows: Tensor, cu_seqlens: Tensor, how: str, initial: float) -> Tensor:
    """[T, ...] -> [B, ...]: "sum", "mean" or "max" over the rows of each sequence; ``initial`` where there are none."""
    # unsafe skips a check of the offsets that would synchronise; they are right by construction
    return torch.segment_reduce(rows, how, offsets=cu_seqlens.long(), axis=0, unsafe=True, initial=initial)
