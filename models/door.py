"""The door of every model: texts in any of the forms that callers have them -> packed, and rows back in that form.

B texts, T packed tokens, N tokens of one text, e width of tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .packing import Packed, pack_padded


class Door(NamedTuple):
    """The texts of a call, packed, and how to give rows of tokens back as they came."""

    packed: Packed
    shape: tuple[int, ...] | None  # [B, N] of a padded batch, [1, T] of a flattened one; None: it came packed
    valid: Tensor | None  # [B, N] bool: where there is a token; None: everywhere

    def rows(self, values: Tensor, name: str) -> Tensor:
        """Values [B, N] or [1, T], one a token -> [T].

        Raises:
            ValueError: another shape; ``name`` opens the message.
        """
        expected = (self.packed.num_tokens,) if self.shape is None else self.shape
        if tuple(values.shape) != tuple(expected):
            raise ValueError(f"{name}: expected input_ids' shape {list(expected)}, got {list(values.shape)}")
        return values.reshape(-1) if self.valid is None else values[self.valid]

    def spread(self, rows: Tensor, fill: float = 0.0) -> Tensor:
        """Rows [T, ...] -> [B, N, ...] or [1, T, ...] with ``fill`` at padding; [T, ...] of what came packed."""
        if self.shape is None:
            return rows
        if self.valid is None:
            return rows.reshape(*self.shape, *rows.shape[1:])
        dense = rows.new_full((*self.shape, *rows.shape[1:]), fill)
        dense[self.valid] = rows
        return dense


def open_door(
    input_ids: Tensor | None = None, attention_mask: Tensor | None = None, packed: Packed | None = None, *,
    inputs_embeds: Tensor | None = None, position_ids: Tensor | None = None, cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None, max_length_q: int | None = None, max_length_k: int | None = None,
    suffix: str = "",
) -> Door:  # fmt: skip
    """One of three forms of a batch.

        packed       as it is
        padded       input_ids [B, N], attention_mask [B, N], where there is padding
        flattened    input_ids [1, T] of texts end to end with cu_seq_lens_q [B+1], as transformers'
                     ``DataCollatorWithFlattening(return_flash_attn_kwargs=True)`` makes it; without cu_seq_lens_q a
                     text begins wherever position_ids do not rise

    Args:
        inputs_embeds: [B, N, e] or [1, T, e] in place of ids: what the table of token embeddings would have given.
        position_ids: of the shape of input_ids, rising strictly in each text; by default tokens are counted from 0.
        cu_seq_lens_k, max_length_k: the same as those of q, and not read.
        max_length_q: at least the longest text. Without it a mask, or texts end to end, cost one look at the device;
            under torch.compile and torch.export it is N or T then, which gives the same result.
        suffix: of the arguments' names in errors.

    Raises:
        ValueError: not exactly one form came, or a shape does not fit.
    """
    given = [x is not None for x in (input_ids, inputs_embeds, packed)]
    if sum(given) != 1:
        raise ValueError(
            f"input_ids{suffix}: expected either input_ids{suffix} or packed{suffix}, or inputs_embeds in their place, "
            f"got {'several' if any(given) else 'none'} of them"
        )
    if packed is not None:
        others = {"attention_mask": attention_mask, "position_ids": position_ids, "cu_seq_lens_q": cu_seq_lens_q}
        for name, value in others.items():
            if value is not None:
                raise ValueError(f"{name}{suffix}: expected nothing with packed{suffix}, which says where texts are")
        return Door(packed, None, None)
    embeds = None
    if inputs_embeds is not None:
        if inputs_embeds.ndim != 3:
            raise ValueError(f"inputs_embeds: expected shape [B, N, e], got {list(inputs_embeds.shape)}")
        embeds = inputs_embeds
        input_ids = torch.full(embeds.shape[:2], -1, device=embeds.device)  # no token: a table would refuse it
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids{suffix}: expected shape [B, N], got {list(input_ids.shape)}")
    if position_ids is not None and position_ids.shape != input_ids.shape:
        shapes = f"{list(input_ids.shape)}, got {list(position_ids.shape)}"
        raise ValueError(f"position_ids{suffix}: expected input_ids' shape {shapes}")
    if not isinstance(max_length_q, int | torch.SymInt | None):
        raise ValueError(f"max_length_q: expected a Python int, got {type(max_length_q).__name__}")
    is_flat = input_ids.shape[0] == 1 and attention_mask is None and position_ids is not None
    if cu_seq_lens_q is not None or is_flat:
        return flattened(input_ids, embeds, attention_mask, position_ids, cu_seq_lens_q, max_length_q)
    packed = pack_padded(input_ids, attention_mask, max_length_q)
    valid = None if attention_mask is None else attention_mask != 0
    door = Door(packed, tuple(input_ids.shape), valid)
    if position_ids is not None:
        packed = packed._replace(position_ids=door.rows(position_ids, "position_ids").long())
    if embeds is not None:
        packed = packed._replace(embeds=embeds.flatten(0, 1) if valid is None else embeds[valid])
    return door._replace(packed=packed)


def flattened(
    input_ids: Tensor, embeds: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None,
    cu_seq_lens: Tensor | None, max_length: int | None,
) -> Door:  # fmt: skip
    """Texts end to end, [1, T]; see ``open_door``."""
    if input_ids.shape[0] != 1:
        raise ValueError(f"input_ids: expected shape [1, T] with cu_seq_lens_q, got {list(input_ids.shape)}")
    if attention_mask is not None:
        raise ValueError("attention_mask: expected nothing with cu_seq_lens_q: texts end to end have no padding")
    num_tokens, device = input_ids.shape[1], input_ids.device
    if cu_seq_lens is None:
        begins = torch.ones(num_tokens, dtype=torch.bool, device=device)
        begins[1:] = position_ids[0, 1:] <= position_ids[0, :-1]
        cu_seq_lens = torch.cat((begins.nonzero()[:, 0], begins.new_full((1,), num_tokens, dtype=torch.int64)))
    elif cu_seq_lens.ndim != 1:
        raise ValueError(f"cu_seq_lens_q: expected shape [B+1], got {list(cu_seq_lens.shape)}")
    cu_seqlens = cu_seq_lens.to(device, torch.int32)
    if position_ids is None:
        packed = Packed(input_ids[0], input_ids[0], cu_seqlens, 0)
        position_ids = torch.arange(num_tokens, device=device) - cu_seqlens[:-1].long()[packed.sequence_ids()]
    if max_length is None:
        is_traced = torch.compiler.is_compiling() or len(cu_seqlens) < 2
        max_length = num_tokens if is_traced else int(cu_seqlens.diff().max())
    rows = None if embeds is None else embeds[0]
    packed = Packed(input_ids[0], position_ids.reshape(-1).long(), cu_seqlens, max_length, embeds=rows)
    return Door(packed, (1, num_tokens), None)
