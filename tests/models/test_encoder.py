"""The encoder: what it must not depend on, what it must, and how it starts."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModel

from conceptron.models.config import ConceptConfig
from conceptron.models.decisions import CHOICES
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.packing import Packed, pack, pack_padded
from conceptron.models.queries import ConceptQueries

OWN_QUERIES = [kind for kind in CHOICES["init_queries"] if kind != "state"]  # that needs a backbone

SMALL = dict(
    vocab_size=60, hidden_size=32, num_concepts=6, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    num_decoder_layers=1, mask_token_id=3,
)  # fmt: skip


def encoder(dtype: torch.dtype = torch.float64, **options) -> ConceptEncoder:
    torch.manual_seed(0)
    return ConceptEncoder(ConceptConfig(**{**SMALL, **options})).to(dtype).eval()


def words(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 60, (n,), generator=generator) for n in lengths]


def concepts(model: ConceptEncoder, *args, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(*args, **kwargs).last_hidden_state


INITS = OWN_QUERIES


@pytest.mark.parametrize("init_queries", INITS)
def test_padding_changes_nothing(init_queries):
    model, (long, short) = encoder(init_queries=init_queries), words(11, 4)
    tight = concepts(model, packed=pack([long, short]))
    ids, mask = torch.zeros(2, 20, dtype=torch.int64), torch.zeros(2, 20)
    ids[0, 5:16], mask[0, 5:16] = long, 1
    ids[1, :4], mask[1, :4] = short, 1
    ids[mask == 0] = 17  # what stands in the padding must not matter
    assert torch.allclose(concepts(model, ids, mask), tight, atol=1e-12)


@pytest.mark.parametrize("init_queries", INITS)
def test_sequences_do_not_meet(init_queries):
    model, (a, b, c) = encoder(init_queries=init_queries), words(9, 1, 14)
    together = concepts(model, packed=pack([a, b, [], c]))
    for i, ids in enumerate((a, b, [], c)):
        assert torch.allclose(concepts(model, packed=pack([ids]))[0], together[i], atol=1e-12)
    swapped = concepts(model, packed=pack([c, [], b, a]))
    assert torch.allclose(swapped, together[[3, 2, 1, 0]], atol=1e-12)


def test_a_deleted_token_is_an_absent_one():
    """Dropping rows of a packed batch, or [MASK] in a padded one, equals a text given with explicit positions."""
    model, (ids,) = encoder(), words(12)
    keep = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 0], dtype=torch.bool)
    explicit = Packed(
        ids[keep], torch.arange(12)[keep], torch.tensor([0, 7], dtype=torch.int32), 7, extents=torch.tensor([12])
    )
    expected = concepts(model, packed=explicit)
    assert torch.allclose(concepts(model, packed=pack([ids]).select(keep)), expected, atol=1e-12)
    masked = torch.where(keep, ids, 3)[None]
    assert torch.allclose(concepts(model, masked), expected, atol=1e-12)
    assert (concepts(model, packed=pack([ids[keep]])) - expected).abs().max() > 1e-3  # positions matter
    seen = encoder(hidden_tokens="mask")
    assert (concepts(seen, masked) - concepts(seen, packed=explicit)).abs().max() > 1e-3


@pytest.mark.parametrize("init_queries", INITS)
def test_text_without_tokens_gives_finite_concepts_and_gradients(init_queries):
    model = encoder(init_queries=init_queries).train()
    ids = torch.randint(4, 60, (2, 8))
    out = model(ids, torch.tensor([[0] * 8, [1] * 8])).last_hidden_state
    out.square().mean().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert concepts(model, packed=pack([[], []])).isfinite().all()
    assert concepts(model, packed=pack([])).shape == (0, 6, 32)


def test_order_of_tokens_matters_and_far_ones_reach_every_concept():
    model, (ids,) = encoder(), words(24)
    base = concepts(model, packed=pack([ids]))
    assert (concepts(model, packed=pack([ids.flip(0)])) - base).abs().max() > 1e-2
    changed = ids.clone()
    changed[-1] = 4 if ids[-1] != 4 else 5
    assert ((concepts(model, packed=pack([changed])) - base).abs().amax(-1) > 1e-9).all()


def test_concepts_without_a_place_are_a_set():
    """No anchors: permuting the learned concepts permutes the output. With anchors it does not."""
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for positions, is_set in (("none", True), ("rope", False), ("sinusoidal", False)):
        model, batch = encoder(init_queries="orthogonal", concept_positions=positions), pack(words(15, 7))
        before = concepts(model, packed=batch)
        with torch.no_grad():
            model.concepts.weight.copy_(model.concepts.weight[order].clone())
        after = concepts(model, packed=batch)
        assert torch.allclose(after, before[:, order], atol=1e-10) == is_set


def test_grouped_heads_equal_repeated_ones():
    grouped, full = encoder(num_key_value_heads=2), encoder()
    state = grouped.state_dict()
    for name, value in state.items():
        if ".key.project." in name or ".value." in name:
            state[name] = value.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    batch = pack(words(13, 2, 30))
    assert torch.allclose(concepts(grouped, packed=batch), concepts(full, packed=batch), atol=1e-12)


def test_parameters_equal_their_closed_form():
    d, V, C, L, I, H, Hkv, D = 32, 60, 6, 2, 48, 4, 2, 8
    attention = d * H * D + 2 * d * Hkv * D + H * D * d + 2 * (D + D)  # q, k and v, out; bias and norm of q and k
    layer = 2 * attention + 3 * d * I + 3 * d  # read, mix; gate, up, down; three norms
    assert encoder(num_key_value_heads=2).num_parameters() == V * d + d + C * d + L * layer


def test_every_weight_starts_as_designed():
    model = encoder(
        torch.float32, hidden_size=128, vocab_size=500, intermediate_size=256, num_concepts=16, num_decoder_layers=3
    )
    layer = model.layers[1]
    assert model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for linear, fan_in in ((layer.read.query.project, 128), (layer.mix.value, 128), (layer.feed.gate_up, 128)):
        assert linear.weight.std().item() == pytest.approx(1 / math.sqrt(fan_in), rel=0.03)
    for linear, fan_in in ((layer.read.out, 128), (layer.feed.down, 256)):
        assert linear.weight.std().item() == pytest.approx(1 / math.sqrt(fan_in * 2 * 3), rel=0.03)  # deeper part: 3
    gram = model.concepts.weight @ model.concepts.weight.T
    assert torch.allclose(gram, 128 * torch.eye(16), atol=1e-3)
    assert torch.equal(layer.read.query.bias.bias, layer.read.key.bias.bias)
    assert (layer.read.query.norm.weight == model.config.anchor_sharpness).all() and (layer.read_norm.weight == 1).all()


def test_more_concepts_than_channels_start_in_orthogonal_blocks():
    weight = encoder(num_concepts=40).concepts.weight
    assert torch.allclose(weight.norm(dim=1), torch.full((40,), math.sqrt(32), dtype=torch.float64), atol=1e-5)
    first = weight[:32]
    assert torch.allclose(first @ first.T, 32 * torch.eye(32, dtype=torch.float64), atol=1e-3)


def effective_rank(rows: torch.Tensor) -> float:
    """exp of the entropy of the singular values."""
    share = torch.linalg.svdvals(rows.double())
    share = share / share.sum()
    return float(torch.exp(-(share * share.log()).sum()))


@pytest.mark.parametrize("init_queries", INITS)
def test_untrained_concepts_are_distinct(init_queries, capsys):
    model = encoder(torch.float32, hidden_size=64, num_concepts=32, init_queries=init_queries, intermediate_size=128)
    z = concepts(model, packed=pack(words(*[96] * 16)))
    ranks = effective_rank(z.mean(0)), sum(map(effective_rank, z)) / 16
    with capsys.disabled():
        print(f"\nuntrained, init_queries={init_queries}: effective rank {ranks[0]:.1f} of the mean, "
              f"{ranks[1]:.1f} within a text, of 32")  # fmt: skip
    assert ranks[1] > 24
    if init_queries == "segment":  # what was read is there from the start, not only the learned prototypes
        assert float((z - z.mean(0)).square().mean() / z.square().mean()) > 0.2


def test_attention_starts_near_the_anchor():
    """The share of a concept's gradient that falls on the 16 of 64 tokens around it, with the bias and without."""
    (ids,), shares = words(64), {}
    for bias in (3.0, 0.0):
        model = encoder(anchor_bias=bias, init_queries="orthogonal", num_concepts=8, num_hidden_layers=1)
        embedded = []
        model.embed_tokens.register_forward_hook(lambda module, args, out, kept=embedded: kept.append(out))
        concept = model(packed=pack([ids])).last_hidden_state[0, 4]  # stands at position 35.5
        (gradient,) = torch.autograd.grad(concept @ torch.linspace(-1, 1, 32, dtype=torch.float64), embedded[0])
        pull = gradient.norm(dim=1)
        shares[bias] = float(pull[28:44].sum() / pull.sum())
    assert shares[3.0] > 0.6 and shares[0.0] < 0.45
    assert (encoder(concept_positions="none").layers[0].read.query.bias.bias == 0).all()


def test_saved_and_loaded_bit_for_bit(tmp_path):
    model, batch = encoder(torch.float32), pack(words(9, 30))
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is ConceptEncoder and AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert torch.equal(concepts(model, packed=batch), concepts(loaded, packed=batch))


def test_half_precision_does_not_round_positions():
    """bfloat16 weights, positions in the tens of thousands: tokens one apart still differ in angle."""
    model = encoder(torch.float32).bfloat16()
    near = Packed(torch.tensor([9, 10]), torch.tensor([40000, 40001]), torch.tensor([0, 2], dtype=torch.int32), 2)
    far = near._replace(position_ids=torch.tensor([39999, 40001]))
    out = [concepts(model, packed=batch) for batch in (near, far)]
    assert out[0].dtype == torch.bfloat16 and out[0].isfinite().all() and not torch.equal(*out)


def test_autocast_gives_the_same_concepts_within_rounding():
    model, batch = encoder(torch.float32), pack(words(9, 30))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = concepts(model, packed=batch).float()
    assert (low - concepts(model, packed=batch)).abs().max() < 0.1


def test_hidden_states_and_tuples():
    model, batch = encoder(), pack(words(9, 30))
    out = model(packed=batch, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert out.anchors.shape == (2, 6)
    assert torch.equal(model(packed=batch, return_dict=False)[0], out.last_hidden_state)


def test_inputs_that_do_not_fit_are_refused():
    model = encoder()
    with pytest.raises(ValueError, match="either input_ids"):
        model()
    with pytest.raises(ValueError, match="either input_ids"):
        model(torch.ones(1, 3, dtype=torch.int64), packed=pack([[4]]))
    with pytest.raises(ValueError, match=r"attention_mask: expected input_ids' shape \[1, 3\]"):
        model(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 4))


def test_concept_queries_read_the_mean_of_their_segment():
    model = encoder(num_concepts=2)
    tokens = torch.randn(5, 32, dtype=torch.float64)
    with torch.no_grad():
        out = model.concepts(tokens, pack([[9] * 5, []]))
    for i, rows in enumerate((slice(0, 3), slice(3, 5))):
        mean = tokens[rows].mean(0)
        expected = model.concepts.weight[i] + mean / mean.square().mean().sqrt()
        assert torch.allclose(out[0, i], expected, atol=1e-5)
    assert torch.equal(out[1], model.concepts.weight) and isinstance(model.concepts, ConceptQueries)


def test_padded_door_equals_packed_door():
    model, (ids,) = encoder(), words(10)
    assert torch.equal(concepts(model, ids[None]), concepts(model, packed=pack_padded(ids[None])))
