"""What every part of streamed_attention is given, in the order of the registered operators."""

from typing import NamedTuple

import torch
from torch import Tensor

LN2 = 0.6931471805599453


class Arguments(NamedTuple):
    """Checked by the door. Everything is computed from q's dtype; x is rounded to it chunk by chunk."""

    q: Tensor  # [B, C, H, D] or [C, H, D]
    x: Tensor  # [T, E], or the table [V, E] where there are ids
    w_key: Tensor  # [Hkv * D, E]
    w_value: Tensor  # [Hkv * D, E]
    cu_seqlens: Tensor  # [B + 1] int32
    key_bias: Tensor | None  # [D], of every head
    key_norm: Tensor | None  # [D]
    positions: Tensor | None  # [T], and frequencies [D/2]
    frequencies: Tensor | None
    ids: Tensor | None  # [T] int64
    token_norm: Tensor | None  # [E], where there are ids
    max_seqlen: int
    temperature: float  # of the keys that positions turn
    token_eps: float
    eps: float
    scale: float
    chunk: int | None  # tokens; None: the backend's choice

    @property
    def num_tokens(self) -> int:
        return self.x.shape[0] if self.ids is None else self.ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_kv_heads(self) -> int:
        return self.w_key.shape[0] // self.q.shape[-1]

    @property
    def num_rows(self) -> int:
        """G * C, the rows of queries that read one key head."""
        return self.q.shape[-3] * self.q.shape[-2] // self.num_kv_heads


class Gradients(NamedTuple):
    """Of everything but the token states; float32 (float64 for float64 inputs), dq in q's dtype."""

    dq: Tensor
    dw_key: Tensor
    dw_value: Tensor
    dkey_bias: Tensor | None
    dkey_norm: Tensor | None
    dtoken_norm: Tensor | None


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def chunk_on_gpu(a: Arguments) -> int:
    """Tokens whose keys and values exist at one time: so many that the queries, which every chunk reads again, weigh
    little beside them."""
    return a.chunk or max(1 << 14, 4 * a.num_sequences * a.num_rows)
