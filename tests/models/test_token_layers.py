"""Layers of tokens: against Llama's own layer, against loops over rows, at linear cost."""

import math

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.funnel import Places, pair_up, pooled_attention
from conceptron.models.packing import Packed, pack
from conceptron.models.positions import TokenPositions
from conceptron.models.token_layers import TokenLayers, TokenResidualLinear, WindowConv

SMALL = dict(
    vocab_size=60, hidden_size=32, num_concepts=4, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
    num_decoder_layers=1, token_dim=24, num_token_layers=2, token_window=4,
)  # fmt: skip
MIXERS = {
    "local": {},
    "conv": dict(token_mixer="conv"),
    "funnel": dict(funnel=[0, 2], num_token_layers=3),
    "narrow": dict(token_dim=32),
}
every_mixer = pytest.mark.parametrize("options", MIXERS.values(), ids=MIXERS)


def encoder(dtype: torch.dtype = torch.float64, **options) -> ConceptEncoder:
    torch.manual_seed(0)
    return fill(ConceptEncoder(ConceptConfig(**{**SMALL, **options})).to(dtype).eval())


def fill(model: nn.Module) -> nn.Module:
    """Weights at which every part of a token layer weighs as much as its input."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, TokenResidualLinear):
                module.weight.normal_(std=module.in_features**-0.5)
            elif isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.normal_(std=0.3)
    return model


def words(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 60, (n,), generator=generator) for n in lengths]


def concepts(model: ConceptEncoder, *args, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(*args, **kwargs).last_hidden_state


@every_mixer
def test_padding_changes_nothing_and_sequences_do_not_meet(options):
    model, texts = encoder(**options), [*words(11, 1, 7), [], *words(2)]
    together = concepts(model, packed=pack(texts))
    assert together.shape == (5, 4, 32)
    for i, ids in enumerate(texts):
        assert torch.allclose(concepts(model, packed=pack([ids]))[0], together[i], atol=1e-12)
    ids, mask = torch.full((2, 16), 17), torch.zeros(2, 16)
    ids[0, 3:14], mask[0, 3:14] = texts[0], 1
    ids[1, :7], mask[1, :7] = texts[2], 1
    assert torch.allclose(concepts(model, ids, mask), together[[0, 2]], atol=1e-12)
    assert concepts(model, packed=pack([])).shape == (0, 4, 32)
    assert concepts(model, packed=pack([[], [], []])).isfinite().all()


@every_mixer
def test_gradients_reach_every_parameter(options):
    model = encoder(**options).train()
    model(packed=pack([*words(12), [], *words(5)])).last_hidden_state.square().mul(
        torch.rand(3, 4, 32)
    ).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, name
    model.zero_grad()
    model(packed=pack([[], []])).last_hidden_state.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@every_mixer
def test_autocast_gives_the_same_concepts_within_rounding(options):
    model, batch = encoder(torch.float32, **options), pack(words(9, 0, 30))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = concepts(model, packed=batch).float()
    assert (low - concepts(model, packed=batch)).abs().max() < 0.15


def test_a_wide_window_is_a_layer_of_llama():
    """transformers' LlamaDecoderLayer with a mask that hides nothing, every weight copied by name."""
    config = ConceptConfig(**{**SMALL, "token_window": 50, "norm_eps": 1e-5})
    ours = fill(TokenLayers(config).double())
    llama = LlamaConfig(
        hidden_size=24, intermediate_size=48, num_attention_heads=3, num_key_value_heads=3, rms_norm_eps=1e-5,
        rope_theta=10000.0, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    layers = [LlamaDecoderLayer(llama, i).double() for i in range(2)]
    for mine, theirs in zip(ours, layers, strict=True):
        attention = theirs.self_attn
        pairs = [(mine.attention_norm.weight, theirs.input_layernorm.weight),
                 (mine.feed_norm.weight, theirs.post_attention_layernorm.weight),
                 (mine.attention.query.weight, attention.q_proj.weight),
                 (mine.attention.key.weight, attention.k_proj.weight),
                 (mine.attention.value.weight, attention.v_proj.weight),
                 (mine.attention.out.weight, attention.o_proj.weight),
                 (mine.feed.down.weight, theirs.mlp.down_proj.weight)]  # fmt: skip
        with torch.no_grad():
            for to, source in pairs:
                source.normal_(std=0.3)
                to.copy_(source)
            mine.feed.gate_up.weight.copy_(torch.cat((theirs.mlp.gate_proj.weight, theirs.mlp.up_proj.weight)))
    x = torch.randn(19, 24, dtype=torch.float64)
    packed = pack([[5] * 12, [5] * 7])
    got, _ = ours(x, packed, TokenPositions(config, 24))
    rotary = LlamaRotaryEmbedding(llama)
    for rows in (slice(0, 12), slice(12, 19)):
        expected = x[None, rows]
        angles = rotary(expected.float(), torch.arange(expected.shape[1])[None])
        for layer in layers:
            mask = torch.zeros(1, 1, expected.shape[1], expected.shape[1], dtype=torch.float64)
            out = layer(expected, attention_mask=mask, position_embeddings=tuple(a.double() for a in angles))
            expected = out[0] if isinstance(out, tuple) else out
        assert torch.allclose(got[rows], expected[0], atol=1e-5)


def test_a_convolution_stays_in_its_sequence_and_leaves_gaps_open():
    """Against a loop over positions: a deleted token is a zero, not a neighbour's seat."""
    torch.manual_seed(0)
    conv = WindowConv(ConceptConfig(**SMALL)).double()
    with torch.no_grad():
        conv.weight.normal_()
        conv.out.weight.copy_(torch.eye(24))
    positions = [[0, 1, 2, 5, 6, 8], [0], [], [1, 3]]
    places = text_positions(positions)
    x = torch.randn(9, 24, dtype=torch.float64)
    got = conv(x, None, places)
    row = 0
    for where in positions:
        held = {p: x[row + i] for i, p in enumerate(where)}
        for p in where:
            expected = sum(conv.weight[o + 2] * held[p + o] for o in range(-2, 3) if p + o in held)
            assert torch.allclose(got[row], expected, atol=1e-12)
            row += 1


def text_positions(texts: list[list[int]]) -> Places:
    packed = Packed(
        torch.arange(sum(map(len, texts))), torch.tensor([p for text in texts for p in text]),
        torch.tensor([0, *torch.tensor([len(t) for t in texts]).cumsum(0)]).int(), max(map(len, texts)),
    )  # fmt: skip
    return Places(packed.position_ids, packed.sequence_ids(), packed)


TEXTS = [[0, 1, 2, 3, 4], [], [7], [0, 2, 3, 9], [0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7, 8]]


def test_pairs_stand_at_the_mean_of_their_positions():
    pairs, B = pair_up(text_positions(TEXTS), len(TEXTS)), len(TEXTS)
    packed, rows = pairs.places.packed, 0
    for b, where in enumerate(TEXTS):
        start, end = packed.cu_seqlens[b : b + 2].tolist()
        two = [where[i : i + 2] for i in range(0, len(where), 2)]
        assert pairs.places.positions[start:end].tolist() == [sum(pair) / len(pair) for pair in two]
        assert pairs.first[start:end].tolist() == [rows + i for i in range(0, len(where), 2)]
        assert pairs.second[start:end].tolist() == [rows + min(i + 1, len(where) - 1) for i in range(0, len(where), 2)]
        assert (pairs.places.sequence_ids[start:end] == b).all()
        rows += len(where)
    assert packed.num_tokens == (rows + B) // 2 == packed.cu_seqlens[-1] and packed.num_sequences == B + 1
    assert packed.max_seqlen >= packed.cu_seqlens.diff().max() and (packed.cu_seqlens.diff() >= 0).all()
    assert packed.num_positions()[:B].tolist() == [where[-1] + 1 if where else 0 for where in TEXTS]
    again = pair_up(pairs.places, B).places.packed
    assert again.cu_seqlens.diff()[:B].tolist() == [-(-len(where) // 4) for where in TEXTS]
    assert again.num_sequences == B + 1 and again.max_seqlen >= again.cu_seqlens.diff().max()


def test_one_text_leaves_nothing_over():
    for n in (1, 2, 7):
        halved = pair_up(text_positions([list(range(n))]), 1).places.packed
        assert halved.cu_seqlens.tolist() == [0, -(-n // 2)] and halved.num_tokens == -(-n // 2)


@pytest.mark.parametrize("window", [1, 2, 5, 40])
@pytest.mark.parametrize("twice", [False, True])
def test_pairs_read_unpooled_rows_near_them(window, twice):
    """Against a loop over pairs and rows, at the first halving and at the second."""
    places, B = text_positions(TEXTS), len(TEXTS)
    if twice:
        places = pair_up(places, B).places
    pairs = pair_up(places, B)
    R, P = places.packed.num_tokens, pairs.places.packed.num_tokens
    generator = torch.Generator().manual_seed(window)
    q = torch.randn(P, 4, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, R, 2, 8, generator=generator, dtype=torch.float64)
    got = pooled_attention(q, k, v, places, pairs, window)
    at, owner = places.positions.tolist(), places.sequence_ids.tolist()
    assert got.isfinite().all()
    for p in range(int(pairs.places.packed.cu_seqlens[B])):
        one, other = int(pairs.first[p]), int(pairs.second[p])
        seen = [r for r in range(R) if owner[r] == owner[one] and at[one] - window <= at[r] <= at[other] + window]
        for h in range(4):
            weights = torch.softmax(k[seen, h // 2] @ q[p, h] / math.sqrt(8), 0)
            assert torch.allclose(got[p, h], weights @ v[seen, h // 2], atol=1e-12)


def test_a_funnel_pools_queries_and_the_stream_only():
    """One halving layer of one text, written out: means of pairs ask, single rows answer."""
    config = ConceptConfig(**{**SMALL, "num_token_layers": 1, "funnel": [0], "token_window": 50})
    layers = fill(TokenLayers(config).double())
    x = torch.randn(7, 24, dtype=torch.float64)
    got, places = layers(x, pack([[5] * 7]), TokenPositions(config, 24))
    assert got.shape == (4, 24) and places.positions.tolist() == [0.5, 2.5, 4.5, 6.0]
    layer = layers[0]
    pooled = torch.stack([x[0:2].mean(0), x[2:4].mean(0), x[4:6].mean(0), x[6]])
    h, ph, frequencies = layer.attention_norm(x), layer.attention_norm(pooled), 10000 ** (-torch.arange(4) / 4)

    def turned(project, rows, positions):
        heads = project(rows).unflatten(-1, (-1, 8))
        angle = (torch.tensor(positions)[:, None] * frequencies)[:, None].double()
        a, b = heads.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    q = turned(layer.attention.query, ph, [0.5, 2.5, 4.5, 6.0])
    k = turned(layer.attention.key, h, [float(i) for i in range(7)])
    v = layer.attention.value(h).unflatten(-1, (-1, 8))
    weights = torch.einsum("phd,rhd->hpr", q, k).div(math.sqrt(8)).softmax(-1)
    expected = pooled + layer.attention.out(torch.einsum("hpr,rhd->phd", weights, v).flatten(1))
    expected = expected + layer.feed(layer.feed_norm(expected))
    assert torch.allclose(got, expected, atol=1e-5)


@every_mixer
def test_cost_is_linear(options):
    model, flops = encoder(torch.float32, **options), {}
    for N in (256, 512, 1024):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others are not all counted
            concepts(model, packed=pack(words(N)))
        flops[N] = counter.get_total_flops()
    assert flops[1024] - flops[512] == pytest.approx(2 * (flops[512] - flops[256]), rel=0.05)


@pytest.mark.parametrize("N", [1, 2, 3, 30, 31])
def test_any_length_becomes_all_concepts(N):
    model = encoder(funnel=[0, 1])
    out = model(packed=pack([*words(N), [], *words(N + 1)]), output_hidden_states=True)
    assert all(state.shape == (3, 4, 32) for state in out.hidden_states) and out.anchors.shape == (3, 4)
    assert out.last_hidden_state.isfinite().all()


def test_parameters_equal_their_closed_form():
    e, I, L, d = 24, 48, 3, 32
    base = encoder(num_token_layers=0).num_parameters()
    layer = 2 * e + 4 * e * e + 3 * e * I
    assert encoder(num_token_layers=L).num_parameters() - base == L * layer
    assert encoder(num_token_layers=L, funnel=[1]).num_parameters() - base == L * layer
    assert encoder(num_token_layers=L, token_mixer="conv").num_parameters() - base == L * (
        2 * e + 5 * e + e * e + 3 * e * I
    )
    assert encoder(num_token_layers=0).widen_tokens.weight.numel() == e * d


@pytest.mark.parametrize(("normalized", "size"), [(False, 0.02), (True, 1.0)])
def test_the_stream_of_tokens_stays_as_large_as_it_starts(normalized, size):
    """What a token is is not drowned by the branches: it stays most of what it carries."""
    for options in ({}, {"token_mixer": "conv"}):
        torch.manual_seed(0)
        config = ConceptConfig(**{
            **SMALL, "token_dim": 64, "num_token_layers": 4,
            "normalize_tokens": normalized, **options,
        })  # fmt: skip
        model, seen = ConceptEncoder(config), []
        model.token_layers.register_forward_hook(lambda module, args, out, seen=seen: seen.extend((args[0], out[0])))
        concepts(model, packed=pack(words(200)))
        x, y = seen
        assert x.std().item() == pytest.approx(size, rel=0.1) and size < y.std().item() < 1.5 * size
        assert torch.cosine_similarity(x, y, dim=1).mean() > 0.7
        weight = model.token_layers[3].feed.down.weight
        assert weight.std().item() == pytest.approx(size / math.sqrt(2 * 4 * 128), rel=0.1)


def test_a_funnel_is_one_graph_for_every_length():
    model = encoder(torch.float32, num_token_layers=1, funnel=[0])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for lengths in ((9, 4, 7), (5, 12, 3)):
        batch = pack(words(*lengths))
        assert torch.allclose(concepts(compiled, packed=batch), concepts(model, packed=batch), atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
