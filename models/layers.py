"""The parts that encoder and decoder are made of.

B sequences, T packed tokens, C concepts, H heads, Hkv key/value heads, D head width, d model width, R rows of any kind,
M target rows, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..kernels.adaln.op import adaln_modulate, adaln_residual_modulate
from ..kernels.autocast import lower_precision
from ..kernels.concept_attention.op import concept_attention
from ..kernels.linear_cross_entropy.op import linear_cross_entropy
from ..kernels.token_attention.op import token_attention
from . import heads_function
from .config import ConceptConfig
from .local import local_attention
from .positions import Angles, rotate


class ResidualLinear(nn.Linear):
    """Writes into a residual stream; initialised smaller the more of them there are."""


class ZeroLinear(nn.Linear):
    """Starts at exactly zero and survives every framework's initialisation hook."""


class RowNorm(nn.RMSNorm):
    """RMSNorm of rows that begin a residual stream or stay in one: as wide as the weight, whatever autocast made of
    them. One dtype of rows and weight is also what torch's fused kernel asks for.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.promote_types(x.dtype, self.weight.dtype)))


class BranchNorm(RowNorm):
    """RMSNorm that opens a branch: in the dtype in which matrices are multiplied, so that autocast casts once and keeps
    one copy for the backward pass, however many of them read it.
    """

    def forward(self, x: Tensor) -> Tensor:
        return lower_precision(super().forward(x))[0]


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a function may take the module's parameters instead of calling it: nobody has wrapped it (an adapter),
    hooked it or replaced its forward (offloading), its parameters are ordinary ones (not quantised, sharded or given
    from outside), and ZeRO-3, which makes parameters whole inside their own module's forward only, has not cut them.
    """
    return (
        type(module) is kind and not module._forward_hooks and not module._forward_pre_hooks
        and not module._backward_hooks and not module._backward_pre_hooks and "forward" not in vars(module)
        and all(
            parameter is None or (type(parameter) in (nn.Parameter, FakeTensor) and not hasattr(parameter, "ds_id"))
            for parameter in module._parameters.values()
        )
    )  # fmt: skip


class HeadBias(nn.Module):
    """Adds one learned vector to every head: x [..., H, D] + bias [D].

    The same vector on queries and keys, turned by RoPE, is a score that depends on the distance alone and falls with
    its logarithm: attention weights start as a power of the distance, at every scale below theta, and training goes
    on from there. Without it a small model spends most of its time finding out that near tokens matter.

    It starts at zero where the two sides have no places to be near in (``is_placed``).
    """

    def __init__(self, head_dim: int, is_placed: bool = True):
        super().__init__()
        self.is_placed = is_placed
        self.bias = nn.Parameter(torch.empty(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class HeadNorm(nn.RMSNorm):
    """The norm of queries and keys; its weight sets how sharp scores are."""


class Heads(nn.Module):
    """Projects rows to normalised, rotated heads: [..., d] -> [..., H, D]; without angles nothing turns."""

    def __init__(self, config: ConceptConfig, num_heads: int, is_placed: bool | None = None):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, config.head_dim
        self.project = nn.Linear(config.hidden_size, num_heads * config.head_dim, bias=False)
        self.bias = HeadBias(config.head_dim, config.anchored_reads if is_placed is None else is_placed)
        self.norm = HeadNorm(config.head_dim, eps=config.norm_eps)

    def forward(self, x: Tensor, angles: Angles | None) -> Tensor:
        if self.is_plain:
            weight, bias, norm = self.project.weight, self.bias.bias, self.norm.weight
            if heads_function.serves(x, weight, bias, norm):
                return heads_function.heads(x, weight, bias, norm, self.norm.eps, angles)
        heads = self.project(x).unflatten(-1, (self.num_heads, self.head_dim))
        return rotate(self.norm(self.bias(heads)), angles).to(heads.dtype)

    @property
    def is_plain(self) -> bool:
        """Whether the parameters say all that the modules do."""
        return is_plain(self.project, nn.Linear) and is_plain(self.bias, HeadBias) and is_plain(self.norm, HeadNorm)


class ConstantHeads(nn.Module):
    """The same heads for every row, whatever is in it: [..., d] -> [..., H, D]. Only RoPE tells rows apart."""

    def __init__(self, config: ConceptConfig, num_heads: int, is_placed: bool | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, config.head_dim))
        self.bias = HeadBias(config.head_dim, config.anchored_reads if is_placed is None else is_placed)
        self.norm = HeadNorm(config.head_dim, eps=config.norm_eps)

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        return rotate(self.norm(self.bias(self.weight)), angles).to(x.dtype)


class Attention(nn.Module):
    """Query, key and value heads and the output projection; ``forward`` is left to the directions below.

    ``is_placed``: both sides stand somewhere; None: if tokens and concepts both do.
    ``makes_keys``: without, it has queries only, and reads the keys and values of another.
    """

    make_heads: type[nn.Module] = Heads  # of queries and keys

    def __init__(self, config: ConceptConfig, is_placed: bool | None = None, makes_keys: bool = True):
        super().__init__()
        self.num_kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        self.query = self.make_heads(config, config.num_attention_heads, is_placed)
        if makes_keys:
            self.key = self.make_heads(config, config.num_key_value_heads, is_placed)
            self.value = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.out = ResidualLinear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def values(self, x: Tensor) -> Tensor:
        return self.value(x).unflatten(-1, (self.num_kv_heads, self.head_dim))


class ConceptAttention(Attention):
    """Concepts read packed rows (tokens, or the concepts themselves). Cost O(C * R)."""

    def forward(
        self, concepts_BCd: Tensor, anchor_angles: Angles | None, rows_Rd: Tensor, row_angles: Angles | None,
        cu_seqlens: Tensor, max_seqlen: int,
    ) -> Tensor:  # fmt: skip
        q_BCHD = self.query(concepts_BCd, anchor_angles)
        k_RKD, v_RKD = self.key(rows_Rd, row_angles), self.values(rows_Rd)
        read_BCHD = concept_attention(q_BCHD, k_RKD, v_RKD, cu_seqlens, max_seqlen)
        return self.out(read_BCHD.flatten(-2))


class TokenAttention(Attention):
    """Packed rows read the concepts of their sequence. Cost O(C * R)."""

    def forward(
        self, rows_Rd: Tensor, row_angles: Angles | None, concepts_BCd: Tensor, anchor_angles: Angles | None,
        cu_seqlens: Tensor, max_seqlen: int,
    ) -> Tensor:  # fmt: skip
        q_RHD = self.query(rows_Rd, row_angles)
        k_BCKD, v_BCKD = self.key(concepts_BCd, anchor_angles), self.values(concepts_BCd)
        read_RHD = token_attention(q_RHD, k_BCKD, v_BCKD, cu_seqlens, max_seqlen)
        return self.out(read_RHD.flatten(-2))


class WeightedAttention(TokenAttention):
    """Rows mix the concepts with weights that depend on where both stand, and on nothing else. Cost O(C * R).

        out_n = sum_c softmax_c(s(a_c - n)) v_c        s(x) = sum_i A_i cos(theta_i x + phi_i), one s a head

    since that is what constant queries and keys are after RoPE. A table [N, C] of free weights, one row a position, is
    the same with one head and without the limit to functions of the distance, but it ends at its last position and
    belongs to one C.
    """

    make_heads = ConstantHeads


class LocalAttention(Attention):
    """Rows read the rows of their sequence at most ``window`` positions away. Cost O(R * window)."""

    def __init__(self, config: ConceptConfig, window: int):
        super().__init__(config, is_placed=config.token_positions == "rope")
        self.window = window

    def forward(
        self, rows_Rd: Tensor, row_angles: Angles | None, position_ids: Tensor, sequence_ids: Tensor, max_seqlen: int
    ) -> Tensor:
        q_RHD, k_RKD, v_RKD = self.query(rows_Rd, row_angles), self.key(rows_Rd, row_angles), self.values(rows_Rd)
        read_RHD = local_attention(q_RHD, k_RKD, v_RKD, position_ids, sequence_ids, self.window, max_seqlen)
        return self.out(read_RHD.flatten(-2))


class FeedForward(nn.Module):
    """down(silu(gate) * up), Shazeer 2020 (GLU variants), arXiv:2002.05202."""

    def __init__(self, config: ConceptConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = ResidualLinear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class ResidualNorm(nn.Module):
    """Closes the branch before it and opens the next: x <- x + branch, and LN(x) for what follows."""

    def __init__(self, config: ConceptConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)

    def forward(
        self, x: Tensor, branch: Tensor | None, condition: Tensor | None, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = x if branch is None else x + branch
        return x, lower_precision(self.norm(x))[0]  # once, however many matrices read it


class AdaptiveResidualNorm(nn.Module):
    """The same under a condition (AdaLN-Zero): x <- x + gate * branch, and LN(x) * (1 + scale) + shift.

    gate, shift and scale are linear in the condition and start at zero, so that every branch starts as the identity.
    Source: Peebles & Xie 2022 (DiT), arXiv:2212.09748.
    """

    def __init__(self, config: ConceptConfig, has_branch: bool):
        super().__init__()
        self.eps, self.has_branch = config.norm_eps, has_branch
        self.modulation = ZeroLinear(config.hidden_size, (3 if has_branch else 2) * config.hidden_size)

    def forward(
        self, x: Tensor, branch: Tensor | None, condition: Tensor | None, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor]:
        modulation = self.modulation(condition)
        if not self.has_branch:
            shift_Bd, scale_Bd = modulation.chunk(2, dim=-1)
            return x, adaln_modulate(x, shift_Bd, scale_Bd, cu_seqlens, eps=self.eps)
        gate_Bd, shift_Bd, scale_Bd = modulation.chunk(3, dim=-1)
        return adaln_residual_modulate(x, branch, gate_Bd, shift_Bd, scale_Bd, cu_seqlens, eps=self.eps)


class Residual(nn.Module):
    """Closes the branch before it, and opens one that looks at no row (``WeightedAttention``): x <- x + branch."""

    def forward(
        self, x: Tensor, branch: Tensor | None, condition: Tensor | None, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = x if branch is None else x + branch
        return x, x


def residual_norm(config: ConceptConfig, has_branch: bool, following: nn.Module | None = None) -> nn.Module:
    """Between two branches of the decoder; the first norm closes none. What nobody would read has no parameters."""
    is_gated = config.timestep_conditioning and has_branch
    if isinstance(following, WeightedAttention) and not is_gated:
        return Residual()
    return AdaptiveResidualNorm(config, has_branch) if config.timestep_conditioning else ResidualNorm(config)


class TimestepEmbedding(nn.Module):
    """t [B] in (0, 1] -> [B, d]: sinusoids of 1000 * t through a small network.

    Without the factor all times look alike: the cosine between the features of 0.3 and 1.0 is 0.99.
    """

    NUM_FEATURES = 256

    def __init__(self, config: ConceptConfig):
        super().__init__()
        self.up = nn.Linear(self.NUM_FEATURES, config.hidden_size)
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.NUM_FEATURES // 2
        steps = torch.arange(half, device=timesteps.device, dtype=torch.float32)
        angles = 1000.0 * timesteps.float()[:, None] * torch.exp(steps * (-9.210340371976184 / half))  # 10000^(-i/half)
        features = torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)
        return F.silu(self.mix(F.silu(self.up(features))))


def widening(config: ConceptConfig) -> nn.Module:
    """[R, e] -> [R, d] behind a table of embeddings: nothing where they are as wide as the model.

    With e = token_dim < d the table is thin: V * e + e * d parameters instead of V * d. Source: Lan et al. 2019
    (ALBERT), arXiv:1909.11942.
    """
    if config.token_dim == config.hidden_size:
        return nn.Identity()
    return nn.Linear(config.token_dim, config.hidden_size, bias=False)


class LanguageModelHead(nn.Module):
    """The [V, e] matrix, often shared with the embeddings, and its cross entropy; hidden states [M, d] come down to e.

    Logits exist only where a caller asks for them: the loss goes through ``linear_cross_entropy``.
    """

    def __init__(self, config: ConceptConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.token_dim))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        is_thin = config.token_dim != config.hidden_size
        self.narrow = nn.Linear(config.hidden_size, config.token_dim, bias=False) if is_thin else nn.Identity()

    def forward(self, hidden_Md: Tensor, targets_M: Tensor | None = None, **options) -> Tensor:
        """Logits [M, V] without targets; with them what ``linear_cross_entropy`` makes of ``options``."""
        hidden_Me = self.narrow(hidden_Md)
        if targets_M is None:
            return F.linear(hidden_Me, self.weight, self.bias)
        return linear_cross_entropy(hidden_Me, self.weight, targets_M, bias=self.bias, **options)
