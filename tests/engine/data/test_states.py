"""Stored states of a frozen backbone: the same as computed ones, up to 16 bits; resumed, limited, keyed."""

from dataclasses import replace

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


def opened(cache, windows, backbone, rows=None, key="a", limit_gb=1.0, **more):
    rows = np.arange(len(windows)) if rows is None else np.array(rows)
    return open_states(cache, windows, rows, backbone, 24, key, limit_gb, **more)


def test_stored_is_computed(tmp_path, backbone, windows, capfd):
    store = opened(tmp_path, windows, backbone, batch_tokens=100)
    assert f"states of {windows.num_tokens} tokens: 0.00 GB into {tmp_path}" in capfd.readouterr().err
    for row in range(len(windows)):
        expected = backbone(pack([windows[row]]))
        assert store[row].shape == expected.shape and store[row].dtype == torch.float16
        torch.testing.assert_close(store[row].float(), expected, atol=2e-3, rtol=2e-3)
    rows = np.array([4, 2, 11])
    batch = store.attach(pack([windows[row] for row in rows]), rows)
    assert torch.equal(batch.states, torch.cat([store[row] for row in rows])) and len(batch.states) == batch.num_tokens


def test_each_window_is_computed_once(tmp_path, backbone, windows, monkeypatch, capfd):
    forward, seen = backbone.forward, []
    monkeypatch.setattr(backbone, "forward", lambda packed: seen.append(packed.num_sequences) or forward(packed))
    store = opened(tmp_path, windows, backbone, rows=[3, 5, 3])
    assert sum(seen) == 2
    with pytest.raises(RuntimeError, match="holds no states of window 4"):
        store[4]
    store = opened(tmp_path, windows, backbone, rows=[3, 4, 5])
    assert sum(seen) == 3 and len(store[4]) == windows.lengths[4]
    capfd.readouterr()
    opened(tmp_path, windows, None, rows=[5, 4])
    assert sum(seen) == 3 and capfd.readouterr().err == ""
    opened(tmp_path, windows, backbone, rows=[3], key="b")  # another backbone
    other = Windows([replace(windows.parts[0], tokens=windows.parts[0].tokens[::-1].copy())])  # another text
    opened(tmp_path, other, backbone, rows=[3])
    assert sum(seen) == 5


def test_an_interrupted_one_goes_on(tmp_path, backbone, windows, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 100)
    whole = opened(tmp_path / "whole", windows, backbone, batch_tokens=50)
    forward, calls = backbone.forward, []

    def stopped(packed):
        calls.append(packed.num_tokens)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return forward(packed)

    monkeypatch.setattr(backbone, "forward", stopped)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path / "cut", windows, backbone, batch_tokens=50)
    monkeypatch.setattr(backbone, "forward", lambda packed: calls.append(packed.num_tokens) or forward(packed))
    store = opened(tmp_path / "cut", windows, backbone, batch_tokens=50)
    assert sum(calls) < 1.4 * windows.num_tokens
    for row in range(len(windows)):  # calls of other lengths: equal but for rounding
        torch.testing.assert_close(store[row], whole[row], atol=2e-3, rtol=2e-3)


def test_the_limit_comes_first(tmp_path, backbone, windows):
    with pytest.raises(InputError, match=r"data\.states_gb: .* GB, the limit is 1e-05; raise it"):
        opened(tmp_path, windows, backbone, limit_gb=1e-5)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"data\.states_gb: .* states of 1 windows are not there"):
        opened(tmp_path, windows, None, rows=[1])
    opened(tmp_path, windows, backbone, rows=[1], limit_gb=2 * 24 * windows.lengths[1] / 1e9)


def test_states_beyond_sixteen_bits_are_refused(tmp_path, backbone, windows, monkeypatch):
    monkeypatch.setattr(backbone, "forward", lambda packed: torch.full((packed.num_tokens, 24), 1e6))
    with pytest.raises(InputError, match="does not fit into 16 bits"):
        opened(tmp_path, windows, backbone)
