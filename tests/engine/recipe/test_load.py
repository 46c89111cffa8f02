"""Recipes: what is accepted, what is refused, and in which words."""

from pathlib import Path

import pytest
import yaml

from conceptron.engine.errors import InputError
from conceptron.engine.recipe.load import load_recipe, save_recipe

RECIPES = Path(__file__).parents[3] / "recipes"
# neither tiny.yaml, which is laid over them, nor tables of ablations
SHIPPED = sorted(path for path in RECIPES.rglob("*.yaml") if "objective" in yaml.safe_load(path.read_text()))
SMALLEST = {"data": {"source": "pydocs"}, "objective": {"name": "diffusion"}, "train": {"steps": 10}}


@pytest.fixture
def write(tmp_path):
    def write(tree, name="small.yaml"):
        path = tmp_path / name
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return path

    return write


def refusal(path, *overrides) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_and_name(write):
    recipe = load_recipe(write(SMALLEST))
    assert recipe.run.name == "small" and str(recipe.path) == "runs/small"
    assert recipe.zero.stage == 1 and recipe.optim.betas == (0.9, 0.98)


def test_overrides_are_yaml_and_the_last_one_wins(write):
    overrides = [
        "optim.lr=1e-3",
        "optim.betas=[0.8, 0.9]",
        "train.steps=3",
        "train.steps=4",
        "resume=auto",
        "run.name=7",
    ]
    recipe = load_recipe(write(SMALLEST), [*overrides, "model.num_concepts=9", "objective.t_floor=2e-1"])
    assert recipe.optim.lr == 1e-3  # YAML itself reads 1e-3 as text
    assert recipe.optim.betas == (0.8, 0.9) and recipe.train.steps == 4 and recipe.resume == "auto"
    assert recipe.run.name == "7" and recipe.model == {"num_concepts": 9} and recipe.objective["t_floor"] == 0.2


def test_an_override_may_open_a_section(write):
    assert load_recipe(write(SMALLEST), ["eval.every=3"]).eval.every == 3


@pytest.mark.parametrize(
    "override, found",
    [
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("optimm.lr=1", "optimm: unknown key; did you mean optim?"),
        ("model.hidden=64", "model.hidden: unknown key; did you mean model.hidden_size?"),
        ("objective.weightin=mdlm", "objective.weightin: unknown key; did you mean objective.weighting?"),
        ("data.sorce=x", "data.sorce: unknown key; did you mean data.source?"),
        ("data.source=[{pth: a}]", "data.source.0.pth: unknown key; did you mean data.source.0.path?"),
        ("objective.name=difusion", "objective.name: expected one of mlm, diffusion, tsdae, prefix_diffusion,"),
        ("objective.name=difusion", "(did you mean diffusion?)"),
        ("train.steps=many", "train.steps: expected a whole number from 1, got 'many' (text)"),
        ("train.steps=true", "train.steps: expected a whole number from 1, got True (true or false)"),
        ("train.steps=0", "train.steps: expected a whole number from 1, got 0 (an integer)"),
        ("train=5", "train: expected a section, got 5 (an integer)"),
        ("optim.lr=-1", "optim.lr: expected a number in [1e-30, 1e+30], got -1 (an integer)"),
        ("optim.lr=fast", "optim.lr: expected a number in [1e-30, 1e+30], got 'fast' (text)"),
        ("zero.stage=0", "zero.stage: expected a whole number from 1 to 3, got 0"),
        ("model.num_concepts=two", "model.num_concepts: expected a whole number from 1, got 'two'"),
        ("model.vocab_size=9", "model.vocab_size: comes from the tokenizer; remove this line"),
        ("objective.weighting=heavy", "objective.weighting: expected one of mdlm, selfnorm, none"),
        ("run.name=a/b", "run.name: expected a name of up to 100 letters, digits and ._+-, got 'a/b' (text)"),
    ],
)
def test_refusals_name_override_field_and_remedy(write, override, found):
    message = refusal(write(SMALLEST), override)
    assert found in message
    assert message.startswith(f"override '{override}': ")


def test_a_fault_in_the_file_names_the_file(write):
    path = write({**SMALLEST, "optim": {"lr": "fast", "wight_decay": 0.1}})
    message = refusal(path)
    assert message.startswith(f"{path}: optim.wight_decay: unknown key; did you mean optim.weight_decay?")
    assert message.endswith("(and 1 more)")


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3", "train.steps.more=3", "optim.lr={"])
def test_malformed_overrides(write, override):
    assert repr(override) in refusal(write(SMALLEST), override)


def test_missing_sections(write):
    assert "train: is missing" in refusal(write({key: SMALLEST[key] for key in ("data", "objective")}))
    assert "objective.name: is missing" in refusal(write({**SMALLEST, "objective": {}}))


@pytest.mark.parametrize(
    "text, found",
    [
        ("run: [", "while parsing"),
        ("- a\n- b\n", "expected sections"),
        ("", "expected sections"),
        ("model: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_files_that_are_no_recipe(write, text, found):
    path = write(text)
    message = refusal(path)
    assert message.startswith(str(path)) and found in message


def test_files_that_cannot_be_read(tmp_path):
    assert "no such recipe" in refusal(tmp_path / "absent.yaml")
    assert "got a folder" in refusal(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: caf\xe9}\n")
    assert "expected UTF-8 text, got byte 0xe9 at 15" in refusal(tmp_path / "latin.yaml")


def test_fields_that_do_not_fit_together(write):
    found = refusal(write(SMALLEST), "model.hidden_size=50", "model.num_attention_heads=8")
    assert "model.hidden_size: expected a multiple of num_attention_heads = 8, got 50" in found
    with pytest.raises(InputError, match=r"^model: mask_token_id: expected an id below vocab_size = 100"):
        load_recipe(write(SMALLEST)).build_config(vocab_size=100, mask_token_id=100)


@pytest.mark.parametrize(
    "overrides, found",
    [
        (["model.decoder_mixing=local"], "expected true with model.decoder_mixing = local: what is known must"),
        (["objective.context=true"], "expected false with model.decoder_mixing = none: no row would see it"),
    ],
)
def test_a_decoder_that_mixes_rows_and_context_belong_together(write, overrides, found):
    assert f"objective.context: {found}" in refusal(write(SMALLEST), *overrides)
    both = ["model.decoder_mixing=concepts", "objective.context=true"]
    assert load_recipe(write(SMALLEST), both).build_config(vocab_size=100).decoder_mixing == "concepts"
    apart = {**SMALLEST, "objective": {"name": "tsdae"}, "model": {"decoder_mixing": "local"}}  # which asks every row
    assert load_recipe(write(apart)).build_config(vocab_size=100).decoder_mixing == "local"


def test_saved_recipe_reads_back(write, tmp_path):
    recipe = load_recipe(write(SMALLEST), ["model.norm_eps=1e-5", "optim.betas=[0.5,0.6]", "data.window=64"])
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert recipe.model["norm_eps"] == 1e-5


def test_trajectory_holds_what_decides_the_losses(write):
    path = write(SMALLEST)
    base = load_recipe(path).trajectory()
    for free in (
        "run.folder=x", "zero.stage=3", "batch.micro_tokens=128", "eval.every=1", "checkpoint.keep_last=9",
        "checkpoint.async=false", "train.on_spike=rewind", "train.spike_window=9", "data.on_unreadable=skip",
    ):  # fmt: skip
        assert load_recipe(path, [free, "run.name=other", "resume=auto"]).trajectory() == base
    for fixed in (
        "run.seed=1",
        "optim.lr=1",
        "batch.tokens=128",
        "data.window=64",
        "model.dropout=0.1",
        "train.steps=9",
    ):
        assert load_recipe(path, [fixed]).trajectory() != base


@pytest.mark.parametrize(
    "name, overrides",
    [
        *(("dimension_inversion", [f"model.token_dim={size}"]) for size in (512, 128, 32)),
        ("dimension_inversion", ["model.hidden_size=1024", "model.num_attention_heads=16"]),
        *(("positions", [f"model.concept_positions={kind}"]) for kind in ("learned", "sinusoidal", "none", "rope")),
        *(("positions", [f"model.token_positions={kind}"]) for kind in ("learned", "sinusoidal")),
    ],
)
def test_the_grids_in_the_heads_of_recipes(name, overrides):
    path = RECIPES / "ablation" / f"{name}.yaml"
    head = path.read_text().partition("\nmodel:")[0]
    for override in overrides:
        field, value = override.split("=")
        assert field in head and value in head
    assert load_recipe(path, overrides).build_config(vocab_size=5000)


def test_size_tiny_keeps_what_the_recipe_is_about(write):
    tree = {
        **SMALLEST, "model": {"hidden_size": 512, "layer_kind": "slot"}, "train": {"steps": 9, "label_smoothing": 0.1},
        "data": {"source": "/some/text", "text_column": "body"}, "tiny": {"model": {"num_concepts": 5}},
    }  # fmt: skip
    recipe = load_recipe(write(tree), ["train.steps=7", "size=tiny"])
    assert recipe.run.name == "small-tiny" and recipe.train.steps == 7 and recipe.train.label_smoothing == 0.1
    assert recipe.model["hidden_size"] == 64 and recipe.model["layer_kind"] == "slot"
    assert recipe.model["num_concepts"] == 5 and recipe.data.source[0].path == "pydocs-small"
    full = load_recipe(write(tree))
    assert full.run.name == "small" and full.model == {"hidden_size": 512, "layer_kind": "slot"}
    assert load_recipe(write({**tree, "size": "tiny"}), ["train.steps=7"]) == recipe
    assert "size: expected one of full, tiny, got 'small' (text)" in refusal(write(tree), "size=small")
    assert "tiny: expected a section" in refusal(write({**tree, "tiny": 3}), "size=tiny")


@pytest.mark.parametrize("size", ["full", "tiny"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path, size):
    recipe = load_recipe(path, [f"size={size}"])
    if not recipe.needs_phrases:
        recipe.build_objective()
    described = {"backbone": None} if "backbone" in recipe.model else {}  # a folder there, which this machine may lack
    recipe.build_config(vocab_size=5000, mask_token_id=4, **described)
    assert recipe.data.window <= recipe.batch.micro_tokens <= recipe.batch.tokens
    assert recipe.optim.warmup_steps < recipe.train.steps
