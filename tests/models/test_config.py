"""The configuration: refusals in one line, and a round trip."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import AutoConfig

from conceptron.models.config import ConceptConfig
from conceptron.models.decisions import DECISIONS, FIELDS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_concepts": 0}, ["num_concepts", "whole number from 1", "0"]),
        ({"num_hidden_layers": 2.5}, ["num_hidden_layers", "whole number", "2.5"]),
        ({"vocab_size": True}, ["vocab_size", "whole number", "True"]),
        ({"hidden_size": 100, "num_attention_heads": 8}, ["hidden_size", "multiple of num_attention_heads = 8", "100"]),
        ({"hidden_size": 24, "num_attention_heads": 8}, ["hidden_size", "even width", "24"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "divisor of num_attention_heads = 8", "3"]),
        ({"layer_kind": "bxit"}, ["layer_kind", "cross", "bxit"]),
        ({"init_queries": "random"}, ["init_queries", "segment", "random"]),
        ({"token_positions": "absolute"}, ["token_positions", "rope", "absolute"]),
        ({"decoder_queries": "token"}, ["decoder_queries", "token+position", "token"]),
        ({"hidden_tokens": ["drop"]}, ["hidden_tokens", "drop", "['drop']"]),
        ({"dropout": 1.0}, ["dropout", "[0, 1)", "1.0"]),
        ({"rope_theta": 0}, ["rope_theta", "[1e-30, 1e+30]", "0"]),
        ({"anchor_bias": -1.0}, ["anchor_bias", "[0, 1e+30]", "-1.0"]),
        ({"timestep_conditioning": 1}, ["timestep_conditioning", "true or false", "1"]),
        ({"mask_token_id": 50368}, ["mask_token_id", "below vocab_size = 50368", "50368"]),
    ],
)
def test_a_wrong_field_is_refused_in_one_line(options, words):
    with pytest.raises(ValueError) as error:
        ConceptConfig(**options)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message


def test_defaults_fit_and_survive_a_round_trip(tmp_path):
    config = ConceptConfig(num_concepts=16, mask_token_id=4, dropout=0.1)
    assert config.num_key_value_heads == config.num_attention_heads and config.head_dim == 64
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (
        type(loaded) is ConceptConfig and loaded.to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)}
    ) or (loaded.to_diff_dict() == config.to_diff_dict())
    assert loaded.num_concepts == 16 and loaded.mask_token_id == 4 and loaded.dropout == 0.1


def test_special_ids_reach_transformers():
    config = ConceptConfig(pad_token_id=0, bos_token_id=1, tie_word_embeddings=False)
    assert (config.pad_token_id, config.bos_token_id, config.tie_word_embeddings) == (0, 1, False)


def test_five_decisions_hold_every_field_once():
    config = ConceptConfig(num_concepts=16, layer_kind="slot")
    found = config.decisions()
    assert list(found) == ["size", "tokens", "places", "reading", "answers"]
    assert found["size"].num_concepts == 16 and found["reading"].layer_kind == "slot"
    names = [each.name for group in DECISIONS.values() for each in fields(group)]
    assert len(names) == len(set(names)) == len(FIELDS) and set(names) <= set(config.to_dict())


def test_every_field_has_a_reason():
    """A recipe sets it, or a test of what it claims does."""
    texts = [path.read_text() for path in ROOT.glob("recipes/**/*.yaml")]
    texts += [path.read_text() for path in ROOT.glob("tests/models/**/test_*.py") if path != Path(__file__)]
    whole = "\n".join(texts)
    idle = [name for name in FIELDS if not re.search(rf'\b{name}["\']?\s*[=:]', whole)]
    assert idle == []
