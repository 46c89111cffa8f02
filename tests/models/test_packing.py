"""Packing: layout, padding anywhere, deletion, and the places of concepts."""

import numpy as np
import pytest
import torch

from conceptron.models.packing import Packed, pack, pack_padded
from conceptron.models.positions import anchors, rotary_angles, rotate, segment_offsets


def test_pack_lays_sequences_end_to_end_with_an_empty_one():
    packed = pack([[7, 8, 9], [], [5]])
    assert packed.input_ids.tolist() == [7, 8, 9, 5]
    assert packed.position_ids.tolist() == [0, 1, 2, 0]
    assert packed.cu_seqlens.tolist() == [0, 3, 3, 4] and packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == 3 and packed.sequence_ids().tolist() == [0, 0, 0, 2]
    assert packed.num_positions().tolist() == [3, 0, 1]


def test_pack_of_nothing():
    packed = pack([])
    assert packed.num_sequences == 0 and packed.num_tokens == 0 and packed.max_seqlen == 0


def test_padding_may_stand_anywhere():
    ids = torch.tensor([[7, 8, 9, 0, 0], [0, 0, 7, 8, 9], [7, 0, 8, 0, 9], [0, 0, 0, 0, 0]])
    packed = pack_padded(ids, (ids != 0).long())
    assert packed.input_ids.tolist() == [7, 8, 9] * 3
    assert packed.position_ids.tolist() == [0, 1, 2] * 3
    assert packed.cu_seqlens.tolist() == [0, 3, 6, 9, 9] and packed.max_seqlen == 3


def test_no_mask_means_every_token():
    packed = pack_padded(torch.tensor([[1, 2], [3, 4]]))
    assert packed.position_ids.tolist() == [0, 1, 0, 1] and packed.cu_seqlens.tolist() == [0, 2, 4]


def test_select_keeps_positions_and_extents():
    packed = pack([[7, 8, 9], [5, 6]]).select(torch.tensor([False, True, False, True, False]))
    assert packed.input_ids.tolist() == [8, 5] and packed.position_ids.tolist() == [1, 0]
    assert packed.cu_seqlens.tolist() == [0, 1, 2] and packed.num_positions().tolist() == [3, 2]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: pack([[[1, 2]]]), ["sequences[0]", "[1, 2]"]),
        (lambda: pack_padded(torch.zeros(3, dtype=torch.int64)), ["input_ids", "[B, N]", "[3]"]),
        (lambda: pack_padded(torch.zeros(2, 3), torch.zeros(2, 4)), ["attention_mask", "[2, 3]", "[2, 4]"]),
    ],
)
def test_refusals_name_the_argument(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("num_concepts", [1, 3, 8, 20])
def test_segments_partition_every_sequence(num_concepts):
    """Against the definition, token by token: part of position p is floor(p * C / N)."""
    rng = np.random.default_rng(0)
    packed = pack([rng.integers(9, size=n) for n in (13, 0, 1, 8, 40)])
    packed = packed.select(torch.from_numpy(rng.random(packed.num_tokens) < 0.7))
    offsets = segment_offsets(packed, num_concepts)
    assert offsets[0] == 0 and offsets[-1] == packed.num_tokens and (offsets.diff() >= 0).all()
    part_of_row = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
    sequence = packed.sequence_ids()
    expected = packed.position_ids * num_concepts // packed.num_positions()[sequence] + sequence * num_concepts
    assert torch.equal(part_of_row, expected)


def test_anchors_stand_in_the_middle_of_equal_parts():
    assert anchors(torch.tensor([6]), 6)[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert anchors(torch.tensor([8, 9]), 2).tolist() == [[1.5, 5.5], [1.75, 6.25]]
    assert anchors(torch.tensor([9]), 1)[0].tolist() == [4.0]


def test_rotation_keeps_norms_and_depends_on_the_difference_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)

    def score(at_q: float, at_k: float) -> float:
        where = torch.tensor([at_q, at_k], dtype=torch.float64)
        cos, sin = rotary_angles(where, 16, 10000.0)
        turned = rotate(q, (cos[:1], sin[:1])), rotate(k, (cos[1:], sin[1:]))
        assert torch.allclose(turned[0].norm(), q.norm(), rtol=1e-6)
        return float((turned[0] * turned[1]).sum())

    assert score(3, 5) == pytest.approx(score(103, 105), abs=1e-4)
    assert score(2.5, 0) == pytest.approx(score(52.5, 50), abs=1e-4)
    assert abs(score(3, 5) - score(3, 6)) > 1e-3
    assert score(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-6)


def test_rotation_matches_complex_multiplication():
    torch.manual_seed(0)
    x, where = torch.randn(5, 2, 8, dtype=torch.float64), torch.arange(5) * 1.7
    a, b = x.chunk(2, -1)
    turn = torch.exp(1j * where.double()[:, None, None] * 100.0 ** (-torch.arange(4) / 4))
    product = torch.complex(a, b) * turn
    expected = torch.cat((product.real, product.imag), -1)
    assert torch.allclose(rotate(x, rotary_angles(where, 8, 100.0)), expected, atol=1e-5)


def test_a_packed_batch_moves_as_one():
    packed = pack([[1, 2], [3]]).select(torch.tensor([True, False, True])).to("meta")
    assert isinstance(packed, Packed) and packed.input_ids.is_meta and packed.extents.is_meta and packed.max_seqlen == 2
