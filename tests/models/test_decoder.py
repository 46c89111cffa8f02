"""The decoder: rows are independent, conditions start as the identity, positions are relative."""

import math
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from conceptron.models.config import ConceptConfig
from conceptron.models.decoder import ConceptDecoder
from conceptron.models.layers import AdaptiveResidualNorm, Attention, TimestepEmbedding, ZeroLinear
from conceptron.models.positions import rotary_angles

SMALL = dict(
    vocab_size=60, hidden_size=32, num_concepts=6, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
    num_decoder_layers=2, timestep_conditioning=True, mask_token_id=3,
)  # fmt: skip


def decoder(**options) -> ConceptDecoder:
    torch.manual_seed(0)
    return ConceptDecoder(ConceptConfig(**{**SMALL, **options})).double().eval()


def open_gates(model: ConceptDecoder) -> None:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ZeroLinear):
                module.weight.normal_(std=0.2)
                module.bias.normal_(std=0.2)


def inputs(seed: int = 0) -> dict:
    """Three sequences that ask for 4, 0 and 3 rows."""
    generator = torch.Generator().manual_seed(seed)
    return dict(
        concepts=torch.randn(3, 6, 32, dtype=torch.float64, generator=generator),
        anchors=torch.arange(6.0).repeat(3, 1) * 2,
        position_ids=torch.tensor([1, 2, 5, 9, 0, 4, 11]),
        cu_seqlens=torch.tensor([0, 4, 4, 7], dtype=torch.int32),
        max_seqlen=4,
        input_ids=torch.tensor([3, 3, 9, 3, 3, 17, 3]),
        timesteps=torch.tensor([0.2, 0.9, 1.0]),
    )


@torch.no_grad()
def run(model: ConceptDecoder, **changes) -> torch.Tensor:
    return model(**{**inputs(), **changes})


KINDS = [
    dict(decoder_queries=queries, decoder_mixing=mixing)
    for queries in ("token+position", "position", "weighted") for mixing in ("none", "local", "concepts")
    if (queries, mixing) != ("weighted", "local")
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_modulation_is_the_identity_after_the_hooks_of_transformers(kind):
    """The zeros survive post_init, and with them every branch is closed: the result is the norm of the query."""
    model = decoder(**kind)
    zeros = [m for m in model.modules() if isinstance(m, ZeroLinear)]
    none = 4 if kind["decoder_queries"] == "weighted" else 5  # weighted: nobody reads what the first would modulate
    assert len(zeros) == {"none": none, "local": 7, "concepts": 9}[kind["decoder_mixing"]]
    assert all((p == 0).all() for m in zeros for p in m.parameters())
    query = model.query_norm(model.queries(inputs()["position_ids"], inputs()["input_ids"], 4))
    expected = torch.nn.functional.layer_norm(query, (32,), eps=model.config.norm_eps)
    assert torch.allclose(run(model), expected, atol=1e-12)
    open_gates(model)
    assert (run(model) - expected).abs().max() > 0.1


def test_every_sequence_has_its_own_time():
    model = decoder()
    open_gates(model)
    base, other = run(model), run(model, timesteps=torch.tensor([0.2, 0.9, 0.5]))
    assert torch.equal(base[:4], other[:4]) and (base[4:] - other[4:]).abs().min(1).values.max() > 1e-6
    assert torch.equal(
        run(decoder(timestep_conditioning=False)), run(decoder(timestep_conditioning=False), timesteps=None)
    )


def test_gates_open_in_the_first_step_and_then_concepts_are_learned():
    """Closed gates give the concepts no gradient; one step of descent later they have one."""
    model, batch = decoder().train(), inputs()
    concepts = batch["concepts"].requires_grad_()
    target = torch.randn(7, 32, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []
    for _ in range(2):
        optimizer.zero_grad()
        concepts.grad = None
        (model(**batch) - target).square().mean().backward()
        norms.append(float(concepts.grad.norm()))
        optimizer.step()
    assert norms[0] == 0 and norms[1] > 0


@pytest.mark.parametrize("queries", ["position", "token+position", "weighted"])
@pytest.mark.parametrize("timed", [False, True])
def test_a_row_does_not_depend_on_the_other_rows(queries, timed):
    model = decoder(decoder_queries=queries, timestep_conditioning=timed)
    open_gates(model)
    whole, batch = run(model), inputs()
    keep = torch.tensor([0, 3, 5])
    part = run(
        model, position_ids=batch["position_ids"][keep], input_ids=batch["input_ids"][keep],
        cu_seqlens=torch.tensor([0, 2, 2, 3], dtype=torch.int32), max_seqlen=2,
    )  # fmt: skip
    assert torch.allclose(part, whole[keep], atol=1e-12)


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("mixing", ["none", "local", "concepts"])
def test_a_known_token_reaches_a_hidden_one_if_rows_are_mixed_and_only_then(mixing, timed):
    """Row 2 (a word at position 5) changes; rows 0, 1, 3 of its sequence are [MASK], rows 4 to 6 another sequence."""
    model = decoder(decoder_mixing=mixing, timestep_conditioning=timed)
    open_gates(model)
    ids = inputs()["input_ids"].clone()
    ids[2] = 40
    moved = (run(model, input_ids=ids) - run(model)).abs().amax(1)
    assert moved[2] > 1e-3 and (moved[4:] == 0).all()
    assert (moved[[0, 1, 3]] == 0).all() if mixing == "none" else (moved[[0, 1, 3]] > 1e-6).all()


def test_local_mixing_ends_at_its_window():
    """A word at position 5, one layer: a window of 3 reaches positions 2 to 8 and not 1 and 9."""
    model = decoder(decoder_mixing="local", decoder_window=3, num_decoder_layers=1)
    open_gates(model)
    ids = inputs()["input_ids"].clone()
    ids[2] = 40
    moved = (run(model, input_ids=ids) - run(model)).abs().amax(1) > 1e-9
    assert moved.tolist() == [False, True, True, False, False, False, False]


def attend(part: Attention, q_Hx: torch.Tensor, k_Kx: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Written out: q [H, n, D], k [Hkv, m, D], values [m, d] -> [n, d]."""
    group = q_Hx.shape[0] // k_Kx.shape[0]
    v_mKD = part.values(values)
    heads = [
        (q @ k_Kx[h // group].T / math.sqrt(q.shape[1])).softmax(1) @ v_mKD[:, h // group] for h, q in enumerate(q_Hx)
    ]
    return part.out(torch.cat(heads, dim=1))


def heads(projection, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """[H, n, D] as the part makes them."""
    return projection(rows, rotary_angles(where, 8, 10000.0)).transpose(0, 1)


@torch.no_grad()
def test_an_exchange_is_two_readings_written_out():
    model = decoder(decoder_mixing="concepts", timestep_conditioning=False, num_key_value_heads=2)
    part, batch, rows = model.branches[0], inputs(), torch.randn(7, 32, dtype=torch.float64)
    concepts, where, anchors = batch["concepts"], batch["position_ids"], batch["anchors"]
    angles = [rotary_angles(x, 8, 10000.0) for x in (where, anchors)]
    branch, after = part(rows, angles[0], concepts, angles[1], None, batch["cu_seqlens"], 4)
    for b, (start, end) in enumerate(pairwise(batch["cu_seqlens"].tolist())):
        own, at = slice(start, end), anchors[b]
        norm = part.open.norm(concepts[b])
        w = concepts[b]
        if end > start:  # nothing to read leaves the concepts as they are
            keys = heads(part.gather.key, rows[own], where[own])
            w = w + attend(part.gather, heads(part.gather.query, norm, at), keys, rows[own])
        assert torch.allclose(after[b], w, atol=1e-10)
        norm = part.close.norm(w)
        read = attend(part.read, heads(part.read.query, rows[own], where[own]), heads(part.read.key, norm, at), norm)
        assert torch.allclose(branch[own], read, atol=1e-10)


@torch.no_grad()
def test_weights_are_a_function_of_the_distance_alone():
    """s(x) = sum_i A_i cos(theta_i x + phi_i): amplitude and phase of q_i * conj(k_i), read as complex numbers."""
    model = decoder(decoder_queries="weighted", num_key_value_heads=2)
    part, batch, rows = model.branches[0], inputs(), torch.randn(7, 32, dtype=torch.float64)
    for constant in (part.query, part.key):
        constant.weight.normal_()
        constant.bias.bias.normal_()
    concepts, where, anchors = batch["concepts"], batch["position_ids"], batch["anchors"]
    angles = [rotary_angles(x, 8, 10000.0) for x in (where, anchors)]
    got = part(rows, angles[0], concepts, angles[1], batch["cu_seqlens"], 4)
    assert torch.equal(part(rows * 3 + 1, angles[0], concepts, angles[1], batch["cu_seqlens"], 4), got)
    q, k = (constant.norm(constant.bias(constant.weight)) for constant in (part.query, part.key))
    theta = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    for b, (start, end) in enumerate(pairwise(batch["cu_seqlens"].tolist())):
        values = part.values(concepts[b])
        for n in range(start, end):
            x = anchors[b].double() - where[n]
            out = []
            for h in range(4):
                product = torch.complex(q[h, :4], q[h, 4:]).conj() * torch.complex(k[h // 2, :4], k[h // 2, 4:])
                scores = (product.abs() * (theta * x[:, None] + product.angle()).cos()).sum(1) / math.sqrt(8)
                out.append(scores.softmax(0) @ values[:, h // 2])
            assert torch.allclose(got[n], part.out(torch.cat(out)), atol=1e-5)


@pytest.mark.parametrize("mixing", ["none", "local", "concepts"])
def test_positions_that_are_added_serve_every_mixing(mixing):
    """Nothing is turned then; rows that move differ by what was added to them."""
    model = decoder(token_positions="sinusoidal", decoder_mixing=mixing)
    open_gates(model)
    there = inputs()["position_ids"].clone()
    there[3] = 10
    moved = (run(model, position_ids=there) - run(model)).abs().amax(1)
    assert moved[3] > 1e-6 and (moved[4:] == 0).all()


def test_weighted_queries_take_any_length_and_any_number_of_concepts():
    model = decoder(decoder_queries="weighted")
    open_gates(model)
    far = run(model, position_ids=torch.tensor([1, 2, 5, 100_000, 0, 4, 11]))
    assert torch.isfinite(far).all()
    few = inputs()
    out = run(model, concepts=few["concepts"][:, :2], anchors=few["anchors"][:, :2])
    assert torch.isfinite(out).all() and (out - run(model)).abs().max() > 1e-3


def test_token_queries_differ_from_position_queries_by_the_token_alone():
    tokens, positions = (
        decoder(timestep_conditioning=False),
        decoder(decoder_queries="position", timestep_conditioning=False),
    )
    batch = inputs()
    positions.load_state_dict(
        {**{k: v for k, v in tokens.state_dict().items() if "embed_tokens" not in k},
         "query.embedding.weight": tokens.state_dict()["embed_tokens.weight"][3:4]}
    )  # fmt: skip
    same = batch["input_ids"] == 3
    difference = (run(tokens) - run(positions)).abs().amax(1)
    assert (difference[same] < 1e-12).all() and (difference[~same] > 1e-3).all()
    assert torch.equal(run(positions, input_ids=None), run(positions))


def test_places_are_relative():
    """Rows and anchors moved by the same distance give the same result; rows alone do not."""
    model = decoder(timestep_conditioning=False)
    batch = inputs()
    base = run(model)
    both = run(model, position_ids=batch["position_ids"] + 1000, anchors=batch["anchors"] + 1000)
    assert torch.allclose(both, base, atol=1e-3)
    assert (run(model, position_ids=batch["position_ids"] + 3) - base).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_rows_give_no_rows_and_no_gradient(kind):
    for timed in (False, True):
        model, batch = decoder(timestep_conditioning=timed, **kind).train(), inputs()
        empty = torch.zeros(0, dtype=torch.int64)
        batch |= dict(position_ids=empty, input_ids=empty, cu_seqlens=torch.zeros(4, dtype=torch.int32), max_seqlen=0)
        concepts = batch["concepts"].requires_grad_()
        out = model(**batch)
        assert out.shape == (0, 32)
        out.sum().backward()
        assert concepts.grad is None or (concepts.grad == 0).all()


class Written(TorchDispatchMode):
    """How many elements all operators wrote, views and backward pass included."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.num_elements += sum(t.numel() for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor))
        return out


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_cost_is_linear_in_the_rows(kind):
    """One text of M rows: from 2M to 4M twice as much is added as from M to 2M."""
    model, written = decoder(num_decoder_layers=1, **kind).float(), []
    for M in (256, 512, 1024):
        batch = dict(
            concepts=torch.randn(1, 6, 32, requires_grad=True), anchors=torch.arange(6.0)[None] * M / 6,
            position_ids=torch.arange(M), cu_seqlens=torch.tensor([0, M], dtype=torch.int32), max_seqlen=M,
            input_ids=torch.arange(M) % 60, timesteps=torch.tensor([0.5]),
        )  # fmt: skip
        with Written() as counter:
            model(**batch).square().sum().backward()
        written.append(counter.num_elements)
    assert written[2] - written[1] == pytest.approx(2 * (written[1] - written[0]), rel=0.02)


def test_times_look_different():
    model = TimestepEmbedding(ConceptConfig(**SMALL))
    half = model.NUM_FEATURES // 2
    seen = []
    model.up.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model(torch.tensor([0.3, 1.0]), torch.float32)
    assert torch.nn.functional.cosine_similarity(seen[0][0], seen[0][1], dim=0) < 0.5
    assert torch.allclose(seen[0][:, 0], torch.tensor([300.0, 1000.0]).cos(), atol=1e-4) and half == 128


def test_parameters_equal_their_closed_form():
    d, V, I, H, D, L = 32, 60, 48, 4, 8, 2
    attention, feed = 4 * d * H * D + 2 * (D + D), 3 * d * I
    time = 256 * d + d + d * d + d
    modulation = (2 * L) * (3 * d * d + 3 * d) + 2 * d * d + 2 * d  # the first norm closes no branch: no gate
    assert decoder().num_parameters() == V * d + d + L * (attention + feed) + time + modulation
    plain = dict(timestep_conditioning=False, decoder_queries="position")
    read = d + d + L * (attention + feed) + (2 * L + 1) * d
    assert decoder(**plain).num_parameters() == read
    assert decoder(**plain, decoder_mixing="local").num_parameters() == read + L * (attention + d)
    assert decoder(**plain, decoder_mixing="concepts").num_parameters() == read + L * (attention + 2 * d)
    weighted = decoder(**{**plain, "decoder_queries": "weighted"})
    assert weighted.num_parameters() == read - L * (2 * d * H * D - 2 * H * D) - L * d  # no norm that nobody reads


def test_missing_inputs_are_refused():
    with pytest.raises(ValueError, match="timesteps: this decoder has timestep_conditioning"):
        run(decoder(), timesteps=None)
    with pytest.raises(ValueError, match=r"input_ids: this decoder has token\+position queries"):
        run(decoder(), input_ids=None)


def test_the_adaptive_norm_is_its_formula():
    torch.manual_seed(0)
    norm = AdaptiveResidualNorm(ConceptConfig(**SMALL), has_branch=True).double()
    with torch.no_grad():
        norm.modulation.weight.normal_()
        norm.modulation.bias.normal_()
    x, branch, condition = (torch.randn(n, 32, dtype=torch.float64) for n in (5, 5, 2))
    gate, shift, scale = norm.modulation(condition).chunk(3, -1)
    owner = torch.tensor([0, 0, 0, 1, 1])
    h = x + gate[owner] * branch
    y = (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    out = norm(x, branch, condition, torch.tensor([0, 3, 5], dtype=torch.int32))
    assert torch.allclose(out[0], h, atol=1e-12) and torch.allclose(
        out[1], y * (1 + scale[owner]) + shift[owner], atol=1e-9
    )
