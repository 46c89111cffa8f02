"""Attention of packed rows to the rows near them, at linear cost.

R packed rows, H heads, Hkv key/value heads, D head width, W rows of a block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor, sequence_ids: Tensor, window: int, max_seqlen: int
) -> Tensor:
    """Each row reads the rows of its own sequence at most ``window`` positions away, itself included.

    Rows are cut into blocks of W = min(window, max_seqlen); as positions rise strictly, what a row may read lies in its
    own block and the two beside it. Time and memory O(R * 3W).

    Args:
        q: [R, H, D];  k, v: [R, Hkv, D], H a multiple of Hkv.
        position_ids: [R], rising strictly inside a sequence.
        sequence_ids: [R] int64 of at least 0, never falling.
        max_seqlen: at least the longest sequence.

    Returns:
        [R, H, D]
    """
    num_rows, W = q.shape[0], max(1, min(window, max_seqlen))
    num_blocks = -(-num_rows // W)
    missing = num_blocks * W - num_rows

    def blocks(x: Tensor, fill: int) -> Tensor:  # [R, ...] -> [n, W, ...]
        return F.pad(x, (*[0, 0] * (x.ndim - 1), 0, missing), value=fill).unflatten(0, (num_blocks, W))

    def neighbors(x: Tensor, fill: int) -> Tensor:  # [n, W, ...] -> [n, 3W, ...]
        edge = torch.full_like(x[:1], fill)
        return torch.cat((torch.cat((edge, x[:-1])), x, torch.cat((x[1:], edge))), dim=1)

    # rows that are not there see each other, so that none is left without anything to see
    position_nW, sequence_nW = blocks(position_ids, 0), blocks(sequence_ids, -1)
    far = (position_nW[:, :, None] - neighbors(position_nW, 0)[:, None, :]).abs() > window
    seen_n1WK = ((sequence_nW[:, :, None] == neighbors(sequence_nW, -2)[:, None, :]) & ~far)[:, None]
    q_nHWD = blocks(q, 0).transpose(1, 2)
    k_nKHD, v_nKHD = (neighbors(blocks(x, 0), 0).transpose(1, 2) for x in (k, v))
    out_nHWD = F.scaled_dot_product_attention(
        q_nHWD, k_nKHD, v_nKHD, attn_mask=seen_n1WK, enable_gqa=k.shape[1] != q.shape[1]
    )
    return out_nHWD.transpose(1, 2).flatten(0, 1)[:num_rows]
