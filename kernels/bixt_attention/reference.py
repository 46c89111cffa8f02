"""The specification of BiXT attention: plain torch, any floating dtype, one sequence after the other.

S_cn         = scale * <concept_qk_c, token_qk_n>          per sequence and head, c < C, n < N
concept_out_c = sum_n softmax_n(S)_cn token_v_n            0 where N = 0
token_out_n   = sum_c softmax_c(S)_cn concept_v_c
"""

from itertools import pairwise

import torch
from torch import Tensor


def reference_bixt_attention(
    concept_qk: Tensor, concept_v: Tensor, token_qk: Tensor, token_v: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    concept_out, token_out = [concept_v.new_zeros(0, *concept_v.shape[1:])], [token_v.new_zeros(0, *token_v.shape[1:])]
    for b, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        similarity = scale * torch.einsum("chd,nhd->hcn", concept_qk[b], token_qk[start:end])
        read = torch.einsum("hcn,nhd->chd", similarity.softmax(2), token_v[start:end])
        concept_out.append(read.unsqueeze(0))
        token_out.append(torch.einsum("hcn,chd->nhd", similarity.softmax(1), concept_v[b]))
    return torch.cat(concept_out), torch.cat(token_out)
