"""Local attention of packed rows against a plain loop over rows."""

import math

import pytest
import torch

from conceptron.models.local import local_attention


def by_rows(q, k, v, positions, sequences, window):
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for i in range(len(q)):
        seen = [
            j for j in range(len(q)) if sequences[j] == sequences[i] and abs(positions[j] - positions[i]) <= window
        ]
        for h in range(q.shape[1]):
            scores = torch.stack([q[i, h] @ k[j, h // group] for j in seen]) / math.sqrt(q.shape[2])
            out[i, h] = (scores.softmax(0)[:, None] * torch.stack([v[j, h // group] for j in seen])).sum(0)
    return out


@pytest.mark.parametrize("window", [1, 3, 4, 50])
@pytest.mark.parametrize("Hkv", [4, 2])
def test_against_a_loop(window, Hkv):
    generator = torch.Generator().manual_seed(window)
    lengths = [1, 9, 4, 13]
    positions = torch.cat([torch.arange(n) for n in lengths])
    positions[12:] += 2  # a gap, where tokens were deleted
    sequences = torch.repeat_interleave(torch.tensor([0, 1, 3, 4]), torch.tensor(lengths))  # sequence 2 is empty
    q = torch.randn(27, 4, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 27, Hkv, 8, generator=generator, dtype=torch.float64)
    ours = local_attention(q, k, v, positions, sequences, window, max_seqlen=13)
    assert torch.allclose(ours, by_rows(q, k, v, positions, sequences, window), atol=1e-12)


def test_without_rows():
    empty = torch.zeros(0, 2, 8)
    rows = torch.zeros(0, dtype=torch.int64)
    assert local_attention(empty, empty, empty, rows, rows, 4, max_seqlen=0).shape == (0, 2, 8)
