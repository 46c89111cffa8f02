"""Philox against the published answers, and the masks that kernels and torch must agree on."""

import pytest
import torch
import triton
import triton.language as tl

from conceptron.kernels.philox import as_seed, check_dropout, drop_threshold, keep_mask, philox
from conceptron.kernels.tiles import keep_tile

# known answers of Random123 1.14 for philox4x32, 10 rounds: counter, key, words
ANSWERS = [
    ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, -1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0A4093822,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), ANSWERS, ids=["zeros", "ones", "pi"])
def test_known_answers(counter, key, words):
    got = philox(torch.tensor(key), *(torch.tensor(word) for word in counter), rounds=10)
    assert [int(word) for word in got] == words


def mask(seed: int, dropout_p: float, num_heads: int, num_rows: int, num_columns: int) -> torch.Tensor:
    h, row = torch.arange(num_heads)[:, None, None], torch.arange(num_rows)[:, None]
    return keep_mask(torch.tensor(seed), dropout_p, torch.tensor(3), h, row, num_columns)


def test_mask_keeps_the_right_share_everywhere():
    kept = mask(11, 0.3, 4, 256, 1024).double()
    assert abs(float(kept.mean()) - 0.7) < 4 * (0.21 / kept.numel()) ** 0.5
    for axis in ((0, 1), (0, 2), (1, 2)):  # no column, row or head with a share of its own
        spread = kept.mean(axis).std() / (0.21 / (kept.numel() / kept.mean(axis).numel())) ** 0.5
        assert float(spread) < 1.6


def test_mask_depends_on_seed_and_position_alone():
    whole = mask(11, 0.5, 2, 8, 64)
    assert torch.equal(whole[..., :13], mask(11, 0.5, 2, 8, 13))
    assert not torch.equal(whole, mask(12, 0.5, 2, 8, 64))
    assert not torch.equal(whole, mask(11 + 2**40, 0.5, 2, 8, 64)), "the upper half of the seed counts too"
    assert mask(11, 0.0, 2, 8, 64).all()
    assert bool((mask(11, 0.2, 2, 8, 64) | ~whole).all()), "what a small probability drops, a larger one drops too"


@triton.jit
def draw(out_ptr, seed_ptr, threshold, b, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    kept = keep_tile(tl.load(seed_ptr), threshold, b, row // 4, row % 4, first_column, ROWS, COLUMNS)
    tl.store(out_ptr + row[:, None] * COLUMNS + column[None, :], kept.to(tl.int32))


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_kernel_draws_the_same_mask(dropout_p, device):
    seed = torch.tensor([2**61 + 12345], device=device)
    out = torch.zeros(16, 32, dtype=torch.int32, device=device)
    draw[(1,)](out, seed, drop_threshold(dropout_p), 3, 64, ROWS=16, COLUMNS=32)
    row = torch.arange(16, device=device)[:, None]
    expected = keep_mask(seed, dropout_p, torch.tensor(3, device=device), row // 4, row % 4, 96)[:, 64:]
    assert torch.equal(out.bool(), expected)


def test_seeds(device):
    assert torch.equal(as_seed(7, device), torch.tensor([7], device=device))
    torch.manual_seed(1)
    first, second = as_seed(None, device), as_seed(None, device)
    torch.manual_seed(1)
    assert torch.equal(first, as_seed(None, device)) and not torch.equal(first, second)
    with pytest.raises(ValueError, match=r"^seed: expected 0 <= seed < 2\*\*63, got -1"):
        as_seed(-1, device)
    with pytest.raises(TypeError, match=r"^seed: expected an int, an int64 tensor or None, got float"):
        as_seed(0.5, device)
    with pytest.raises(ValueError, match=r"^seed: expected one int64"):
        as_seed(torch.zeros(2, dtype=torch.int64, device=device), device)


@pytest.mark.parametrize("wrong", [-0.1, 1.0, float("nan")])
def test_probabilities_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"^dropout_p: expected 0 <= dropout_p < 1"):
        check_dropout(wrong)
