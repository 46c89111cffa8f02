"""Linear probes of encoders whose concepts are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from conceptron.bench.analysis import probes as module
from conceptron.bench.analysis.subject import reader
from conceptron.engine.data.windows import Part, Windows
from conceptron.models.encoder import ConceptEncoderOutput
from conceptron.models.objectives import MaskedLM, SpecialTokens

TOKENS = SpecialTokens(mask_id=0, special_ids=frozenset({0}), vocab_size=12)
C = 16


class Counts(nn.Module):
    """Concept c counts the words of its part of the text; untrained, it is noise."""

    def __init__(self, config, is_trained=False):
        super().__init__()
        self.config, self.is_trained, self.nothing = config, is_trained, nn.Parameter(torch.zeros(1))

    def forward(self, packed):
        rows = []
        for ids in packed.input_ids.tensor_split(packed.cu_seqlens[1:-1].long()):
            part = torch.arange(len(ids)) * C // len(ids)
            counts = torch.zeros(C, 12).index_put((part, ids), torch.ones(len(ids)), accumulate=True)
            noise = torch.randn(C, 12, generator=torch.Generator().manual_seed(int(ids.sum())))
            rows.append(counts if self.is_trained else noise)
        return ConceptEncoderOutput(last_hidden_state=torch.stack(rows))


@pytest.fixture(scope="module")
def found():
    generator = np.random.default_rng(0)
    num_texts, length = 120, 48
    ids = generator.choice(np.arange(1, 12), num_texts * length, p=np.array([66.0, *[3.4] * 10]) / 100)
    starts = np.arange(num_texts) * length
    windows = Windows([Part(ids, starts, np.full(num_texts, length, dtype=np.int32))])
    encoder = Counts(SimpleNamespace(num_concepts=C, backbone=None), is_trained=True)
    return {probe.name: probe for probe in module.probes(encoder, reader(windows, MaskedLM(), TOKENS))}


def test_what_is_there_is_found(found):
    assert set(found) == set(module.ASKS)
    assert found["words"].score > 0.75  # of log(1 + count): not quite linear
    assert found["length"].score > 0.8
    assert found["words here"].score > 0.9
    assert found["place"].score > 0.95


def test_what_is_not_there_is_not(found):
    assert abs(found["words elsewhere"].score) < 0.05  # no concept knows another's part
    for name, probe in found.items():
        chance = 0.4 if name == "place" else 0.1
        assert probe.untrained < chance and probe.shuffled < chance, name


def test_a_linear_map_is_recovered_and_noise_is_not():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 20, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(20, 3, generator=generator, dtype=torch.float64) + 5
    half = torch.arange(200), torch.arange(200, 400)
    assert module.explained(x, y, *half) > 0.999
    noise = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    assert -0.1 < module.explained(x, noise, *half) < 0.05
    assert module.explained(x, torch.ones(400, 2, dtype=torch.float64), *half) == 0


def test_few_texts_say_nothing():
    windows = Windows([Part(np.arange(1, 11), np.array([0, 5]), np.array([5, 5], dtype=np.int32))])
    encoder = Counts(SimpleNamespace(num_concepts=C, backbone=None))
    assert module.probes(encoder, reader(windows, MaskedLM(), TOKENS)) == []


def test_documents_lie_on_one_side():
    """Windows of one document share what they are about."""
    part = Part(np.ones(400, dtype=np.int64), np.arange(0, 400, 4), np.full(100, 4, dtype=np.int32),
                documents=np.repeat(np.arange(20), 5))  # fmt: skip
    loader = reader(Windows([part]), MaskedLM(), TOKENS)
    _, is_train = module.cut_texts(None, loader, np.random.default_rng(0))
    rows = loader.evaluation_rows(10_000)
    sides = [set(is_train[np.array(loader.windows.documents(rows)) == d].tolist()) for d in range(20)]
    assert all(len(side) == 1 for side in sides) and 0 < is_train.sum() < 100
