"""Held-out figures against a plain sum over float64 log-probabilities."""

import math

import numpy as np
import pytest
import torch

from conceptron.engine.data.concepts import Drawn
from conceptron.engine.data.loader import Loader
from conceptron.engine.data.windows import Part, Windows
from conceptron.engine.jobs.evaluation import evaluate
from conceptron.models import geometry
from conceptron.models.objectives import OBJECTIVES


@pytest.fixture
def windows() -> Windows:
    generator = np.random.default_rng(3)
    lengths = np.array([5, 31, 1, 17, 40, 9], dtype=np.int32)
    text = generator.integers(2, 97, size=lengths.sum()).astype(np.uint16)
    return Windows([Part(text, np.cumsum(lengths, dtype=np.int64) - lengths, lengths)])


def log_probabilities(model, view, num_concepts=None) -> torch.Tensor:
    """[M] float64: log-softmax of the logits of every target row."""
    encoded = model.encoder(packed=view.encoder, num_concepts=num_concepts)
    hidden = model.decode(
        encoded, view.decoder_position_ids, view.decoder_cu_seqlens, view.decoder_max_seqlen, view.decoder_input_ids,
        view.timesteps,
    )  # fmt: skip
    if view.target_rows is not None:  # the others are context, of no figure
        assert len(view.target_rows) < len(hidden) or bool((view.timesteps == 1).all())
        hidden = hidden[view.target_rows]
    return model.lm_head(hidden).double().log_softmax(-1).gather(-1, view.targets[:, None]).squeeze(-1)


@torch.no_grad()
@pytest.mark.parametrize(
    "name, options", [
        ("diffusion", {}), ("diffusion", {"encoder_view": "clean"}), ("mlm", {"unchanged": 0.5}),
        ("diffusion", {"context": True}), ("prefix_diffusion", {"context": True}),
    ]
)  # fmt: skip
@pytest.mark.parametrize("micro_tokens", [40, 500])
def test_figures_are_plain_means(build, world, tokens, windows, name, options, micro_tokens):
    engine, objective = build(), OBJECTIVES[name](**options)
    loader = Loader(windows, objective, tokens, seed=0, tokens_per_step=500, micro_tokens=micro_tokens)
    figures = evaluate(engine, loader, 1000, world)
    assert engine.module.training

    model, views = engine.module.eval(), list(loader.evaluation(1000))
    nll = {key: torch.cat([-log_probabilities(model, view[key]) for view in views]) for key in views[0]}
    seen = {key: torch.cat([view[key].seen for view in views]) for key in views[0]}
    assert figures["num_targets"] == sum(len(values) for values in nll.values())
    assert figures["num_unseen"] == sum(int((~mask).sum()) for mask in seen.values())
    for name, kept in (("nll_seen", seen), ("nll_unseen", {key: ~mask for key, mask in seen.items()})):
        means = [float(nll[key][kept[key]].mean()) for key in nll if kept[key].any()]
        assert figures[name] == (pytest.approx(math.fsum(means) / len(means), rel=1e-5) if means else None)
    assert figures["nll_by_t"] == pytest.approx(
        {key: float((values[~seen[key]] if (~seen[key]).any() else values).mean()) for key, values in nll.items()},
        rel=1e-5,
    )
    weighted = [
        sum(float((view[key].weights * -log_probabilities(model, view[key])).sum()) for view in views)
        / sum(float(view[key].divisor) for view in views)
        for key in nll
    ]
    assert figures["loss"] == pytest.approx(math.fsum(weighted) / len(weighted), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["diffusion", "mlm", "tsdae"])
@pytest.mark.parametrize("has_others", [True, False])
def test_another_texts_concepts_cost_no_other_figure(build, world, tokens, windows, name, has_others, monkeypatch):
    """The figure is that of a pass by itself, the others are those without it, and each view is encoded once."""
    model = build().module.eval()
    if not has_others:  # one text has no neighbour
        windows = Windows([Part(windows[4].astype(np.uint16), np.array([0]), np.array([40], dtype=np.int32))])
    loader = Loader(windows, OBJECTIVES[name](), tokens, seed=0, tokens_per_step=500, micro_tokens=500)
    plain = evaluate(model, loader, 1000, world)
    sums = {}
    for views in loader.evaluation(1000):
        for key, view in views.items():
            if view.encoder.num_sequences > 1:
                nll = model(view=view, ablate="shuffle", return_nll=True).nll.double()
                sums[key] = [*sums.get(key, []), *nll.tolist()]
    means = [math.fsum(values) / len(values) for values in sums.values() if values]

    encoded, num_views = [], sum(len(views) for views in loader.evaluation(1000))
    forward = model.encoder.forward
    monkeypatch.setattr(model.encoder, "forward", lambda *given, **named: encoded.append(1) or forward(*given, **named))
    figures = evaluate(model, loader, 1000, world, of_others=True)
    others = figures.pop("nll_of_others")
    assert figures == plain and len(encoded) == num_views
    assert others == (pytest.approx(math.fsum(means) / len(means), rel=1e-6) if has_others else None)
    assert bool(means) == has_others


@torch.no_grad()
@pytest.mark.parametrize("name", ["diffusion", "tsdae"])
def test_at_a_ratio_batches_have_a_concept_for_so_many_tokens(build, world, tokens, windows, name):
    """Each batch by its longest text, and nothing else of it changes; figures are those of the model asked by hand."""
    model = build().module.eval()
    loader = Loader(windows, OBJECTIVES[name](), tokens, seed=0, tokens_per_step=500, micro_tokens=40)
    plain, found = evaluate(model, loader, 1000, world), {}
    for ratio in (8, 16):
        figures = evaluate(model, loader.reading_into(Drawn((ratio,), 5, seed=0)), 1000, world)
        sums = {}
        for views, (batch, _, _) in zip(loader.evaluation(1000), loader._evaluation_batches(1000), strict=True):
            for key, view in views.items():
                C = math.ceil(batch.max_seqlen / ratio)
                nll = -log_probabilities(model, view, min(5, C))[~view.seen]
                sums[key] = [*sums.get(key, []), *nll.tolist()]
        means = [math.fsum(values) / len(values) for values in sums.values() if values]
        assert figures["nll_unseen"] == pytest.approx(math.fsum(means) / len(means), rel=1e-5)
        assert figures["num_targets"] == plain["num_targets"] and "concepts" not in figures
        found[ratio] = figures["nll_unseen"]
    assert len({plain["nll_unseen"], *found.values()}) == 3
    assert evaluate(model, loader, 1000, world) == plain  # the loader itself is as it was


def test_repeating_an_evaluation_repeats_its_figures(build, world, tokens, windows):
    engine = build()  # with dropout, which must be off
    loader = Loader(windows, OBJECTIVES["diffusion"](), tokens, seed=0, tokens_per_step=99, micro_tokens=50)
    assert evaluate(engine, loader, 60, world) == evaluate(engine, loader, 60, world)


@torch.no_grad()
def test_concepts_are_looked_at_in_passing(build, world, tokens, windows):
    """Those of the first view of the grid, whatever the size of the batches; and why they say nothing, if they do."""
    engine, objective = build(), OBJECTIVES["diffusion"]()
    loader = Loader(windows, objective, tokens, seed=0, tokens_per_step=500, micro_tokens=500)
    figures = evaluate(engine, loader, 1000, world)
    (views,) = loader.evaluation(1000)
    z = engine.module.eval().encoder(packed=next(iter(views.values())).encoder).last_hidden_state
    assert figures["concepts"] == pytest.approx(geometry.health(z), rel=1e-4)
    assert figures["concepts"]["num_texts"] == 6 and "collapse" not in figures  # of so few texts nobody can tell
