"""Tied layers: how often, how far gradients go, and how to start them from untied ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.encoder_layers import ConceptAngles
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.objectives import MaskedLM, SampleKey, SpecialTokens
from conceptron.models.packing import pack
from conceptron.models.positions import rotary_angles
from conceptron.models.recursion import draw_iterations
from conceptron.models.start.warm_start import warm_start_tied

SMALL = dict(
    vocab_size=60, hidden_size=32, num_concepts=6, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
    num_decoder_layers=1, mask_token_id=3,
)  # fmt: skip
TOKENS = SpecialTokens(3, frozenset({0, 1, 2, 3}), 60)
KINDS = ("cross", "bixt", "slot", "hybrid")


def encoder(kind=ConceptEncoder, **options):
    torch.manual_seed(0)
    return kind(ConceptConfig(**{**SMALL, **options})).double().eval()


def words(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 60, (n,), generator=generator) for n in lengths]


def view(*lengths: int):
    return MaskedLM().view(pack(words(*lengths)), [SampleKey(0, 0, i) for i in range(len(lengths))], TOKENS)


def spread(tied: ConceptEncoder, untied: ConceptEncoder) -> None:
    """Copies the tied layer into every layer; the last one of "bixt" lacks some of it."""
    state = untied.state_dict()
    for name, value in tied.state_dict().items():
        targets = [name] if not name.startswith("layers.") else [
            name.replace("layers.0", f"layers.{i}") for i in range(len(untied.layers))
        ]  # fmt: skip
        state.update({target: value for target in targets if target in state})
    untied.load_state_dict(state)


@pytest.mark.parametrize("layer_kind", KINDS)
@pytest.mark.parametrize("L", [1, 3])
def test_k_iterations_are_l_layers_of_the_same_weights(layer_kind, L):
    tied = encoder(layer_kind=layer_kind, tie_layers=True, num_hidden_layers=L)
    untied = encoder(layer_kind=layer_kind, num_hidden_layers=L)
    spread(tied, untied)
    if layer_kind in ("slot", "hybrid"):  # the constant of a gate is that of the number of layers, equal on both sides
        assert tied.layers[0].update.keep == untied.layers[0].update.keep
    batch = pack([*words(9), [], *words(14)])
    with torch.no_grad():
        a, b = (model(packed=batch, output_hidden_states=True).hidden_states for model in (tied, untied))
    assert len(a) == len(b) == L + 1
    assert all(torch.allclose(x, y, atol=1e-12) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("layer_kind", KINDS)
def test_k_is_free_at_call_time_and_changes_no_configuration(layer_kind):
    model, batch = encoder(layer_kind=layer_kind, tie_layers=True), pack(words(9, 14))
    before = model.config.to_dict()
    with torch.no_grad():
        states = model(packed=batch, num_iterations=7, output_hidden_states=True).hidden_states
        for K in (1, 3, 6):
            out = model(packed=batch, num_iterations=K)
            assert torch.allclose(out.last_hidden_state, model.out_norm(states[K]), atol=1e-12)
        assert torch.equal(
            model(packed=batch).last_hidden_state, model(packed=batch, num_iterations=3).last_hidden_state
        )
    assert model.config.to_dict() == before and len(states) == 8
    with_default = encoder(layer_kind=layer_kind, tie_layers=True, num_hidden_layers=1, num_iterations=5)
    assert len(with_default(packed=batch, output_hidden_states=True).hidden_states) == 6


def test_iterations_that_cannot_be_are_refused():
    tied, untied, batch = encoder(tie_layers=True), encoder(), pack(words(4))
    with pytest.raises(ValueError, match="num_iterations: expected nothing without tie_layers = true, got 3"):
        untied(packed=batch, num_iterations=3)
    with pytest.raises(ValueError, match="tolerance: expected nothing without tie_layers"):
        untied(packed=batch, tolerance=0.1)
    with pytest.raises(ValueError, match="num_iterations: expected at least 1, got 0"):
        tied(packed=batch, num_iterations=0)
    with pytest.raises(ValueError, match="tolerance: expected nothing in training"):
        tied.train()(packed=batch, tolerance=0.1)


@pytest.mark.parametrize("layer_kind", KINDS)
def test_gradients_stop_where_they_are_told_to(layer_kind):
    """The last b iterations, from a start that is given: no gradient comes through the earlier ones, and learned
    concepts and embeddings get the one of that start."""
    options = dict(layer_kind=layer_kind, tie_layers=True, num_iterations=5)
    model, batch = encoder(backprop_iterations=2, **options), pack([*words(9), [], *words(5)])
    weight = torch.randn(3, 6, 32, dtype=torch.float64)
    out = model(packed=batch, output_hidden_states=True)
    assert [state.requires_grad for state in out.hidden_states] == [True, False, False, True, True, True]
    got = torch.autograd.grad((out.last_hidden_state * weight).sum(), list(model.parameters()))

    everything = encoder(**options)
    everything.load_state_dict(model.state_dict())
    tokens = everything.read_tokens(batch)
    c_0 = everything.concepts(tokens.states, tokens.packed)
    angles = ConceptAngles(*2 * [rotary_angles(everything.anchors(batch), 8, 10000.0)])
    with torch.no_grad():
        c, t = c_0, tokens
        for _ in range(3):
            c, t = everything.layers[0](c, angles, t)
    c = c + c_0 - c_0.detach()
    t_0 = tokens.states
    t = t._replace(states=t.states + t_0 - t_0.detach()) if layer_kind == "bixt" else tokens
    for _ in range(2):
        c, t = everything.layers[0](c, angles, t)
    assert torch.allclose(everything.out_norm(c), out.last_hidden_state, atol=1e-12)
    expected = torch.autograd.grad(
        (everything.out_norm(c) * weight).sum(), list(everything.parameters()), materialize_grads=True
    )
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, expected, strict=True))
    full = torch.autograd.grad(
        (everything(packed=batch).last_hidden_state * weight).sum(), everything.layers[0].feed.down.weight
    )
    index = [name for name, _ in model.named_parameters()].index("layers.0.feed.down.weight")
    assert (full[0] - got[index]).abs().max() > 1e-6  # with all five it is another one
    assert all(float(g.abs().max()) > 0 for g in got)


def test_truncation_is_silent_without_gradients_and_for_few_iterations():
    full, cut, batch = encoder(tie_layers=True), encoder(tie_layers=True, backprop_iterations=2), pack(words(9))
    with torch.no_grad():
        assert torch.equal(full(packed=batch).last_hidden_state, cut(packed=batch).last_hidden_state)
    a, b = (
        torch.autograd.grad(m(packed=batch, num_iterations=2).last_hidden_state[0, 0, 0], list(m.parameters()))
        for m in (full, cut)
    )
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_autocast_keeps_no_copy_of_a_weight_without_its_gradient():
    """The first iterations run without gradients, and cast the weights that the last ones use."""
    model = encoder(tie_layers=True, num_iterations=4, backprop_iterations=1).float().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(packed=pack(words(9))).last_hidden_state.mul(torch.rand(6, 32)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_convergence_and_early_exit():
    model, batch = encoder(tie_layers=True, block_norm="sandwich"), pack([*words(9), [], *words(14)])
    with torch.no_grad():
        out = model(packed=batch, num_iterations=12, output_hidden_states=True, output_convergence=True)
        for k in range(11):  # the last state is normalised
            for b in range(3):
                c, after = (out.hidden_states[i][b].flatten().numpy() for i in (k, k + 1))
                expected = np.linalg.norm(after - c) / np.linalg.norm(c)
                assert float(out.convergence[k, b]) == pytest.approx(expected, rel=1e-5)
        assert out.convergence.shape == (12, 3) and not out.convergence.requires_grad
        worst = out.convergence.amax(1)
        tolerance = float(worst[4]) * 1.001
        stop = int((worst < tolerance).nonzero()[0])
        early = model(packed=batch, num_iterations=12, tolerance=tolerance, output_convergence=True)
        assert early.convergence.shape[0] == stop + 1 < 12
        assert torch.allclose(early.last_hidden_state, model.out_norm(out.hidden_states[stop + 1]), atol=1e-12)
    assert model(packed=batch).convergence is None
    assert encoder()(packed=batch, output_convergence=True).convergence.shape == (3, 3)  # of layers as well


def test_drawn_iterations_have_their_mean_and_bounds():
    config = ConceptConfig(**SMALL, tie_layers=True, num_iterations=6, iteration_sampling="random", max_iterations=100)
    drawn = np.array([draw_iterations(config, (0, step)) for step in range(4000)])
    rate_variance = 25 * (np.exp(0.25) - 1)  # of a log-normal of mean 5 and sigma 1/2; Poisson adds its mean
    assert drawn.min() == 1 and abs(drawn.mean() - 6) < 4 * np.sqrt((rate_variance + 5) / 4000)
    assert drawn.var() == pytest.approx(rate_variance + 5, rel=0.15)
    assert draw_iterations(config, (0, 7)) == draw_iterations(config, (0, 7))
    assert [draw_iterations(config, (1, s)) for s in range(20)] != drawn[:20].tolist()
    cut = replace_config(config, max_iterations=8)
    assert max(draw_iterations(cut, (0, step)) for step in range(200)) == 8
    assert draw_iterations(replace_config(config, iteration_sampling="fixed"), (0, 0)) is None
    assert draw_iterations(replace_config(config, num_iterations=1), (0, 0)) == 1


def replace_config(config: ConceptConfig, **changes) -> ConceptConfig:
    return ConceptConfig(**{**config.to_dict(), **changes})


def test_a_training_step_must_be_told_what_was_drawn():
    model = encoder(ConceptForMaskedLM, tie_layers=True, iteration_sampling="random")
    given, torch_state = view(12, 7), torch.get_rng_state()
    assert torch.equal(model(view=given).loss, model(view=given, num_iterations=3).loss)  # in evaluation the mean
    model.train()
    with pytest.raises(ValueError, match="num_iterations: iteration_sampling is random"):
        model(view=given)
    losses = [float(model(view=given, num_iterations=K).loss.detach()) for K in (1, 3, 9)]
    assert len(set(losses)) == 3 and torch.equal(torch_state, torch.get_rng_state())


@pytest.mark.parametrize("layer_kind", ["cross", "bixt"])
@pytest.mark.parametrize(
    "saved, started",
    [
        (ConceptForMaskedLM, ConceptForMaskedLM),
        (ConceptForMaskedLM, ConceptEncoder),
        (ConceptEncoder, ConceptForMaskedLM),
    ],
)
def test_warm_start_from_an_untied_checkpoint(tmp_path, layer_kind, saved, started):
    source = encoder(saved, layer_kind=layer_kind).float()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    source.save_pretrained(tmp_path, max_shard_size="1GB" if layer_kind == "cross" else "20KB")  # one file, or several
    model = encoder(started, layer_kind=layer_kind, tie_layers=True, num_hidden_layers=1, num_iterations=6).float()
    report = warm_start_tied(model, tmp_path, layer=1)
    from_encoder, to_encoder = (getattr(m, "encoder", m) for m in (source, model))
    values, expected = to_encoder.state_dict(), from_encoder.state_dict()
    for name, value in values.items():
        assert torch.equal(value, expected[name.replace("layers.0.", "layers.1.")]), name
    other = [name for name in report.skipped if "layers.0." in name or "layers.2." in name]
    assert len(other) == sum("layers.0." in n or "layers.2." in n for n in source.state_dict())
    assert all(report.skipped[name] == "of a layer other than 1" for name in other)
    if started is ConceptForMaskedLM and saved is ConceptForMaskedLM:
        assert report.new == () and set(report.skipped) == set(other)
        assert torch.equal(model.decoder.state_dict()["query_norm.weight"], source.decoder.query_norm.weight)
        assert all(".layers.1." in value for value in report.mapped.values()) and len(report.loaded) > 5
    elif started is ConceptForMaskedLM:  # the source has no decoder
        assert report.new and all(name.startswith(("decoder.", "lm_head.")) for name in report.new)
    else:
        assert report.new == () and all(
            name.startswith(("encoder.", "decoder.", "lm_head.")) for name in report.skipped
        )
    assert str(report).splitlines()[0].startswith(f"{len(report.loaded)} loaded, {len(report.mapped)} mapped")


def test_warm_start_that_fills_nothing_is_an_error(tmp_path):
    encoder().float().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no tensor of layer 7 fits the tied layer"):
        warm_start_tied(encoder(tie_layers=True).float(), tmp_path, layer=7)
    with pytest.raises(ValueError, match="no tensor of layer 0 fits"):
        warm_start_tied(encoder(tie_layers=True, hidden_size=64, intermediate_size=32), tmp_path)
    with pytest.raises(ValueError, match="tie_layers = true"):
        warm_start_tied(encoder(), tmp_path)
    with pytest.raises(ValueError, match=r"expected model\.safetensors, which is not there"):
        warm_start_tied(encoder(tie_layers=True), tmp_path / "nowhere")


def test_the_objective_reaches_every_iteration_of_a_whole_model():
    """A tied model with a drawn K and truncation learns what it is shown."""
    torch.manual_seed(0)
    model = ConceptForMaskedLM(ConceptConfig(**{**SMALL, "layer_kind": "bixt"}, tie_layers=True, num_iterations=3,
                               block_norm="sandwich", iteration_sampling="random", backprop_iterations=2,
                               max_iterations=6)).train()  # fmt: skip
    optimizer, given, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), view(*[12] * 8), []
    given = replace(given, divisor=given.weights.sum())
    for step in range(30):
        optimizer.zero_grad()
        loss = model(view=given, num_iterations=draw_iterations(model.config, (0, step))).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.5 and losses[-1] < 1.5
