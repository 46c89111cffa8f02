"""ConceptDecoder: target positions ask the concepts of their sequence. No position sees another, so only the M
positions that are asked for are ever computed.

B sequences, M target rows, C concepts, d model width.
"""

import torch
from torch import Tensor, nn

from .config import ConceptConfig
from .encoder import ConceptPreTrainedModel
from .layers import AdaptiveResidualNorm, FeedForward, ResidualNorm, TimestepEmbedding, TokenAttention, widening
from .positions import TokenPositions


class PositionQuery(nn.Module):
    """One learned vector for every target row; where the row stands, ``TokenPositions`` says."""

    def __init__(self, config: ConceptConfig):
        super().__init__()
        self.embedding = nn.Embedding(1, config.hidden_size)

    def forward(self, position_ids: Tensor) -> Tensor:
        return self.embedding(torch.zeros_like(position_ids))


class ConceptDecoder(ConceptPreTrainedModel):
    """Concepts and target positions -> one hidden state a target, at cost O(C * M).

        x_0     = e[id] or one learned vector                                  (token+position | position queries)
        x      += attention(LN(x) -> concepts);   x += feed_forward(LN(x))     per layer
        hidden  = LN(x)

    With ``timestep_conditioning`` each LN is followed by ``* (1 + scale) + shift`` and each branch by ``* gate``, all
    linear in the embedding of t and zero at the start (AdaLN-Zero): the hidden state then begins as LN(x_0), and no
    gradient reaches the concepts until the first step has opened the gates.
    """

    def __init__(self, config: ConceptConfig):
        super().__init__(config)
        with_tokens = config.decoder_queries == "token+position"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.token_dim) if with_tokens else None
        self.widen_tokens = widening(config) if with_tokens else None
        self.query = None if with_tokens else PositionQuery(config)
        self.positions = TokenPositions(config, config.token_dim if with_tokens else config.hidden_size)
        self.query_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        branches = [part(config) for _ in range(config.num_decoder_layers) for part in (TokenAttention, FeedForward)]
        self.branches = nn.ModuleList(branches)
        if config.timestep_conditioning:
            self.time = TimestepEmbedding(config)
            norms = [AdaptiveResidualNorm(config, has_branch=i > 0) for i in range(len(branches) + 1)]
        else:
            self.time = None
            norms = [ResidualNorm(config) for _ in range(len(branches) + 1)]
        self.norms = nn.ModuleList(norms)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        return self.embed_tokens

    def forward(
        self, concepts: Tensor, anchors: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int,
        *, input_ids: Tensor | None = None, timesteps: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """
        Args:
            concepts: [B, C, d], anchors [B, C]: as the encoder returns them.
            position_ids: [M] positions of the target rows; cu_seqlens [B+1] int32 and max_seqlen say whose they are.
            input_ids: [M] ids at those positions, for token+position queries; position queries ignore it.
            timesteps: [B] in (0, 1], for a model with timestep_conditioning; one without it ignores them.

        Returns:
            [M, d] normalised hidden states.

        Raises:
            ValueError: input_ids or timesteps are missing where the configuration needs them.
        """
        x_Md = self.query_norm(self.queries(position_ids, input_ids, max_seqlen))
        condition_Bd = self.condition(concepts, timesteps)
        row_angles, anchor_angles = (self.positions.angles(where) for where in (position_ids, anchors))
        branch_Md = None
        for i, norm in enumerate(self.norms):
            x_Md, h_Md = norm(x_Md, branch_Md, condition_Bd, cu_seqlens)
            if i == len(self.branches):
                return h_Md
            part = self.branches[i]
            if isinstance(part, TokenAttention):
                branch_Md = part(h_Md, row_angles, concepts, anchor_angles, cu_seqlens, max_seqlen)
            else:
                branch_Md = part(h_Md)
            branch_Md = self.dropout(branch_Md)

    def queries(self, position_ids: Tensor, input_ids: Tensor | None, max_seqlen: int) -> Tensor:
        if self.query is not None:
            return self.positions(self.query(position_ids), position_ids, max_seqlen)
        if input_ids is None:
            raise ValueError("input_ids: this decoder has token+position queries and needs the ids of the target rows")
        return self.widen_tokens(self.positions(self.embed_tokens(input_ids), position_ids, max_seqlen))

    def condition(self, concepts: Tensor, timesteps: Tensor | None) -> Tensor | None:
        if self.time is None:
            return None
        if timesteps is None:
            raise ValueError(
                "timesteps: this decoder has timestep_conditioning and needs a time in (0, 1] for each sequence"
            )
        return self.time(timesteps, concepts.dtype)
