"""Stored states of a frozen backbone: the same as computed ones, up to 16 bits; resumed, limited, keyed."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from conceptron.engine.data import states as module
from conceptron.engine.data.states import open_states
from conceptron.engine.data.windows import Part, Windows
from conceptron.engine.errors import InputError
from conceptron.models.backbone import Backbone
from conceptron.models.config import ConceptConfig
from conceptron.models.packing import pack


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    inner = AutoConfig.for_model(
        "bert", vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20,
        max_position_embeddings=32,
    )  # fmt: skip
    config = ConceptConfig(
        vocab_size=60, hidden_size=24, num_attention_heads=2, backbone_window=16,
        backbone={"config": {**inner.to_dict(), "model_type": "bert"}, "prefix": [2], "suffix": [3]},
    )  # fmt: skip
    built = Backbone(config).eval()
    built.model.load_state_dict(AutoModel.from_config(inner, add_pooling_layer=False).state_dict())
    return built


@pytest.fixture
def windows() -> Windows:
    generator = np.random.default_rng(0)
    lengths = generator.integers(0, 40, size=30).astype(np.int32)
    tokens = generator.integers(4, 60, size=int(lengths.sum())).astype(np.uint16)
    return Windows([Part(tokens, np.cumsum(lengths) - lengths, lengths)])


def test_stored_is_computed(tmp_path, backbone, windows, capfd):
    store = open_states(tmp_path, windows, backbone, {"text": "a"}, limit_gb=1, batch_tokens=100)
    assert f"states of {windows.num_tokens} tokens: 0.00 GB in {tmp_path}" in capfd.readouterr().err
    for row in range(len(windows)):
        expected = backbone(pack([windows[row]]))
        assert store[row].shape == expected.shape and (store[row].float() - expected).abs().sum() <= 1e-2 * max(
            1, expected.numel()
        )
    rows = np.array([4, 2, 11])
    batch = store.attach(pack([windows[row] for row in rows]), rows)
    assert torch.equal(batch.states, torch.cat([store[row] for row in rows])) and len(batch.states) == batch.num_tokens


def test_it_is_computed_once(tmp_path, backbone, windows, monkeypatch, capfd):
    open_states(tmp_path, windows, backbone, {"text": "a"}, limit_gb=1)
    capfd.readouterr()
    monkeypatch.setattr(backbone, "forward", lambda packed: pytest.fail("computed again"))
    open_states(tmp_path, windows, backbone, {"text": "a"}, limit_gb=1)
    assert capfd.readouterr().err == ""
    with pytest.raises(pytest.fail.Exception):  # another text of the same lengths
        open_states(tmp_path, windows, backbone, {"text": "b"}, limit_gb=1)


def test_an_interrupted_one_goes_on(tmp_path, backbone, windows, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 100)
    whole = open_states(tmp_path / "whole", windows, backbone, {}, limit_gb=1, batch_tokens=50)
    forward, calls = backbone.forward, []

    def stopped(packed):
        calls.append(packed.num_tokens)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return forward(packed)

    monkeypatch.setattr(backbone, "forward", stopped)
    with pytest.raises(KeyboardInterrupt):
        open_states(tmp_path / "cut", windows, backbone, {}, limit_gb=1, batch_tokens=50)
    monkeypatch.setattr(backbone, "forward", lambda packed: calls.append(packed.num_tokens) or forward(packed))
    store = open_states(tmp_path / "cut", windows, backbone, {}, limit_gb=1, batch_tokens=50)
    assert sum(calls) < 1.4 * windows.num_tokens and np.array_equal(store.states, whole.states)


def test_the_limit_comes_first(tmp_path, backbone, windows):
    with pytest.raises(InputError, match=r"data\.states_gb: .* GB, the limit is 1e-05; raise it"):
        open_states(tmp_path, windows, backbone, {}, limit_gb=1e-5)
    assert not list(tmp_path.iterdir())


def test_states_beyond_sixteen_bits_are_refused(tmp_path, backbone, windows, monkeypatch):
    monkeypatch.setattr(backbone, "forward", lambda packed: torch.full((packed.num_tokens, 24), 1e6))
    with pytest.raises(InputError, match="does not fit into 16 bits"):
        open_states(tmp_path, windows, backbone, {}, limit_gb=1)
