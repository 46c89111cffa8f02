"""The weights with which concepts read tokens, against what the fused operators make of the same tokens."""

import pytest
import torch

from conceptron.models import attention_maps
from conceptron.models.attention_maps import Read
from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.packing import pack

SHAPE = dict(
    vocab_size=60, hidden_size=32, num_concepts=5, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
    num_decoder_layers=1, mask_token_id=1,
)  # fmt: skip
KINDS = {
    "cross": {},
    "shared keys": {"share_kv": 2, "num_key_value_heads": 2},
    "tied": {"tie_layers": True, "num_iterations": 4},
    "bixt": {"layer_kind": "bixt"},
    "slot, mean": {"layer_kind": "slot"},
    "slot, sum": {"layer_kind": "slot", "slot_normalize": "sum", "tie_layers": True},
    "hybrid": {"layer_kind": "hybrid", "num_key_value_heads": 2},
    "token layers, yarn": {"num_token_layers": 1, "rope_extension": "yarn", "rope_factor": 4.0},
}


def build(**options) -> ConceptEncoder:
    torch.manual_seed(0)
    return ConceptEncoder(ConceptConfig(**{**SHAPE, **options})).eval()


def texts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 60, (n,), generator=generator) for n in lengths]


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_weights_times_values_are_what_was_read(options):
    """Each layer's own output is made again from its map: the map is exact, not a likeness."""
    encoder, packed = build(**options), pack(texts(9, 4))
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(layer, c_BCd, angles, tokens):
        read = attention_maps.read_of(layer, c_BCd, angles, tokens)
        if options.get("layer_kind") == "bixt":
            values = layer.read.token_value(layer.token_norm(tokens.states)).unflatten(-1, (4, 8))
        else:
            shared = attention_maps.with_keys_values(layer.read, tokens, options.get("tie_layers", False))
            values = shared.keys_values[1]
        values = values.repeat_interleave(4 // values.shape[1], dim=1)
        made = torch.stack([
            torch.stack([read.head(b, rows, h)[0] @ values[rows, h] for h in range(4)], dim=1)
            for b, rows in read.texts()
        ])  # [B, C, H, D]
        found.append((made, torch.zeros(0)))

    read_by_layer, hooks = [], []
    for layer in encoder.layers:
        out = layer.read.concept_out if options.get("layer_kind") == "bixt" else getattr(layer.read, "out", None)
        target = layer.update if out is None else out
        is_gated = out is None
        hooks.append(target.register_forward_pre_hook(
            lambda _, inputs, is_gated=is_gated: read_by_layer.append(inputs[1 if is_gated else 0])
        ))  # fmt: skip
    with torch.no_grad():
        encoder.encode(packed, watch=watch)
    assert len(read_by_layer) == len(found) == options.get("num_iterations", 3)
    for read, (made, _) in zip(read_by_layer, found, strict=True):
        torch.testing.assert_close(made.flatten(-2), read, atol=2e-6, rtol=2e-5)


def test_padded_packed_and_flattened_agree():
    encoder, (a, b) = build(), texts(7, 4)
    padded = torch.zeros(2, 7, dtype=torch.long)
    padded[0], padded[1, 3:] = a, b
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    got = encoder(padded, mask, output_attentions=True).attentions
    assert len(got) == 3 and got[0].shape == (2, 4, 5, 7) and not got[0].requires_grad
    assert (got[1][1, :, :, :3] == 0).all()
    torch.testing.assert_close(got[2].sum(-1), torch.ones(2, 4, 5))
    row = encoder(packed=pack([a, b]), output_attentions=True).attentions
    torch.testing.assert_close(row[2], torch.cat((got[2][0], got[2][1, :, :, 3:]), dim=-1))
    flat = encoder(torch.cat((a, b))[None], cu_seq_lens_q=torch.tensor([0, 7, 11]), output_attentions=True).attentions
    torch.testing.assert_close(flat[2], row[2][None])
    concepts = encoder(padded, mask).last_hidden_state
    torch.testing.assert_close(encoder(padded, mask, output_attentions=True).last_hidden_state, concepts)


def test_hidden_tokens_have_no_weight_and_the_masked_lm_hands_maps_on():
    torch.manual_seed(0)
    model = ConceptForMaskedLM(ConceptConfig(**SHAPE, hidden_tokens="drop")).eval()
    ids = texts(8)[0][None].clone()
    ids[0, [2, 5]] = 1
    maps = model(ids, output_attentions=True).attentions
    assert maps[0].shape == (1, 4, 5, 8)
    assert (maps[0][..., [2, 5]] == 0).all() and (maps[0][..., [0, 1, 3, 4, 6, 7]] > 0).all()
    assert model(ids).attentions is None


def test_slots_share_out_tokens():
    encoder, packed = build(layer_kind="slot"), pack(texts(6))
    seen = []
    encoder.encode(packed, watch=lambda *given: seen.append(attention_maps.read_of(*given).mean(0, slice(0, 6))))
    for weights, shares in seen:
        torch.testing.assert_close(shares.sum(0), torch.ones(6))
        torch.testing.assert_close(weights.sum(1), torch.ones(5))


def test_a_map_built_by_hand():
    """Two concepts, three tokens, one head of width 1: scores are the products."""
    packed = pack([[0, 0, 0]])
    read = Read(torch.tensor([[[[0.0]], [[1.0]]]]), torch.tensor([[[0.0]], [[0.0]], [[torch.log(torch.tensor(2.0))]]]),
                1, "", packed)  # fmt: skip
    weights, shares = read.head(0, slice(0, 3), 0)
    torch.testing.assert_close(weights, torch.tensor([[1 / 3] * 3, [0.25, 0.25, 0.5]]))
    torch.testing.assert_close(shares[:, 2], torch.tensor([0.4, 0.6]))


def test_what_cannot_be_given_is_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match="funnel"):
        build(num_token_layers=1, funnel=[0])(texts(8)[0][None], output_attentions=True)
    monkeypatch.setattr(attention_maps, "MAX_WEIGHTS", 3 * 4 * 5 * 8 - 1)
    with pytest.raises(ValueError, match=r"at most 479 weights.*got 480: 3 layers x 4 heads x 5 concepts x 8 tokens"):
        build()(texts(8)[0][None], output_attentions=True)
