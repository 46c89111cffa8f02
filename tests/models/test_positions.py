"""Positions of tokens and concepts: frequencies against their papers, vectors against a loop, models beyond what was
trained."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from conceptron.models.config import ConceptConfig
from conceptron.models.decisions import CHOICES
from conceptron.models.decoder import ConceptDecoder
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.packing import Packed, pack
from conceptron.models.positions import (
    TokenPositions,
    rotary_angles,
    rotary_frequencies,
    rotate,
    sinusoids,
    yarn_temperature,
)  # fmt: skip

SMALL = dict(
    vocab_size=60, hidden_size=32, num_concepts=6, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    num_decoder_layers=1, mask_token_id=3, max_position_embeddings=64,
)  # fmt: skip
D, THETA = 64, 10000.0


def encoder(**options) -> ConceptEncoder:
    torch.manual_seed(0)
    return ConceptEncoder(ConceptConfig(**{**SMALL, **options})).double().eval()


def words(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 60, (n,), generator=generator) for n in lengths]


@torch.no_grad()
def concepts(model: ConceptEncoder, *lengths: int) -> torch.Tensor:
    return model(packed=pack(words(*lengths))).last_hidden_state


# frequencies


def from_the_paper(extension: str, s: float, L: int) -> list[float]:
    frequencies = []
    for i in range(D // 2):
        base = THETA * s ** (D / (D - 2)) if extension == "ntk" else THETA
        f = base ** (-2 * i / D)
        if extension == "linear":
            f = f / s
        elif extension == "yarn":
            wavelength = 2 * math.pi / f
            r = L / wavelength
            g = 0.0 if r < 1 else 1.0 if r > 32 else (r - 1) / 31
            f = (1 - g) * f / s + g * f
        frequencies.append(f)
    return frequencies


@pytest.mark.parametrize("extension", CHOICES["rope_extension"])
@pytest.mark.parametrize("s, L", [(1.0, 512), (4.0, 512), (32.0, 2048)])
def test_frequencies_are_those_of_the_papers(extension, s, L):
    ours = rotary_frequencies(D, THETA, extension, s, L).double().numpy()
    np.testing.assert_allclose(ours, from_the_paper(extension, s, L), rtol=3e-6)
    if s == 1:
        assert torch.equal(rotary_frequencies(D, THETA, extension, s, L), rotary_frequencies(D, THETA))


def of_transformers(kind: str, L: int, seq_len: int | None = None, **parameters) -> tuple[torch.Tensor, float]:
    config = LlamaConfig(
        hidden_size=D, num_attention_heads=1, max_position_embeddings=L,
        rope_parameters=dict(rope_type=kind, rope_theta=THETA, original_max_position_embeddings=L, **parameters),
    )  # fmt: skip
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=seq_len)


@pytest.mark.parametrize("s", [2.0, 16.0])
def test_frequencies_agree_with_transformers_where_conventions_coincide(s):
    """NTK: its dynamic form at s times the length. YaRN: its ramp is linear in i, not in turns, so between 1 and 32
    turns they differ; outside, and in the temperature of queries and keys, they do not."""
    L = 1024
    assert torch.allclose(rotary_frequencies(D, THETA, "linear", s), of_transformers("linear", L, factor=s)[0])
    dynamic, _ = of_transformers("dynamic", L, seq_len=int(s * L), factor=1.0)
    assert torch.allclose(rotary_frequencies(D, THETA, "ntk", s), dynamic, rtol=1e-5)
    theirs, temperature = of_transformers("yarn", L, factor=s, truncate=False)
    ours = rotary_frequencies(D, THETA, "yarn", s, L)
    turns = L * rotary_frequencies(D, THETA) / (2 * math.pi)
    outside = (turns < 1) | (turns > 32)
    assert outside.sum() > 8 and (turns < 1).any() and (turns > 32).any()
    assert torch.allclose(ours[outside], theirs[outside], rtol=1e-5)
    assert yarn_temperature(s) == pytest.approx(temperature**2)


def test_extended_angles_put_a_long_text_where_a_short_one_was():
    """Linear: position s * n turns as n did. NTK: the fastest pair turns as ever, the slowest as under linear."""
    far, near = torch.tensor([400.0]), torch.tensor([100.0])
    for extension in ("linear", "ntk"):
        cos, _ = rotary_angles(far, D, THETA, extension, 4.0)
        assert torch.allclose(cos[..., -1:], rotary_angles(near, D, THETA)[0][..., -1:], atol=1e-5)
    assert torch.allclose(rotary_angles(far, D, THETA, "linear", 4.0)[0], rotary_angles(near, D, THETA)[0], atol=1e-4)
    assert torch.equal(rotary_angles(far, D, THETA, "ntk", 4.0)[0][..., 0], far.cos()[:, None])


def test_temperature_reaches_the_scores_of_tokens_and_no_others():
    config = ConceptConfig(**SMALL, rope_extension="yarn", rope_factor=8.0)
    positions, where = TokenPositions(config, 32), torch.arange(5)
    q, k = torch.randn(2, 5, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = (rotate(q, positions.angles(where)) * rotate(k, positions.angles(where))).sum(-1)
    read = (rotate(q, positions.angles(where)) * rotate(k, positions.read_angles(where))).sum(-1)
    assert torch.allclose(read / plain, torch.full((5, 1), (0.1 * math.log(8) + 1) ** 2, dtype=torch.float64))
    assert torch.allclose(plain, (q * k).sum(-1), atol=1e-6)
    assert torch.equal(positions.concept_angles(where)[0], positions.angles(where)[0])
    assert torch.equal(positions.local_angles(where, 8)[0], rotary_angles(where, 8, THETA)[0])


@pytest.mark.parametrize("extension", CHOICES["rope_extension"])
def test_concepts_depend_on_differences_of_positions_only(extension, monkeypatch):
    """Text and anchors moved by the same distance give the same concepts; text alone does not."""
    factor = 1.0 if extension == "none" else 4.0
    model, (ids,) = encoder(init_queries="orthogonal", rope_extension=extension, rope_factor=factor), words(20)
    here = Packed(ids, torch.arange(20), torch.tensor([0, 20], dtype=torch.int32), 20)
    there, anchors = here._replace(position_ids=here.position_ids + 40), model.anchors(here)
    with torch.no_grad():
        base = model(packed=here).last_hidden_state
        monkeypatch.setattr(model, "anchors", lambda packed, num_concepts=None: anchors + 40)
        assert torch.allclose(model(packed=there).last_hidden_state, base, atol=1e-4)
        assert (model(packed=here).last_hidden_state - base).abs().max() > 1e-2


# vectors


@pytest.mark.parametrize("width", [1, 2, 7, 16, 33])
def test_sinusoids_against_a_loop(width):
    places = torch.tensor([0.0, 1.0, 2.5, 300.0])
    half = math.ceil(width / 2)
    expected = np.zeros((4, width))
    for n, place in enumerate(places.tolist()):
        for j in range(width):
            angle = place * 10000.0 ** (-(j % half) / half)
            expected[n, j] = math.sin(angle) if j < half else math.cos(angle)
    np.testing.assert_allclose(sinusoids(places, width).numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
def test_vectors_enter_where_embeddings_do_and_nothing_turns(kind):
    """At the width of thin tokens, as large as embeddings; text out of order differs by them alone."""
    model = encoder(token_positions=kind, token_dim=16, num_concepts=4)
    seen = []
    model.widen_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    (ids,) = words(64)
    with torch.no_grad():
        model(packed=pack([ids]))
        vectors = seen[0] - model.embed_tokens(ids)
    assert vectors.shape == (64, 16) and model.positions.read_angles(torch.arange(64)) is None
    assert vectors.square().mean().sqrt().item() == pytest.approx(0.02, rel=0.1)
    if kind == "learned":
        assert torch.allclose(vectors, model.positions.table.weight, atol=1e-12)
    assert (model.layers[0].read.query.bias.bias == 0).all()  # no distance for RoPE to read
    assert (model.layers[0].mix.query.bias.bias != 0).any()  # concepts still stand at their anchors
    with torch.no_grad():
        together, alone = concepts(model, 9, 20), [concepts(model, 9, 20)[:1], concepts(model, 9)]
    assert torch.allclose(together[:1], alone[1], atol=1e-12)
    keep = torch.arange(64) != 5
    with torch.no_grad():  # a deleted token is absent, the others keep their vectors
        model(packed=pack([ids]).select(keep))
    assert torch.allclose(seen[-1], seen[0][keep], atol=1e-12)


@pytest.mark.parametrize("kind", CHOICES["token_positions"])
@pytest.mark.parametrize("queries", ["position", "token+position"])
@pytest.mark.parametrize("concept_positions", ["rope", "none"])
def test_target_rows_know_where_they_are_with_every_kind(kind, queries, concept_positions):
    torch.manual_seed(0)
    config = ConceptConfig(**SMALL, token_positions=kind, decoder_queries=queries, concept_positions=concept_positions)
    model = ConceptDecoder(config).double().eval()
    rows = dict(cu_seqlens=torch.tensor([0, 3], dtype=torch.int32), max_seqlen=3, input_ids=torch.tensor([9, 9, 9]))
    anchors = torch.arange(6.0)[None] * (concept_positions == "rope")
    with torch.no_grad():
        out = model(torch.randn(1, 6, 32).double(), anchors, torch.tensor([2, 40, 2]), **rows)
    assert torch.allclose(out[0], out[2], atol=1e-12) and (out[0] - out[1]).abs().max() > 1e-3


def test_a_text_longer_than_the_table_is_refused():
    """By length on the host; a gap that reaches beyond it where the rows are."""
    model, (ids,) = encoder(token_positions="learned", max_position_embeddings=16), words(17)
    with pytest.raises(ValueError, match=r"17 tokens is longer than the max_position_embeddings = 16") as error:
        model(packed=pack([ids]))
    assert "\n" not in str(error.value)
    gap = Packed(ids[:2], torch.tensor([3, 16]), torch.tensor([0, 2], dtype=torch.int32), 2)
    with pytest.raises(RuntimeError, match=r"a position lies beyond the max_position_embeddings = 16"):
        model(packed=gap)
    assert concepts(model, 16, 0).isfinite().all() and concepts(encoder(token_positions="learned")).shape == (0, 6, 32)


@pytest.mark.parametrize("kind", CHOICES["token_positions"])
@pytest.mark.parametrize("concept_positions", CHOICES["concept_positions"])
def test_every_combination_trains_saves_and_loads(kind, concept_positions, tmp_path):
    torch.manual_seed(0)
    config = ConceptConfig(**SMALL, token_positions=kind, concept_positions=concept_positions)
    model = ConceptForMaskedLM(config).train()
    ids, mask = torch.randint(4, 60, (3, 12)), torch.ones(3, 12)
    mask[0, 5:] = mask[1] = 0  # ragged, and one text is empty
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(3):
        loss = model(ids, mask, ids.masked_fill(mask == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = ConceptForMaskedLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(ids, mask).logits, loaded(ids, mask).logits)


def test_learned_positions_compile_in_one_graph_and_still_refuse():
    positions = encoder(token_positions="learned").positions
    compiled = torch.compile(positions, fullgraph=True, backend="eager")
    rows, places = torch.randn(5, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 63])
    assert torch.equal(compiled(rows, places, 9), rows + positions.table.weight[places])
    with pytest.raises(RuntimeError, match="a position lies beyond the max_position_embeddings = 64"):
        compiled(rows, places + 1, 9)


@pytest.mark.parametrize("kind", CHOICES["token_positions"])
def test_parameters_of_positions_equal_their_closed_form(kind):
    rows = 64 if kind == "learned" else 0
    plain = ConceptForMaskedLM(ConceptConfig(**SMALL)).num_parameters()
    thin = dict(token_dim=16, decoder_queries="position")
    plain_thin = ConceptForMaskedLM(ConceptConfig(**SMALL, **thin)).num_parameters()
    both = ConceptForMaskedLM(ConceptConfig(**SMALL, token_positions=kind)).num_parameters()
    assert both == plain + 2 * rows * 32  # encoder and decoder
    thin = ConceptForMaskedLM(ConceptConfig(**SMALL, **thin, token_positions=kind)).num_parameters()
    assert thin == plain_thin + rows * 16 + rows * 32  # text at e, positions asked for at d


# beyond what was trained


@pytest.mark.parametrize("extension", CHOICES["rope_extension"])
def test_sixteen_thousand_tokens_after_a_trained_length_of_64(extension):
    factor = 1.0 if extension == "none" else 256.0
    model = encoder(rope_extension=extension, rope_factor=factor, num_hidden_layers=1).float()
    assert concepts(model, 16384).isfinite().all()
    learned = encoder(token_positions="sinusoidal", num_hidden_layers=1).float()
    assert concepts(learned, 16384).isfinite().all()


def test_cost_is_linear_in_the_length():
    """What is kept for the backward pass, in bytes: no clock, whose answer depends on how busy the machine is."""
    model, kept = encoder(num_hidden_layers=1, rope_extension="yarn", rope_factor=256.0).float(), {}
    for length in (4096, 16384):
        sizes = {}

        def record(x, sizes=sizes):
            sizes[x.data_ptr(), x.numel()] = x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
            model(packed=pack(words(length)))
        kept[length] = sum(sizes.values())
    assert 0.8 < math.log(kept[16384] / kept[4096], 4) < 1.05


@pytest.mark.parametrize(
    "options, words",
    [
        ({"token_positions": "learned", "rope_extension": "ntk"}, ["rope_extension", "none with token_positions"]),
        (
            {"decoder_queries": "weighted", "concept_positions": "none"},
            ["concept_positions", "rope with decoder_queries"],
        ),
        ({"rope_factor": 2.0}, ["rope_factor", "1 with rope_extension = none", "2.0"]),
        (
            {"hidden_size": 8, "num_attention_heads": 4, "rope_extension": "ntk"},
            ["hidden_size", "more than 2 channels a head", "8"],
        ),
    ],
)
def test_positions_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError) as error:
        ConceptConfig(**options)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
