"""What concepts do, asked of a model whose answers are known."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from conceptron.bench.analysis import does as module
from conceptron.bench.analysis.subject import reader
from conceptron.engine.data.windows import Part, Windows
from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoderOutput
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.objectives import TSDAE, MaskedLM, SpecialTokens

TOKENS = SpecialTokens(mask_id=0, special_ids=frozenset({0}), vocab_size=60)
WORTH = torch.tensor([1.0, 0.5, 0.0, 0.0])


class Known(nn.Module):
    """Concept c of text b is +-e_c, by turns over the texts; the NLL of every target is 2 less what it is told:
    1 by concept 0, 0.5 by concept 1, nothing by the others, and the opposite by those of a text of the other sign."""

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(num_concepts=4, nested_concepts=False)

    def encoder(self, packed, return_dict, num_concepts=None, num_iterations=None):
        count, B = num_concepts or 4, packed.num_sequences
        self.signs = torch.tensor([1.0, -1.0] * B)[:B]
        rows = torch.eye(4)[torch.arange(count) % 4]
        return ConceptEncoderOutput(
            last_hidden_state=self.signs[:, None, None] * rows, anchors=torch.arange(count).float().expand(B, count)
        )

    def forward(self, view, encoded, return_nll, return_dict):
        signs = torch.tensor([1.0, -1.0] * view.encoder.num_sequences)[: view.encoder.num_sequences]
        told_B = (encoded.last_hidden_state * WORTH).sum((1, 2)) * signs
        text = torch.searchsorted(view.decoder_cu_seqlens[1:].contiguous(), torch.arange(view.num_targets), right=True)
        return SimpleNamespace(nll=2 - told_B[text])


def loader(objective=None, lengths=(16,) * 16):
    ids = np.random.default_rng(0).integers(1, 60, sum(lengths))
    starts = np.cumsum([0, *lengths[:-1]])
    windows = Windows([Part(ids, starts, np.array(lengths, dtype=np.int32))])
    return reader(windows, objective or MaskedLM(probability=0.5), TOKENS)


@pytest.fixture(scope="module")
def found():
    return module.does(Known(), loader(), usage=[0.1, 0.2, 0.3, 0.4])


def test_whose_concepts(found):
    assert found.nll == pytest.approx({"own": 0.5, "other": 3.5, "mean": 2.0, "zero": 2.0})
    assert found.half_swapped == pytest.approx({"near": 3.0, "far": 3.0})  # the first two say it all, of every target
    assert found.num_texts == 16


def test_each_left_out(found):
    assert [slot.increase for slot in found.slots] == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-6)
    assert all(slot.error == pytest.approx(0, abs=1e-6) for slot in found.slots)
    shares = np.array([2 / 3, 1 / 3])
    assert found.figures["functional_rank"] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    assert found.figures["used_slots"] == 2


def test_how_many_are_kept(found):
    rows = {row["kept"]: row for row in found.kept}
    assert set(rows) == {0, 1, 2, 4}
    assert [rows[k]["gradient"] for k in (0, 1, 2, 4)] == pytest.approx([2, 1, 0.5, 0.5])
    assert rows[2]["gradient dropped"] == pytest.approx(2)
    assert rows[2]["attention"] == pytest.approx(2) and rows[2]["attention dropped"] == pytest.approx(0.5)
    assert rows[2]["nested"] == pytest.approx(1)  # concepts 0 and 2
    assert found.figures["concepts_for_95"] == 4


def test_ratios_of_tokens_to_concepts(found):
    rows = {row["tokens_per_concept"]: row for row in found.ratios}
    assert set(rows) == {1, 2, 4, 8, 16}  # 0.5 would need pieces of 2 tokens, 32 half a concept
    assert rows[2]["shorter"] == pytest.approx(0.5) and rows[2]["shorter_other"] == pytest.approx(3.5)
    assert rows[16]["concepts"] == pytest.approx(1)  # concept 0 alone
    assert rows[8]["shorter"] is None


def test_errors_count_texts_not_targets():
    """Targets of one text that rise together are one observation."""
    text = torch.arange(20).repeat_interleave(50)
    increase = torch.randn(20, generator=torch.Generator().manual_seed(0)).repeat_interleave(50)
    mean, error = module.of_texts(increase, text)
    assert mean == pytest.approx(float(increase.mean()))
    assert error == pytest.approx(float(increase[::50].std() / math.sqrt(20)), rel=1e-5)
    assert module.of_texts(torch.ones(3), torch.zeros(3, dtype=torch.int64)) == (1.0, math.inf)


def test_functional_rank():
    assert module.functional_rank([1.0, 1.0, -0.3, 1.0]) == pytest.approx(3)
    assert module.functional_rank([0.0, -1.0]) == 0


@pytest.mark.parametrize("objective", [MaskedLM(), TSDAE()])
@pytest.mark.parametrize("num_concepts", [1, 6])
def test_of_a_model(objective, num_concepts):
    torch.manual_seed(0)
    model = ConceptForMaskedLM(ConceptConfig(
        vocab_size=60, hidden_size=16, num_concepts=num_concepts, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_decoder_layers=1, mask_token_id=0,
    ))  # fmt: skip
    reading = loader(objective, (20,) * 6)
    found = module.does(model, reading, None)
    assert len(found.slots) == num_concepts and "attention" not in found.kept[-1]
    assert found.kept[-1]["nested"] == pytest.approx(found.nll["own"], rel=1e-5)
    assert found.kept[0]["norm"] == found.nll["zero"]
    whole = [row for row in found.ratios if row["concepts"] is not None]
    assert bool(whole) == (num_concepts > 1)
