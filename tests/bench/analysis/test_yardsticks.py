"""The yardsticks on concepts and models made up to have known answers."""

import numpy as np
import pytest
import torch
from torch import nn

from conceptron.bench.analysis.geometry import metrics
from conceptron.bench.analysis.subject import reader
from conceptron.bench.analysis.yardsticks import adjacent_retrieval, reconstruction
from conceptron.engine.data.windows import Part, Windows
from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoderOutput
from conceptron.models.objectives import TSDAE, SpecialTokens


class Reads(nn.Module):
    """An encoder whose concepts are what a function makes of the tokens of each text."""

    def __init__(self, read):
        super().__init__()
        self.read, self.nothing = read, nn.Parameter(torch.zeros(1))

    def forward(self, packed):
        texts = packed.input_ids.tensor_split(packed.cu_seqlens[1:-1].long())
        return ConceptEncoderOutput(last_hidden_state=torch.stack([self.read(ids) for ids in texts]))


def texts(count: int, length: int) -> list[np.ndarray]:
    """Texts of which the second half repeats the first."""
    generator = np.random.default_rng(0)
    return [np.tile(generator.integers(2, 1000, length // 2), 2) for _ in range(count)]


def draw(ids: torch.Tensor, add: int = 0) -> torch.Tensor:
    """Six concepts that depend on the tokens alone."""
    generator = torch.Generator().manual_seed(int(ids.sum()) + add)
    return torch.randn(6, 16, generator=generator)


def test_identical_halves_are_always_found():
    found = adjacent_retrieval(Reads(draw), texts(40, 32))
    assert found == {"retrieval_pooled": 1.0, "retrieval_slots": 1.0, "chance": 1 / 40}


def test_concepts_without_content_are_found_by_chance():
    """As many as 200 texts: the mean of two directions over 200 draws of 1/200 has a standard deviation of 0.5 %."""
    calls = iter(range(10**6))
    noise = adjacent_retrieval(Reads(lambda ids: draw(ids, 1000 * next(calls))), texts(200, 32))
    static = adjacent_retrieval(Reads(lambda ids: torch.ones(6, 16)), texts(200, 32))
    for similarity in ("pooled", "slots"):
        assert noise[f"retrieval_{similarity}"] <= 0.03
        assert static[f"retrieval_{similarity}"] == pytest.approx(1 / 200)  # all equally near: one is right by chance


def test_slots_are_told_apart_where_their_mean_is_not():
    """Concepts that cancel in the mean: pooled finds by chance, slot by slot finds all."""

    def opposed(ids):
        z = draw(ids).round(decimals=1)
        return torch.stack([z, -z], dim=1).flatten(0, 1)  # in pairs, so that the sum is 0 without rounding

    found = adjacent_retrieval(Reads(opposed), texts(40, 32))
    assert found["retrieval_slots"] == 1.0 and found["retrieval_pooled"] == pytest.approx(1 / 40)


def test_retrieval_by_hand():
    """Row 0 finds itself both ways; rows 1 and 2 find each other instead."""
    a, b = torch.eye(3), torch.eye(3)[[0, 2, 1]]
    assert metrics.retrieval(a, b) == pytest.approx(1 / 3)
    assert adjacent_retrieval(Reads(draw), texts(1, 32))["chance"] is None


def test_static_prototypes_are_flagged():
    """The best rank that the seeds' metric knows, and nothing of the text."""
    frozen = torch.linalg.qr(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))[0].T.expand(20, 32, 64)
    figures = metrics.geometry(frozen)
    assert figures["effective_rank"] == pytest.approx(32) and figures["rank_dynamic"] == 0
    assert figures["static_fraction"] == pytest.approx(1)


class Copies(nn.Module):
    """A model that writes the tokens its encoder read at their places, and token 7 where something was deleted."""

    def __init__(self):
        super().__init__()
        self.config, self.nothing = ConceptConfig(vocab_size=16, hidden_size=16, num_attention_heads=2), nn.Linear(1, 1)

    def encoder(self, packed):
        self.read = packed
        return ConceptEncoderOutput(last_hidden_state=torch.zeros(packed.num_sequences, 1, 1))

    def decode_view(self, encoded, view):
        position_ids, cu_seqlens = view.decoder_position_ids, view.decoder_cu_seqlens
        assert torch.equal(view.timesteps, torch.ones(len(cu_seqlens) - 1)) and (view.decoder_input_ids == 1).all()
        written = torch.full_like(position_ids, 7)
        for b in range(len(cu_seqlens) - 1):
            rows = slice(int(self.read.cu_seqlens[b]), int(self.read.cu_seqlens[b + 1]))
            known = dict(zip(self.read.position_ids[rows].tolist(), self.read.input_ids[rows].tolist(), strict=True))
            for m in range(int(cu_seqlens[b]), int(cu_seqlens[b + 1])):
                written[m] = known.get(int(position_ids[m]), 7)
        return torch.eye(16)[written]

    def lm_head(self, hidden):
        return hidden


def test_reconstruction_tells_kept_from_deleted():
    ids = np.random.default_rng(0).integers(2, 16, 4000)
    windows = Windows([Part(ids, np.arange(0, 4000, 50), np.full(80, 50, dtype=np.int32))])
    tokens = SpecialTokens(mask_id=1, special_ids=frozenset({0, 1}), vocab_size=16)
    kept, deleted = reconstruction(Copies(), reader(windows, TSDAE(probability=0.6), tokens), 4000)
    assert kept == 1.0
    assert deleted == pytest.approx((ids == 7).mean(), abs=0.03)  # about 2,400 draws of 1 in 14: 0.5 % each way
