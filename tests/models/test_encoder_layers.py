"""The kinds of layers: what they compute, against plain loops; what they must not depend on; how they start."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from conceptron.kernels.slot_attention.op import slot_attention
from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.encoder_layers import BixtLayer, ConceptAngles, GatedUpdate, Tokens, with_keys_values
from conceptron.models.layers import ZeroLinear
from conceptron.models.packing import pack
from conceptron.models.positions import rotary_angles

SMALL = dict(
    vocab_size=60, hidden_size=32, num_concepts=6, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    num_decoder_layers=1, mask_token_id=3,
)  # fmt: skip
KINDS = {
    "cross": dict(layer_kind="cross", block_norm="sandwich"),
    "bixt": dict(layer_kind="bixt"),
    "bixt, sandwich": dict(layer_kind="bixt", block_norm="sandwich"),
    "slot, gated": dict(layer_kind="slot", num_key_value_heads=2),
    "slot, residual, sum": dict(
        layer_kind="slot", slot_update="residual", slot_normalize="sum", block_norm="sandwich"
    ),
    "hybrid": dict(layer_kind="hybrid", num_key_value_heads=2),
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def encoder(dtype: torch.dtype = torch.float64, **options) -> ConceptEncoder:
    torch.manual_seed(0)
    model = ConceptEncoder(ConceptConfig(**{**SMALL, **options})).to(dtype).eval()
    with torch.no_grad():  # what starts at zero, or at one, must matter too
        for module in model.modules():
            if isinstance(module, ZeroLinear):
                module.weight.normal_(std=0.2)
                module.bias.normal_(std=0.2)
            elif isinstance(module, nn.RMSNorm) and module.weight is not None:
                module.weight.mul_(1 + 0.1 * torch.randn_like(module.weight))
    return model


def words(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 60, (n,), generator=generator) for n in lengths]


def concepts(model: ConceptEncoder, *args, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(*args, **kwargs).last_hidden_state


@every_kind
def test_padding_changes_nothing_and_sequences_do_not_meet(options):
    model, (a, b, c) = encoder(**options), words(11, 1, 7)
    together = concepts(model, packed=pack([a, [], b, c]))
    for i, ids in enumerate((a, [], b, c)):
        assert torch.allclose(concepts(model, packed=pack([ids]))[0], together[i], atol=1e-12)
    ids, mask = torch.full((2, 16), 17), torch.zeros(2, 16)
    ids[0, 3:14], mask[0, 3:14] = a, 1
    ids[1, :7], mask[1, :7] = c, 1
    assert torch.allclose(concepts(model, ids, mask), together[[0, 3]], atol=1e-12)
    assert concepts(model, packed=pack([])).shape == (0, 6, 32)


@every_kind
def test_gradients_reach_every_parameter_and_texts_without_tokens_are_finite(options):
    model = encoder(**options).train()
    out = model(packed=pack([*words(12), [], *words(5)])).last_hidden_state
    (out * torch.randn(out.shape, dtype=out.dtype)).sum().backward()
    assert torch.isfinite(out).all()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, name
    model.zero_grad()
    model(packed=pack([[], []])).last_hidden_state.square().mean().backward()
    assert model.embed_tokens.weight.grad is None or (model.embed_tokens.weight.grad == 0).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@every_kind
def test_autocast_gives_the_same_concepts_within_rounding(options):
    model, batch = encoder(torch.float32, token_dim=24, **options), pack(words(9, 0, 30))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(packed=batch, output_hidden_states=True)
        tokens = model.read_tokens(batch)
        states = tokens.states if tokens.source is None else tokens.source.tensors[0]
    is_stream = options["layer_kind"] == "bixt"  # others only read tokens, as matrices do
    assert states.dtype == (torch.float32 if is_stream else torch.bfloat16)
    assert all(state.dtype == torch.float32 for state in out.hidden_states)  # streams are not rounded to 16 bits
    assert (out.last_hidden_state - concepts(model, packed=batch)).abs().max() < 0.15


@every_kind
def test_concepts_without_a_place_are_a_set(options):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    model, batch = encoder(init_queries="orthogonal", concept_positions="none", **options), pack(words(15, 7))
    before = concepts(model, packed=batch)
    with torch.no_grad():
        model.concepts.weight.copy_(model.concepts.weight[order].clone())
    assert torch.allclose(concepts(model, packed=batch), before[:, order], atol=1e-10)


@every_kind
def test_saved_and_loaded_bit_for_bit(options, tmp_path):
    model, batch = encoder(torch.float32, tie_layers=True, num_iterations=3, **options), pack(words(9, 12))
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert loaded.config.to_diff_dict() == {**model.config.to_diff_dict(), "architectures": ["ConceptEncoder"]}
    assert torch.equal(concepts(model, packed=batch), concepts(loaded, packed=batch))


@every_kind
def test_cost_is_linear(options):
    model, flops = encoder(torch.float32, **options), {}
    model.keep = "keys"  # torch's counter knows no operator of ours
    for N in (128, 256, 512):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others are not all counted
            concepts(model, packed=pack(words(N)))
        flops[N] = counter.get_total_flops()
    assert flops[512] - flops[256] == 2 * (flops[256] - flops[128]) > 0


@pytest.mark.parametrize("kind, K", [("bixt", 2), ("hybrid", 1)])
def test_one_graph_for_every_length(kind, K):
    """A hybrid layer holds all that a slot layer does; of a cross layer see test_heads.py and, with a funnel,
    test_token_layers.py."""
    model = encoder(
        torch.float32, layer_kind=kind, tie_layers=True, num_iterations=K, num_token_layers=1, token_mixer="conv"
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for lengths in ((9, 4, 7), (5, 12, 3)):
        batch = pack(words(*lengths))
        assert torch.allclose(concepts(compiled, packed=batch), concepts(model, packed=batch), atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def turn(x: torch.Tensor, position: float) -> torch.Tensor:
    """RoPE of one vector [D], pair by pair."""
    D, out = x.shape[0], x.clone()
    for i in range(D // 2):
        angle = torch.tensor(position * 10000 ** (-2 * i / D))
        out[i] = x[i] * angle.cos() - x[i + D // 2] * angle.sin()
        out[i + D // 2] = x[i + D // 2] * angle.cos() + x[i] * angle.sin()
    return out


def head(heads: nn.Module, row: torch.Tensor, h: int, position: float) -> torch.Tensor:
    """One head of one row: projected, shifted by the bias, normalised, turned."""
    x = (heads.project.weight @ row)[h * 8 : h * 8 + 8] + heads.bias.bias
    return turn(x / (x.square().mean() + 1e-6).sqrt() * heads.norm.weight, position)


def rms(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight


def gated(feed: nn.Module, x: torch.Tensor) -> torch.Tensor:
    gate, up = (feed.gate_up.weight @ x).chunk(2)
    return feed.down.weight @ (gate * torch.sigmoid(gate) * up)


def test_bixt_is_one_similarity_with_two_softmaxes():
    """Against loops over concepts, tokens and heads of one sequence, both ways; the last layer reads the same."""
    model = encoder(layer_kind="bixt")
    layer, (ids,) = model.layers[0], words(5)
    tokens = model.read_tokens(pack([ids]))
    c, t = model.concepts(tokens.states, tokens.packed)[0], tokens.states
    places = [(i + 0.5) / 6 * 5 - 0.5 for i in range(6)]
    cn, tn = rms(c, layer.read_norm), rms(t, layer.token_norm)
    read, told = torch.zeros(6, 32).double(), torch.zeros(5, 32).double()
    for h in range(4):
        part = slice(8 * h, 8 * h + 8)
        keys_c = [head(layer.read.concept_key, row, h, at) for row, at in zip(cn, places, strict=True)]
        keys_t = [head(layer.read.token_key, row, h, at) for at, row in enumerate(tn)]
        similarity = torch.stack([torch.stack([a @ b / math.sqrt(8) for b in keys_t]) for a in keys_c])
        over_tokens, over_concepts = similarity.exp() / similarity.exp().sum(1, keepdim=True), similarity.softmax(0)
        for i in range(6):
            for n in range(5):
                read[i, part] += over_tokens[i, n] * (layer.read.token_value.weight @ tn[n])[part]
                told[n, part] += over_concepts[i, n] * (layer.read.concept_value.weight @ cn[i])[part]
    t = torch.stack([row + layer.read.token_out.weight @ x for row, x in zip(t, told, strict=True)])
    t = torch.stack([row + gated(layer.token_feed, rms(row, layer.token_feed_norm)) for row in t])
    c = torch.stack([row + layer.read.concept_out.weight @ x for row, x in zip(c, read, strict=True)])
    with torch.no_grad():
        angles = angles_of(model, tokens)
        got_c, got_t = layer(model.concepts(tokens.states, tokens.packed), angles, tokens)
        assert torch.allclose(got_c[0], layer.think(c[None], angles)[0], atol=1e-6)  # angles are float32
        assert torch.allclose(got_t.states, t, atol=1e-6)
        once, untouched = layer(model.concepts(tokens.states, tokens.packed), angles, tokens, is_last=True)
    assert torch.allclose(once, got_c, atol=1e-12) and untouched is tokens


def angles_of(model: ConceptEncoder, tokens: Tokens) -> ConceptAngles:
    angles = rotary_angles(model.anchors(tokens.packed), model.config.head_dim, model.config.rope_theta)
    return ConceptAngles(angles, angles)


def test_the_last_bixt_layer_owns_nothing_for_tokens():
    first, last = encoder(layer_kind="bixt").layers
    names = {name for name, _ in first.named_parameters()} - {name for name, _ in last.named_parameters()}
    assert {name.split(".")[0] for name in names} == {"read", "token_feed_norm", "token_feed"}
    assert {name for name in names if name.startswith("read")} == {"read.concept_value.weight", "read.token_out.weight"}
    with_last = encoder(layer_kind="bixt", num_hidden_layers=1)
    assert isinstance(with_last.layers[0], BixtLayer) and not with_last.layers[0].updates_tokens
    tied = encoder(layer_kind="bixt", tie_layers=True, num_iterations=1)
    assert tied.layers[0].updates_tokens


@pytest.mark.parametrize("normalize", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["slot", "hybrid"])
def test_concepts_share_every_token_out(kind, normalize):
    """Slot heads against a loop: each token's weights add up to 1 over the concepts, and all of them to N."""
    model = encoder(layer_kind=kind, slot_normalize=normalize, num_key_value_heads=2)
    layer, batch = model.layers[0], pack(words(5, 0, 9))
    tokens = model.read_tokens(batch)
    c = layer.read_norm(model.concepts(tokens.states, batch))
    with torch.no_grad():
        k, v = with_keys_values(layer.read, tokens, is_tied=False).keys_values
        q = layer.read.query(c, angles_of(model, tokens).reading)
        got = layer.read(c, angles_of(model, tokens).reading, k, v, batch).unflatten(-1, (4, 8))
    num_cross = 2 if kind == "hybrid" else 0
    for b, rows in ((0, slice(0, 5)), (2, slice(5, 14))):
        N = rows.stop - rows.start
        for h in range(4):
            scores = q[b, :, h] @ k[rows, h // 2].T / math.sqrt(8)  # [C, N]
            if h < num_cross:
                weights = scores.softmax(1)
            else:
                share = scores.exp() / scores.exp().sum(0)
                assert torch.allclose(share.sum(0), torch.ones(N).double()) and float(share.sum()) == pytest.approx(N)
                weights = share / share.sum(1, keepdim=True) if normalize == "mean" else share / (N / 6)
            assert torch.allclose(got[b, :, h], weights @ v[rows, h // 2], atol=1e-6)
    assert (got[1] == 0).all()
    _, mass = slot_attention(q, k, v, batch.cu_seqlens, batch.max_seqlen, normalize=normalize)
    assert torch.allclose(mass.sum(2), torch.tensor([5.0, 0.0, 9.0]).double()[:, None].expand(3, 4))


def test_hybrid_heads_each_read_in_their_own_way():
    """Moving one concept moves what all others read through heads with competition, and through no other head."""
    model = encoder(layer_kind="hybrid")
    layer, batch = model.layers[0], pack(words(9))
    tokens = model.read_tokens(batch)
    angles = angles_of(model, tokens).reading
    with torch.no_grad():
        k, v = with_keys_values(layer.read, tokens, is_tied=False).keys_values
        c = model.concepts(tokens.states, batch).clone()
        before = layer.read(c, angles, k, v, batch).unflatten(-1, (4, 8))
        c[0, 0] = -c[0, 0]
        moved = (layer.read(c, angles, k, v, batch).unflatten(-1, (4, 8)) - before).abs().amax(-1)[0] > 1e-9  # [C, H]
    assert moved[0].all() and not moved[1:, :2].any() and moved[1:, 2:].all()


def test_the_gated_update_is_a_gru_cell():
    """With biases moved to where torch's cell has them."""
    torch.manual_seed(0)
    update = GatedUpdate(ConceptConfig(**SMALL, layer_kind="slot")).double()
    cell = nn.GRUCell(32, 32).double()
    with torch.no_grad():
        for parameter in update.parameters():
            parameter.normal_(std=0.3)
        from_read, from_concept = update.gates.weight.split(32, dim=1)
        cell.weight_ih.copy_(torch.cat((from_read, update.from_read.weight)))
        cell.weight_hh.copy_(torch.cat((from_concept, update.from_concept.weight)))
        cell.bias_ih.zero_()
        cell.bias_ih[:64] = update.gates.bias
        cell.bias_ih[32:64] += update.keep
        cell.bias_hh.zero_()
        cell.bias_hh[64:] = update.from_concept.bias
        read, c = torch.randn(2, 3, 6, 32).double()
        expected = cell(read.flatten(0, 1), c.flatten(0, 1)).view_as(c)
        assert torch.allclose(update(c, read), expected, atol=1e-12)


def test_a_gate_starts_by_keeping_its_share():
    """z = 1 - 1 / 2L over all updates of a forward pass, whatever was read."""
    for options, L in (({}, 2), ({"tie_layers": True, "num_iterations": 8}, 8)):
        torch.manual_seed(0)
        model = ConceptEncoder(ConceptConfig(**SMALL, layer_kind="slot", **options))
        c = torch.randn(1, 6, 32)
        kept = model.layers[0].update(c, torch.zeros(1, 6, 32))
        assert torch.allclose(kept, (1 - 1 / (2 * L)) * c, atol=1e-6)


def test_a_sandwich_is_bounded_for_any_number_of_iterations():
    norms = {}
    for block_norm in ("pre", "sandwich"):
        model = encoder(torch.float32, tie_layers=True, block_norm=block_norm)
        with torch.no_grad():
            out = model(packed=pack(words(20)), num_iterations=40, output_hidden_states=True)
        norms[block_norm] = float(out.hidden_states[-2].square().mean().sqrt())
    assert norms["sandwich"] < 1.5 < 3 < norms["pre"]


def closed_form(kind: str, last: bool) -> int:
    d, I, H, Hkv, D = 32, 48, 4, 4, 8
    attention = 2 * d * H * D + 2 * d * Hkv * D + 2 * (D + D)  # q and out, k and v; bias and norm of q and k
    think = attention + 3 * d * I + 2 * d  # mix; gate, up, down; two norms
    if kind == "cross":
        return think + d + attention
    if kind == "bixt":
        one_way = d + d + 2 * (d * d + D + D) + 2 * d * d  # two norms; two keys; value of tokens, out of concepts
        return think + one_way + (0 if last else 2 * d * d + d + 3 * d * I)  # value, out; norm and feed-forward
    heads = d + attention - d * d  # without out
    return think + heads + {"gated": (2 * d + 1) * 2 * d + d * d + (d + 1) * d, "residual": d * d}[kind]


@pytest.mark.parametrize("kind", ["cross", "bixt", "gated", "residual"])
def test_parameters_equal_their_closed_form(kind):
    options = dict(layer_kind="slot", slot_update=kind) if kind in ("gated", "residual") else dict(layer_kind=kind)
    around = 60 * 32 + 32 + 6 * 32
    assert encoder(**options).num_parameters() == around + closed_form(kind, False) + closed_form(kind, True)
    tied = encoder(tie_layers=True, num_iterations=5, **options)
    assert tied.num_parameters() == around + closed_form(kind, False)
    sandwiched = encoder(block_norm="sandwich", **options)
    num_closing = {"cross": 6, "bixt": 8}.get(kind, 6)  # one a branch; two more where tokens are updated
    assert sandwiched.num_parameters() - encoder(**options).num_parameters() == num_closing * 32


def effective_rank(rows: torch.Tensor) -> float:
    share = torch.linalg.svdvals(rows.double())
    share = share / share.sum()
    return float(torch.exp(-(share * share.clamp_min(1e-30).log()).sum()))


@every_kind
def test_untrained_concepts_are_distinct_and_carry_the_text(options, capsys):
    torch.manual_seed(0)
    sizes = {**SMALL, "hidden_size": 64, "num_concepts": 32, "intermediate_size": 128, "num_hidden_layers": 4}
    model = ConceptEncoder(ConceptConfig(**{**sizes, **options})).eval()
    z = concepts(model, packed=pack(words(*[96] * 8)))
    raw = [concepts_before.square().mean().sqrt() for concepts_before in layers_of(model)]
    mean_rank, rank = effective_rank(z.mean(0)), sum(map(effective_rank, z)) / 8
    moving = float((z - z.mean(0)).square().mean() / z.square().mean())
    with capsys.disabled():
        print(f"\nuntrained, {options}: effective rank {mean_rank:.1f} of the mean, {rank:.1f} within a text, of 32; "
              f"{moving:.2f} of the energy is the text's; stream {raw[0]:.2f} -> {raw[-1]:.2f}")  # fmt: skip
    assert rank > 24 and moving > 0.2
    assert 0.5 < raw[-1] / raw[0] < 2
    cosine = F.normalize(z, dim=-1) @ F.normalize(z, dim=-1).mT
    assert float((cosine - torch.eye(32)).amax()) < 0.9


def layers_of(model: ConceptEncoder) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(model(packed=pack(words(*[96] * 8)), output_hidden_states=True).hidden_states[:-1])
