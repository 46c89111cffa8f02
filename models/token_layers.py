"""The layers of tokens: what a token learns of its neighbours before concepts read it, at linear cost.

R packed rows of tokens (T before a funnel), P rows after a funnel, H heads, Hkv key/value heads, D head width,
e width of tokens (token_dim).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .config import ConceptConfig
from .funnel import Pairs, Places, pair_up, pooled_attention
from .layers import BranchNorm, FeedForward, ResidualLinear
from .local import local_attention
from .packing import Packed
from .positions import Angles, TokenPositions, rotate

CONV_RADIUS = 2  # a convolution of width 5


class TokenResidualLinear(ResidualLinear):
    """Writes into the stream of tokens, which may start as small as embeddings are, and is initialised to match."""


class WindowAttention(nn.Module):
    """Each token reads those at most ``token_window`` positions away: Llama's attention, two-sided and in a window.

    RoPE, no norm of queries and keys, no biases.
    """

    def __init__(self, config: ConceptConfig):
        super().__init__()
        e, D = config.token_dim, config.token_head_dim
        H = config.num_token_heads
        self.window, self.head_dim = config.token_window, D
        self.query = nn.Linear(e, H * D, bias=False)
        self.key = nn.Linear(e, H * D, bias=False)
        self.value = nn.Linear(e, H * D, bias=False)
        self.out = TokenResidualLinear(H * D, e, bias=False)

    def forward(self, rows_Re: Tensor, angles: Angles | None, places: Places) -> Tensor:
        """What the rows read of each other, [R, e]."""
        read_RHD = local_attention(
            self.turned(self.query, rows_Re, angles), self.turned(self.key, rows_Re, angles),
            self.heads(self.value, rows_Re), places.positions, places.sequence_ids, self.window,
            places.packed.max_seqlen,
        )  # fmt: skip
        return self.out(read_RHD.flatten(-2))

    def halve(
        self, pooled_Pe: Tensor, pooled_angles: Angles | None, rows_Re: Tensor, angles: Angles | None, places: Places,
        pairs: Pairs,
    ) -> Tensor:  # fmt: skip
        """What the pooled rows read of the rows, [P, e]."""
        read_PHD = pooled_attention(
            self.turned(self.query, pooled_Pe, pooled_angles), self.turned(self.key, rows_Re, angles),
            self.heads(self.value, rows_Re), places, pairs, self.window,
        )  # fmt: skip
        return self.out(read_PHD.flatten(-2))

    def heads(self, project: nn.Linear, x: Tensor) -> Tensor:
        return project(x).unflatten(-1, (-1, self.head_dim))

    def turned(self, project: nn.Linear, x: Tensor, angles: Angles | None) -> Tensor:
        heads = self.heads(project, x)
        wide = torch.promote_types(heads.dtype, torch.float32)  # 16 bits would round the angles
        return rotate(heads.to(wide), angles).to(heads.dtype)


class WindowConv(nn.Module):
    """y_t = out(sum over |o| <= 2 of w_o * x at position p_t + o of the same sequence): depthwise, then pointwise.

    Offsets are of positions, not of rows: where a token was deleted there is nothing to read, as if it were zero.
    """

    def __init__(self, config: ConceptConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * CONV_RADIUS + 1, config.token_dim))
        self.out = TokenResidualLinear(config.token_dim, config.token_dim, bias=False)

    def forward(self, rows_Re: Tensor, angles: Angles | None, places: Places) -> Tensor:
        num_rows, radius = rows_Re.shape[0], CONV_RADIUS
        taps = torch.arange(-radius, radius + 1, device=rows_Re.device)
        x, positions = F.pad(rows_Re, (0, 0, radius, radius)), F.pad(places.positions, (radius, radius))
        sequences = F.pad(places.sequence_ids, (radius, radius), value=-1)
        y_Re = torch.zeros_like(rows_Re)
        for shift in range(2 * radius + 1):  # positions rise strictly: what is 2 positions away is at most 2 rows away
            rows = slice(shift, shift + num_rows)
            offset_R = positions[rows] - places.positions
            is_tap_R5 = (offset_R[:, None] == taps) & (sequences[rows] == places.sequence_ids)[:, None]
            y_Re = y_Re + (is_tap_R5.to(self.weight.dtype) @ self.weight) * x[rows]
        return self.out(y_Re)


class TokenFeedForward(FeedForward):
    """The gated feed-forward at the width of tokens."""

    def __init__(self, config: ConceptConfig):
        nn.Module.__init__(self)
        self.gate_up = nn.Linear(config.token_dim, 4 * config.token_dim, bias=False)
        self.down = TokenResidualLinear(2 * config.token_dim, config.token_dim, bias=False)


class TokenLayer(GradientCheckpointingLayer):
    """x += attention(RMSNorm(x));  x += feed_forward(RMSNorm(x)).

    With a window of at least N and local attention this is a layer of Llama (Touvron et al. 2023, arXiv:2302.13971)
    without the causal mask.
    """

    def __init__(self, config: ConceptConfig):
        super().__init__()
        self.attention_norm = BranchNorm(config.token_dim, eps=config.norm_eps)
        self.attention = WindowConv(config) if config.token_mixer == "conv" else WindowAttention(config)
        self.feed_norm = BranchNorm(config.token_dim, eps=config.norm_eps)
        self.feed = TokenFeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_Re: Tensor, angles: Angles | None, places: Places, pooled_angles: Angles | None = None,
        pairs: Pairs | None = None,
    ) -> Tensor:  # fmt: skip
        if pairs is not None:
            return self.halve(x_Re, angles, places, pooled_angles, pairs)
        return self.close(x_Re, self.attention(self.attention_norm(x_Re), angles, places))

    def halve(
        self, x_Re: Tensor, angles: Angles | None, places: Places, pooled_angles: Angles | None, pairs: Pairs
    ) -> Tensor:
        """The same at half the number of rows: queries and the stream are means of pairs; keys and values are not.

        Source: Dai et al. 2020 (Funnel-Transformer), arXiv:2006.03236.
        """
        x_Pe = pairs.mean(x_Re)
        rows_Re, pooled_Pe = self.attention_norm(x_Re), self.attention_norm(x_Pe)
        return self.close(x_Pe, self.attention.halve(pooled_Pe, pooled_angles, rows_Re, angles, places, pairs))

    def close(self, x: Tensor, branch: Tensor) -> Tensor:
        x = x + self.dropout(branch)
        return x + self.dropout(self.feed(self.feed_norm(x)))


class TokenLayers(nn.ModuleList):
    """``num_token_layers`` layers; those that ``funnel`` names halve the number of tokens."""

    def __init__(self, config: ConceptConfig):
        super().__init__(TokenLayer(config) for _ in range(config.num_token_layers))
        self.head_dim = config.token_head_dim
        self.halving = frozenset(config.funnel or ())

    def forward(self, x_Te: Tensor, packed: Packed, positions: TokenPositions) -> tuple[Tensor, Places]:
        """The states [R, e] and where they stand; after a funnel there may be one more sequence, see ``pair_up``."""
        places = Places(packed.position_ids, packed.sequence_ids(), packed)
        if len(self) == 0:
            return x_Te, places
        angles = positions.local_angles(places.positions, self.head_dim)
        x = x_Te
        for i, layer in enumerate(self):
            if i not in self.halving:
                x = layer(x, angles, places)
                continue
            pairs = pair_up(places, packed.num_sequences)
            pooled_angles = positions.local_angles(pairs.places.positions, self.head_dim)
            x = layer(x, angles, places, pooled_angles, pairs)
            places, angles = pairs.places, pooled_angles
        return x, places
