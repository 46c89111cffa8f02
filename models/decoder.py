"""ConceptDecoder: rows ask the concepts of their sequence. Unless rows are mixed none sees another, so only the
positions that are asked for are ever computed.

B sequences, M rows of the decoder, C concepts, d model width.
"""

from functools import partial

from torch import Tensor, nn

from .config import ConceptConfig
from .layers import (
    ConceptAttention,
    FeedForward,
    LocalAttention,
    RowNorm,
    TimestepEmbedding,
    TokenAttention,
    WeightedAttention,
    residual_norm,
    widening,
)  # fmt: skip
from .packing import sequence_ids
from .positions import Angles, TokenPositions
from .pretrained import ConceptPreTrainedModel


class PositionQuery(nn.Module):
    """One learned vector for every target row; where the row stands, ``TokenPositions`` says."""

    def __init__(self, config: ConceptConfig):
        super().__init__()
        self.embedding = nn.Embedding(1, config.hidden_size)

    def forward(self, position_ids: Tensor) -> Tensor:
        # looked up once and expanded: the gradient is then one sum, not M additions to one row
        return self.embedding(position_ids.new_zeros(1)).expand(position_ids.shape[0], -1)


class Exchange(nn.Module):
    """Rows see each other through a copy w of the concepts: w reads the rows, then the rows read w. Cost O(C * M).

        w      += attention(LN(w) -> rows)
        branch  = attention(rows -> LN(w))
    """

    def __init__(self, config: ConceptConfig):
        super().__init__()
        self.open, self.close = (residual_norm(config, has_branch) for has_branch in (False, True))
        self.gather = ConceptAttention(config)
        self.read = attention_kind(config)(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, rows_Md: Tensor, row_angles: Angles | None, w_BCd: Tensor, anchor_angles: Angles | None,
        condition_Bd: Tensor | None, cu_seqlens: Tensor, max_seqlen: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The branch [M, d] of the rows, and w for the next layer."""
        w_BCd, h_BCd = self.open(w_BCd, None, condition_Bd, None)
        gathered = self.gather(h_BCd, anchor_angles, rows_Md, row_angles, cu_seqlens, max_seqlen)
        w_BCd, h_BCd = self.close(w_BCd, self.dropout(gathered), condition_Bd, None)
        return self.read(rows_Md, row_angles, h_BCd, anchor_angles, cu_seqlens, max_seqlen), w_BCd


def attention_kind(config: ConceptConfig) -> type[TokenAttention]:
    return WeightedAttention if config.decoder_queries == "weighted" else TokenAttention


def layer_branches(config: ConceptConfig) -> list[nn.Module]:
    """The branches of one layer, in order."""
    match config.decoder_mixing:
        case "none":
            reading = [attention_kind(config)(config)]
        case "local":
            reading = [LocalAttention(config, config.decoder_window), attention_kind(config)(config)]
        case "concepts":
            reading = [Exchange(config)]
    return [*reading, FeedForward(config)]


class ConceptDecoder(ConceptPreTrainedModel):
    """Concepts and positions -> one hidden state a row, at cost O(C * M).

        x_0     = e[id] or one learned vector                                  (token+position | position queries)
        x      += attention(LN(x) -> concepts);   x += feed_forward(LN(x))     per layer
        hidden  = LN(x)

    ``decoder_queries`` = "weighted": as "position", and attention weights depend on positions alone
    (``WeightedAttention``).

    ``decoder_mixing`` lets the rows of a sequence see each other, at linear cost: "local" begins each layer with
    attention among rows at most ``decoder_window`` positions apart; "concepts" lets a copy of the concepts read the
    rows before these read it (``Exchange``). What is known of a text then takes part as rows that nobody asks for,
    *context*: objectives give them with ``context``, the padded door and generation give them by themselves. They tell
    something with token+position queries only; other rows do not know their token.

    With ``timestep_conditioning`` each LN is followed by ``* (1 + scale) + shift`` and each branch by ``* gate``, all
    linear in the embedding of t and zero at the start (AdaLN-Zero): the hidden state then begins as LN(x_0), and no
    gradient reaches the concepts until the first step has opened the gates.
    """

    gradient_checkpointing = False  # of its layers; transformers switches it

    def __init__(self, config: ConceptConfig):
        super().__init__(config)
        with_tokens = config.decoder_queries == "token+position"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.token_dim) if with_tokens else None
        self.widen_tokens = widening(config) if with_tokens else None
        self.query = None if with_tokens else PositionQuery(config)
        self.positions = TokenPositions(config, config.token_dim if with_tokens else config.hidden_size)
        self.query_norm = RowNorm(config.hidden_size, eps=config.norm_eps)
        branches = [branch for _ in range(config.num_decoder_layers) for branch in layer_branches(config)]
        self.branches = nn.ModuleList(branches)
        self.time = TimestepEmbedding(config) if config.timestep_conditioning else None
        norms = [residual_norm(config, i > 0, following) for i, following in enumerate([*branches, None])]
        self.norms = nn.ModuleList(norms)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        return self.embed_tokens

    def forward(
        self, concepts: Tensor, anchors: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int,
        *, input_ids: Tensor | None = None, timesteps: Tensor | None = None, inputs_embeds: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """
        Args:
            concepts: [B, C, d], anchors [B, C]: as the encoder returns them.
            position_ids: [M] positions of the rows, rising strictly inside a sequence; cu_seqlens [B+1] int32 and
                max_seqlen say whose they are.
            input_ids: [M] ids at those positions, for token+position queries; others ignore it.
            inputs_embeds: [M, e] in their place.
            timesteps: [B] in (0, 1], for a model with timestep_conditioning; one without it ignores them.

        Returns:
            [M, d] normalised hidden states.

        Raises:
            ValueError: input_ids or timesteps are missing where the configuration needs them.
        """
        x_Md = self.query_norm(self.queries(position_ids, input_ids, max_seqlen, inputs_embeds))
        condition_Bd = self.condition(concepts, timesteps)
        row_angles, anchor_angles = (self.positions.angles(where) for where in (position_ids, anchors))
        if self.config.decoder_mixing == "local":
            owner_M = sequence_ids(cu_seqlens, len(position_ids))
            window_angles = self.positions.local_angles(position_ids, self.config.head_dim)
        places = row_angles, anchor_angles, cu_seqlens, max_seqlen
        window = (window_angles, position_ids, owner_M, max_seqlen) if self.config.decoder_mixing == "local" else ()
        apply = self.apply_layer
        if self.gradient_checkpointing and self.training:
            apply = partial(self._gradient_checkpointing_func, apply)
        branch_Md, per_layer = None, len(self.branches) // self.config.num_decoder_layers
        for i in range(0, len(self.branches), per_layer):
            x_Md, branch_Md, concepts = apply(
                range(i, i + per_layer), x_Md, branch_Md, concepts, condition_Bd, places, window
            )
        return self.norms[-1](x_Md, branch_Md, condition_Bd, cu_seqlens)[1]

    def apply_layer(
        self, indices: range, x_Md: Tensor, branch_Md: Tensor | None, concepts: Tensor, condition_Bd: Tensor | None,
        places: tuple, window: tuple,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The branches ``indices``: rows without the last of them, that branch, and the concepts for the next layer."""
        row_angles, anchor_angles, cu_seqlens, max_seqlen = places
        for i in indices:
            part = self.branches[i]
            x_Md, h_Md = self.norms[i](x_Md, branch_Md, condition_Bd, cu_seqlens)
            if isinstance(part, TokenAttention):
                branch_Md = part(h_Md, row_angles, concepts, anchor_angles, cu_seqlens, max_seqlen)
            elif isinstance(part, LocalAttention):
                branch_Md = part(h_Md, *window)
            elif isinstance(part, Exchange):
                branch_Md, concepts = part(
                    h_Md, row_angles, concepts, anchor_angles, condition_Bd, cu_seqlens, max_seqlen
                )
            else:
                branch_Md = part(h_Md)
            branch_Md = self.dropout(branch_Md)
        return x_Md, branch_Md, concepts

    def queries(
        self, position_ids: Tensor, input_ids: Tensor | None, max_seqlen: int, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        if self.query is not None:
            return self.positions(self.query(position_ids), position_ids, max_seqlen)
        if inputs_embeds is not None:
            return self.widen_tokens(self.positions(inputs_embeds, position_ids, max_seqlen))
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
