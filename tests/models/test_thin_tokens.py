"""Tokens thinner than the model: nothing changes where they are not, and the tied table learns from both ends."""

import pytest
import torch
from torch import nn

from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.layers import widening
from conceptron.models.masked_lm import ConceptForMaskedLM

V, d, e = 60, 32, 8
SMALL = dict(
    vocab_size=V, hidden_size=d, num_concepts=6, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
    num_decoder_layers=1, mask_token_id=3,
)  # fmt: skip


def model(**options) -> ConceptForMaskedLM:
    torch.manual_seed(0)
    return ConceptForMaskedLM(ConceptConfig(**{**SMALL, **options})).double().eval()


def batch() -> dict:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 40, (2, 10), generator=generator)
    return dict(input_ids=ids, labels=torch.randint(40, V, (2, 10), generator=generator))


def test_full_width_is_bit_identical_to_no_projection():
    wide, same = model(), model(token_dim=d)
    assert isinstance(widening(wide.config), nn.Identity) and isinstance(same.lm_head.narrow, nn.Identity)
    assert wide.state_dict().keys() == same.state_dict().keys() and not any("widen" in k for k in wide.state_dict())
    ids = batch()["input_ids"]
    seen = []
    wide.encoder.token_norm.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        ours = wide(ids).logits
        assert torch.equal(ours, same(ids).logits)
        assert torch.equal(seen[0], wide.encoder.embed_tokens(ids.flatten()))


def test_thin_tokens_are_a_factor_of_wide_ones():
    """An encoder whose table is the product of the thin one and its projection gives the same concepts."""
    thin, wide = model(token_dim=e).encoder, model().encoder
    state = {name: x for name, x in thin.state_dict().items() if "widen" not in name}
    wide.load_state_dict(state | {"embed_tokens.weight": thin.embed_tokens.weight @ thin.widen_tokens.weight.T})
    ids = batch()["input_ids"]
    with torch.no_grad():
        assert torch.allclose(thin(ids).last_hidden_state, wide(ids).last_hidden_state, atol=1e-12)


@pytest.mark.parametrize("queries", ["token+position", "position"])
def test_the_tied_table_learns_from_both_sides(queries):
    """Its gradient is the sum of what three tables of their own get, and none of these is zero."""
    tied = model(token_dim=e, decoder_queries=queries)
    untied = model(token_dim=e, decoder_queries=queries, tie_word_embeddings=False)
    untied.load_state_dict(tied.state_dict())
    for built in (tied, untied):
        built(**batch()).loss.backward()
    tables = [untied.encoder.embed_tokens.weight, untied.lm_head.weight]
    if queries == "token+position":
        tables.append(untied.decoder.embed_tokens.weight)
    assert all(table.grad.norm() > 1e-6 for table in tables)
    assert tied.lm_head.weight is tied.encoder.embed_tokens.weight and tied.lm_head.weight.shape == (V, e)
    assert torch.allclose(tied.lm_head.weight.grad, sum(table.grad for table in tables), atol=1e-12)
    read = torch.unique(batch()["input_ids"])  # ids 4 .. 39; targets are others, which the encoder never saw
    assert (untied.encoder.embed_tokens.weight.grad[read].norm(dim=1) > 0).all()
    assert (untied.encoder.embed_tokens.weight.grad[40:] == 0).all()
    assert (untied.lm_head.weight.grad[40:].norm(dim=1) > 0).all()


@pytest.mark.parametrize("width", [d, e])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_equal_their_closed_form(width, tied):
    C, I, H, D = 6, 48, 4, 8
    attention, feed = 4 * d * H * D + 2 * (D + D), 3 * d * I
    encoder = d + C * d + (2 * attention + feed + 3 * d)
    decoder = d + attention + feed + 3 * d
    bridges = 0 if width == d else 3 * width * d  # encoder, decoder, head
    tables = V * width * (1 if tied else 3)
    expected = encoder + decoder + bridges + tables + V  # and the bias of the head
    assert model(token_dim=width, tie_word_embeddings=tied).num_parameters() == expected


def test_a_thin_model_of_the_usual_size_saves_what_it_promises():
    """50368 x 512 against 50368 x 64 + 64 x 512, on the meta device."""
    sizes = {}
    for width in (512, 64):
        with torch.device("meta"):
            sizes[width] = ConceptEncoder(ConceptConfig(token_dim=width)).num_parameters()
    assert sizes[512] - sizes[64] == 50368 * 512 - (50368 * 64 + 64 * 512)
