"""Where tokens and concepts stand, and how a model learns it: angles that turn queries and keys, or vectors that are
added to rows.

B sequences, T packed tokens, N tokens of one sequence, C concepts, H heads, D head width, R rows of any kind, e their
width.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from .config import ConceptConfig
from .packing import Packed

Angles = tuple[Tensor, Tensor]  # cos, sin


class TokenPositions(nn.Module):
    """Tells a model where its rows stand, in one of three ways (``token_positions``):

        rope         nothing is added; queries and keys are turned by angles
        learned      one of ``max_position_embeddings`` vectors is added; nothing is turned
        sinusoidal   sines and cosines, as large as new embeddings, are added; nothing is turned

    Encoder and decoder each have one. ``forward`` is for the rows, at the width of their embeddings; the angles are
    None where nothing is turned, and ``rotate`` takes that.
    """

    RESIZE: ClassVar = {"table.weight": ("positions",)}

    def __init__(self, config: ConceptConfig, width: int):
        super().__init__()
        self.config = config
        is_learned = config.token_positions == "learned"
        self.table = nn.Embedding(config.max_position_embeddings, width) if is_learned else None

    def forward(self, rows_Re: Tensor, position_ids: Tensor, max_seqlen: int) -> Tensor:
        """rows [R, e] at position_ids [R] -> [R, e].

        Raises:
            ValueError: max_seqlen, a Python int, says that a text is longer than the learned table.
            RuntimeError: a position of a text with gaps lies beyond it. On a GPU it is raised there, without a wait.
        """
        if self.config.token_positions == "sinusoidal":
            scale = math.sqrt(2) * self.config.initializer_range
            return rows_Re + (scale * sinusoids(position_ids, rows_Re.shape[-1])).to(rows_Re.dtype)
        if self.table is None:
            return rows_Re
        num_known = self.table.num_embeddings
        hint = "load the model with a larger max_position_embeddings (its table is interpolated), or cut the text"
        if max_seqlen > num_known:
            raise ValueError(
                f"position_ids: a text of {max_seqlen} tokens is longer than the max_position_embeddings = {num_known} "
                f"learned positions; {hint}"
            )
        torch._assert_async(
            (position_ids < num_known).all(),
            f"position_ids: a position lies beyond the max_position_embeddings = {num_known} learned ones; {hint}",
        )
        return rows_Re + self.table(position_ids)

    def angles(self, where: Tensor) -> Angles | None:
        """Angles of whatever stands at ``where`` [...] in its text: a target row, or a concept at its anchor."""
        return self._rotary(where) if self.config.token_positions == "rope" else None

    def read_angles(self, position_ids: Tensor) -> Angles | None:
        """The same for the tokens that concepts read. Scores over them, and no others, carry YaRN's temperature: only
        these are as many as the text is long."""
        angles = self.angles(position_ids)
        if angles is None or self.config.rope_extension != "yarn":
            return angles
        sharper = yarn_temperature(self.config.rope_factor)
        cos, sin = angles
        return cos * sharper, sin * sharper

    def read_frequencies(self, device: torch.device) -> tuple[Tensor | None, float]:
        """What the angles of ``read_angles`` are made of, for whoever makes them chunk by chunk: radians per position
        [D/2], None where nothing is turned, and what turned keys are multiplied by."""
        config = self.config
        if config.token_positions != "rope":
            return None, 1.0
        is_sharper = config.rope_extension == "yarn"
        return rotary_frequencies(
            config.head_dim, config.rope_theta, config.rope_extension, config.rope_factor,
            config.max_position_embeddings, device,
        ), yarn_temperature(config.rope_factor) if is_sharper else 1.0  # fmt: skip

    def local_angles(self, position_ids: Tensor, head_dim: int) -> Angles | None:
        """The same for attention in a window. It looks as far as in training whatever the length of the text, so that
        nothing is extended."""
        if self.config.token_positions != "rope":
            return None
        return rotary_angles(position_ids, head_dim, self.config.rope_theta)

    def concept_angles(self, anchors_BC: Tensor) -> Angles | None:
        """Angles of concepts among themselves, whatever tells where tokens stand."""
        return self._rotary(anchors_BC) if self.config.concept_positions == "rope" else None

    def _rotary(self, where: Tensor) -> Angles:
        config = self.config
        return rotary_angles(
            where, config.head_dim, config.rope_theta, config.rope_extension, config.rope_factor,
            config.max_position_embeddings,
        )  # fmt: skip


def rotary_angles(
    positions: Tensor, head_dim: int, theta: float, extension: str = "none", factor: float = 1.0,
    trained_length: int = 1,
) -> Angles:  # fmt: skip
    """positions [...] of any real type -> cos, sin [..., 1, D/2] float32, ready to broadcast over heads.

    Angle i is position * frequency i. Nothing is kept in a buffer, so a cast of the model to bfloat16 cannot round the
    frequencies. Source: Su et al. 2021 (RoFormer), arXiv:2104.09864.
    """
    frequencies = rotary_frequencies(head_dim, theta, extension, factor, trained_length, positions.device)
    angles = (positions.float()[..., None] * frequencies)[..., None, :]
    return angles.cos(), angles.sin()


def rotary_frequencies(
    head_dim: int, theta: float, extension: str = "none", factor: float = 1.0, trained_length: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:  # fmt: skip
    """[D/2] float32 radians per position, f_i = theta^(-2i/D), for texts ``factor`` s times as long as L in training:

        linear   f_i / s: position interpolation. Chen et al. 2023, arXiv:2306.15595
        ntk      theta becomes theta * s^(D / (D - 2)): f_0 stays, the slowest is divided by s
        yarn     (1 - g) f_i / s + g f_i  with  g = clip((r_i - 1) / (32 - 1), 0, 1)  and  r_i = L f_i / 2 pi, the turns
                 made in training: what turned less than once is interpolated, what turned 32 times stays

    Source of the last two: Peng et al. 2023 (YaRN), arXiv:2309.00071, definitions 1 and 2. The ramp is linear in r, as
    it is there; common implementations make it linear in i, which differs between the two ends only.
    """
    steps = torch.arange(head_dim // 2, device=device, dtype=torch.float32)
    if extension == "ntk":
        theta = theta * factor ** (head_dim / (head_dim - 2))
    frequencies = torch.exp(steps * (-2.0 * math.log(theta) / head_dim))
    if extension == "linear":
        return frequencies / factor
    if extension == "yarn":
        turns = trained_length * frequencies / (2 * math.pi)
        kept = ((turns - 1) / (32 - 1)).clamp(0, 1)
        return torch.lerp(frequencies / factor, frequencies, kept)
    return frequencies


def yarn_temperature(factor: float) -> float:
    """What scores are multiplied by, so that softmax stays as sharp over s times as many tokens: (0.1 ln s + 1)^2.

    Source: Peng et al. 2023 (YaRN), arXiv:2309.00071, section 3.4, where it is 1 / t.
    """
    return (0.1 * math.log(factor) + 1) ** 2


def rotate(x: Tensor, angles: Angles | None) -> Tensor:
    """x [..., H, D] turned by cos, sin [..., 1, D/2]: the pair (x[i], x[i + D/2]) by angle i. Keeps every norm."""
    if angles is None:
        return x
    cos, sin = (part.to(x.dtype) for part in angles)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)), dim=-1)


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """positions [...] -> [..., width] float32: sin, then cos of position * 10000^(-i / h), h = ceil(width / 2).

    An odd width lacks the last cosine. Root mean square about sqrt(1/2). Source: Vaswani et al. 2017, arXiv:1706.03762.
    """
    half = -(-width // 2)
    steps = torch.arange(half, device=positions.device, dtype=torch.float32)
    angles = positions.float()[..., None] * torch.exp(steps * (-math.log(10000.0) / half))
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[..., :width]


def anchor_fractions(num_concepts: int, device: torch.device) -> Tensor:
    """[C] float32: concept i stands in the middle of the i-th of C equal parts, at (i + 1/2) / C of its text."""
    return (torch.arange(num_concepts, device=device, dtype=torch.float32) + 0.5) / num_concepts


def anchors(num_positions_B: Tensor, num_concepts: int) -> Tensor:
    """[B] -> [B, C] float32: concept i stands in the middle of the i-th of C equal parts of its sequence.

    a_i = (i + 1/2) / C * N - 1/2, so that for C = N it is i, and any C and N fit each other.
    """
    return anchor_fractions(num_concepts, num_positions_B.device) * num_positions_B.float()[:, None] - 0.5


def segment_offsets(packed: Packed, num_concepts: int) -> Tensor:
    """[B*C + 1] int64: rows ``offsets[b*C + i]`` to ``offsets[b*C + i + 1]`` hold the tokens of part i of sequence b.

    Part i covers positions ceil(i*N/C) to ceil((i+1)*N/C) - 1; parts may be empty.
    """
    device, num_positions_B = packed.cu_seqlens.device, packed.num_positions()
    if packed.num_sequences == 0:
        return torch.zeros(1, dtype=torch.int64, device=device)
    steps_C = torch.arange(num_concepts, device=device)
    first_BC = -(-(steps_C * num_positions_B[:, None]) // num_concepts)  # exact ceiling, in integers
    # one rising key over the whole packed row: sequences are kept apart by a stride above every position
    stride = num_positions_B.max() + 1
    wanted_BC = torch.arange(packed.num_sequences, device=device)[:, None] * stride + first_BC
    starts = torch.searchsorted(packed.sequence_ids() * stride + packed.position_ids, wanted_BC.flatten())
    return torch.cat((starts, packed.cu_seqlens[-1:].long()))
