"""Fields that are right by themselves and do not fit together: refused when the recipe is read, with the reason."""

import pytest
import yaml

from conceptron.engine.errors import InputError
from conceptron.engine.recipe.load import load_any, load_recipe

BASE = {
    "data": {"source": "pydocs", "window": 64}, "objective": {"name": "mlm"}, "train": {"steps": 100},
    "batch": {"tokens": 1024, "micro_tokens": 512},
}  # fmt: skip
PARTS = "objective={{name: mixed, parts: [{}]}}"


@pytest.fixture
def path(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    return tmp_path / "base.yaml"


def refusal(path, overrides) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("overrides, found", [
    (["objective={name: none}"], "objective.name: none, and no contrastive or distill section: there is nothing"),
    (["objective={name: none}", "contrastive={start: 0.1}"], "contrastive.start: expected 0 with objective none"),
    (["model.timestep_conditioning=true"], "model.timestep_conditioning: objective mlm has no timesteps"),
    (["model.timestep_conditioning=true", PARTS.format("{name: diffusion}, {name: tsdae}")],
     "model.timestep_conditioning: objective tsdae has no timesteps"),
    ([PARTS.format("{name: mlm, hidden: mask}, {name: diffusion}")],
     "objective.parts: some parts have hidden = 'drop' and some 'mask'"),
    ([PARTS.format("{name: tsdae}, {name: mlm, hidden: mask}"), "model.hidden_tokens=drop"],
     "model.hidden_tokens: 'drop' does not fit objective.parts.1.hidden, which is 'mask'"),
    (["data.stream_mb=1"], "data.stream_mb: expected nothing with pydocs, which is small"),
    (["data.source=a", "data.stream_mb=1", "data.dedup=true"], "data.dedup: expected false with data.stream_mb"),
    (["data.source=a", "data.stream_mb=1", "data.on_unreadable=skip"], "data.on_unreadable: expected stop with"),
    (["data.source=a", "data.stream_mb=1", "data.max_documents=9"], "data.max_documents: expected nothing with"),
    (["data.source=a", "data.stream_mb=1", "distill={teacher: t}"], "data.stream_mb: expected nothing with distill"),
    (["data.source=a", "data.stream_mb=1", "objective={name: mlm, masking: pmi}"],
     "data.stream_mb: expected nothing where objective.phrases are to be counted"),
    (["data.source=a", "data.stream_mb=1", "data.states_gb=1"], "data.states_gb: expected nothing"),
    (["data.states_gb=1"], "data.states_gb: expected nothing without a frozen model.backbone"),
    (["objective={name: read_back, states: 1.0}"], "objective.states: expected 0 without a frozen model.backbone"),
    (["model.backbone=b", PARTS.format("{name: read_back, states: 1.0}, {name: tsdae}")],
     "objective.parts.0.states: expected 0 in a mixture"),
    (["distill={teacher: t, similarity: 0, contrast: 0.1}", "batch.micro_tokens=100"],
     "batch.micro_tokens: expected at least 128, two windows of data.window, for distill.contrast"),
    (["train.keep=ids", "model.num_token_layers=1"], "train.keep: expected keys or states, got 'ids'"),
    (["train.keep=states", "model.layer_kind=slot"], "train.keep: expected keys with layer_kind = slot, got 'states'"),
    (["train.keep=all"], "train.keep: expected"),
    (["train.keep=ids", "train.compile=true"], "train.keep: expected keys or nothing with train.compile, got 'ids'"),
    (["train.compile=true", "train.sequence_ranks=2"], "train.compile: expected false with train.sequence_ranks > 1"),
    (["zero.offload=parameters", "zero.stage=2"], "zero.offload: expected optimizer with zero.stage = 2: only stage 3"),
    (["zero.offload=optimizer", "optim.muon={}"], "zero.offload: expected nothing with optim.muon"),
    (["train.on_spike=skip", "optim.muon={}"], "train.on_spike: expected ignore or warn with optim.muon"),
    (["model.share_kv=2", "model.layer_kind=bixt"], "model.share_kv: expected 1 with layer_kind = bixt"),
    ([PARTS.format("{name: mlm}")], "objective.parts: expected at least two sections, got 1"),
    ([PARTS.format("{name: mlm}, {name: mixed, parts: []}")], "objective.parts.1.name: expected one of mlm, diffusion"),
    ([PARTS.format("{name: mlm}, {name: tsdae, weight: 0}")], "objective.parts.1.weight: expected a number in [1e-30"),
    ([PARTS.format("{name: mlm}, {name: tsdae, units: line}")], "objective.parts.1.units: expected one of token, word"),
    ([PARTS.format("{name: mlm, masks: 3}, {name: tsdae}")], "objective.parts.0.masks: unknown key"),
    (["objective={name: prefix_diffusion}", "model.decoder_mixing=local"],
     "objective.context: expected true with model.decoder_mixing = local"),
    (["objective={name: prefix_diffusion, context: true}"],
     "objective.context: expected false with model.decoder_mixing = none"),
    (["objective={name: diffusion, eps: 0}"], "objective.eps: expected a number in [1e-30, 1), got 0 (an integer)"),
    (["objective={name: diffusion, t_floor: 1.5}"], "objective.t_floor: expected a number in [1e-30, 1], got 1.5"),
    (["contrastive.pairs=dropout"], "contrastive.pairs: dropout, but model.dropout is 0"),
    (["contrastive.weigth=1"], "contrastive.weigth: unknown key; did you mean contrastive.weight?"),
    (["contrastive.weight=0"], "contrastive.weight: expected a number in [1e-30, 1e+30], got 0 (an integer)"),
    (["contrastive.temperature=hot"], "contrastive.temperature: expected a number in [1e-30, 1e+30], got 'hot' (text)"),
    (["contrastive={}", "data.window=1024", "batch.micro_tokens=1024"],
     "batch.tokens: expected at least 2048, two windows of data.window, for a contrastive loss; got 1024"),
    (["contrastive={negatives: micro_batch}", "data.window=512"], "batch.micro_tokens: expected at least 1024"),
    (["regularization={terms: [vicreg]}", "data.window=512"],
     "batch.micro_tokens: expected at least 1024, two windows of data.window, for vicreg"),
    (["regularization={dynamic: true}", "data.window=512"], "for regularization.dynamic"),
    (["regularization={terms: [t_regs]}", "model.num_concepts=1"],
     "regularization.terms: concepts of a text are compared with each other, but model.num_concepts is 1"),
    (["regularization={terms: [mst]}"], "regularization.terms: expected one or several of orthogonality"),
    (["regularization={weighting: kendall_gal, weight: 2}"], "regularization.weight: expected at most 1"),
    (["train.stages=[{until: 100, window: 32}]"],
     "train.stages.0.until: expected a step after 0 and before train.steps = 100, got 100"),
    (["train.stages=[{until: 50, window: 16}, {until: 50, window: 32}]"],
     "train.stages.1.until: expected a step after 50"),
    (["train.stages=[{until: 50, window: 64}]"],
     "train.stages.0.window: expected less than 64, data.window, with which the run ends, got 64"),
    (["train.stages=[{until: 20, window: 32}, {until: 50, window: 16}]"],
     "train.stages.0.window: expected less than 16, the window of the next stage, got 32"),
    (["train.tokens_per_concept=[1, 4]", "model.num_concepts=32"],
     "train.tokens_per_concept: 1 asks for 64 concepts of a window of 64 tokens, and model.num_concepts is 32"),
    (["train.tokens_per_concept=[0.5, 4]"], "train.tokens_per_concept.0: expected a number in [1, 1e+30], got 0.5"),
    (["train.tokens_per_concept=[]"], "train.tokens_per_concept: expected a list of at least 1"),
    (["train.tokens_per_concept=[4]", "train.stages=[{until: 50, window: 16, num_concepts: 2}]"],
     "train.stages: expected no num_concepts beside train.tokens_per_concept"),
    (["train.tokens_per_concept=[4]", "distill={teacher: t, stretch: 1}"],
     "train.tokens_per_concept: expected nothing with distill.stretch"),
    (["train.tokens_per_concept=[4]", "contrastive={similarity: slots}"], "train.tokens_per_concept: expected nothing"),
    (["train.tokens_per_concept=[64]", "model.num_concepts=1"], "model.num_concepts: expected at least 2, from which"),
    (["train.stages=[{until: 50, window: 16, num_concepts: 20}]"],
     "train.stages.0.num_concepts: expected at most 16, the window of this stage, got 20"),
    (["train.stages=[{until: 50, window: 16, num_concepts: 9}]", "model.num_concepts=8"],
     "train.stages.0.num_concepts: expected at most 8, model.num_concepts, got 9"),
    (["train.stages=[{until: 9, window: 16, num_concepts: 9}, {until: 50, window: 32, num_concepts: 8}]"],
     "train.stages.0.num_concepts: expected at most the 8 of the next stage, got 9: it can only grow"),
    (["train.stages=[{until: 9, window: 16}, {until: 50, window: 32, num_concepts: 8}]"],
     "train.stages.0.num_concepts: expected at most the 8 of the next stage, got 128: it can only grow"),
    (["train.stages=[{until: 50, window: 16, num_concepts: 6}]", "model.num_concepts=8",
      "distill={teacher: t, stretch: 1, stretches: 4}"],
     "train.stages.0.num_concepts: expected a multiple of distill.stretches = 4, got 6"),
    (["train.stages=[{untill: 20, window: 32}]"], "train.stages.0.untill: unknown key; did you mean"),
    (["model.token_positions=learned", "model.max_position_embeddings=32"],
     "data.window: expected at most model.max_position_embeddings = 32 with learned positions"),
    (["objective={name: mlm, masking: span}", "data.window=8"],
     "objective.masking: span, but 0.3 of a window of 8 tokens is less than the shortest span, 3"),
    (["objective={name: mlm, masking: span}", "train.stages=[{until: 9, window: 8}]"], "a window of 8 tokens"),
    (["model.num_token_layers=4", "model.funnel=[0, 1, 2, 3]", "data.window=8"],
     "model.funnel: 4 halvings leave no two tokens of a window of 8 apart; use fewer"),
    (["model.num_iterations=3"], "model.num_iterations: expected None without tie_layers = true"),
    (["checkpoint.keep_best=retrieval"], "checkpoint.keep_best: expected one of loss, nll_seen, nll_unseen, which"),
    (["checkpoint.keep_best=accuracy", "contrastive={}"], "expected one of contrastive, loss, nll_seen, nll_unseen, "),
    (["checkpoint.keep_best=loss", "eval.every=0"], "checkpoint.keep_best: expected nothing with eval.every = 0"),
    (["checkpoint.asyn=false"], "checkpoint.asyn: unknown key; did you mean checkpoint.async?"),
    (["checkpoint.async_=false"], "checkpoint.async_: unknown key; did you mean checkpoint.async?"),
])  # fmt: skip
def test_refusals(path, overrides, found):
    assert found in refusal(path, overrides)


@pytest.mark.parametrize("overrides", [
    ["objective={name: none}", "contrastive={}"],
    ["contrastive={pairs: dropout}", "model.dropout=0.1"],
    ["contrastive={learnable_temperature: true, negatives: micro_batch}", "regularization={}"],
    [PARTS.format("{name: tsdae}, {name: tsdae, probability: 0.9, weight: 3}, {name: mlm, hidden: mask}")],
    ["objective={name: prefix_diffusion, context: true}", "model.decoder_mixing=local"],
    ["train.stages=[{until: 50, window: 16}, {until: 60, window: 32}]"],
    ["train.stages=[{until: 50, window: 16, num_concepts: 2}, {until: 60, window: 32}]"],
    ["train.tokens_per_concept=[2, 16]", "train.stages=[{until: 50, window: 16}]", "batch.by_length=true"],
    ["data.source=folder", "data.stream_mb=10"],
    ["checkpoint={async: false, keep_best: retrieval}", "contrastive={}", "train.on_spike=rewind"],
    ["regularization={terms: [vicreg, t_regs], gradient_ratio: null}"],
])  # fmt: skip
def test_what_fits_is_accepted_and_reads_back(path, overrides, tmp_path):
    recipe = load_recipe(path, overrides)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(recipe.resolved()))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_sections_become_what_they_say(path):
    recipe = load_recipe(path, [
        "contrastive.weight=0.3", "regularization.terms=[vicreg]", "regularization.gradient_ratio=null",
        "train.stages=[{until: 50, window: 16}]", PARTS.format("{name: tsdae}, {name: tsdae, weight: 3}"),
    ])  # fmt: skip
    assert recipe.build_contrastive().weight == 0.3 and recipe.build_contrastive().negatives == "step"
    assert recipe.build_regularization().gradient_ratio is None
    assert recipe.stages() == [(0, 16), (50, 64)]
    assert recipe.build_objective().names == ("tsdae-0", "tsdae-1")
    assert recipe.build_objective().weights == (1.0, 3.0)
    assert load_recipe(path, ["contrastive={}", "contrastive=null"]).build_contrastive() is None


def test_how_a_step_is_cut_decides_only_where_a_loss_looks_at_a_micro_batch(path):
    for overrides, depends in (
        ([], False), (["contrastive={}"], False), (["contrastive={negatives: micro_batch}"], True),
        (["regularization={}"], True), (["regularization={gradient_ratio: null}"], False),
        (["regularization={terms: [variance], gradient_ratio: null}"], True),
    ):  # fmt: skip
        assert load_recipe(path, overrides).populations(4) == ({"micro-batches of a step": 4} if depends else {})


@pytest.mark.parametrize("override", ["train.stages=[{until: 3, window: 16}]", "train.tokens_per_concept=[4]"])
def test_a_recipe_that_fine_tunes_has_no_lengths_to_grow(override):
    with pytest.raises(InputError, match=r"train\.(stages|tokens_per_concept): expected nothing with a recipe that"):
        load_any("finetune/stsb.yaml", [override])
