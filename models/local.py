"""Attention of packed rows to the rows near them, at linear cost.

R packed rows, H heads, K = Hkv key/value heads, D head width, W rows of a block, J rows that it may read.
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
    seen_n1WJ = ((sequence_nW[:, :, None] == neighbors(sequence_nW, -2)[:, None, :]) & ~far)[:, None]
    q_nHWD = blocks(q, 0).transpose(1, 2)
    k_nKJD, v_nKJD = (neighbors(blocks(x, 0), 0).transpose(1, 2) for x in (k, v))
    return attend(q_nHWD, k_nKJD, v_nKJD, seen_n1WJ).transpose(1, 2).flatten(0, 1)[:num_rows]


def attend(q_nHWD: Tensor, k_nKJD: Tensor, v_nKJD: Tensor, seen_n1WJ: Tensor) -> Tensor:
    """Attention of W rows to J under a mask, [n, H, W, D]; query head h reads head h // (H / Hkv).

    The queries of a group are rows of the same head: with ``enable_gqa`` torch knows no fused attention under a mask,
    and would hold all scores.
    """
    (n, H, W, D), num_kv_heads = q_nHWD.shape, k_nKJD.shape[1]
    group = H // num_kv_heads
    q_nKRD = q_nHWD.reshape(n, num_kv_heads, group * W, D)
    seen_n1RJ = seen_n1WJ[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
    return F.scaled_dot_product_attention(q_nKRD, k_nKJD, v_nKJD, attn_mask=seen_n1RJ).reshape(n, H, W, D)
