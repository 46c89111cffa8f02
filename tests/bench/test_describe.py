"""What a recipe is said to cost, against what its model really keeps, and as it is printed."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModel

from conceptron.__main__ import perform
from conceptron.bench.describe import (
    activation_bytes,
    aligned,
    by_length,
    by_part,
    encoder_activation_bytes,
    example_views,
    kept_bytes,
    short,
)  # fmt: skip
from conceptron.bench.measure.peers import Shape, bert
from conceptron.bench.memory import saved_by_part
from conceptron.engine.recipe.load import load_recipe
from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.objectives import OBJECTIVES
from conceptron.models.objectives.view import SampleKey, SpecialTokens
from conceptron.models.packing import pack
from conceptron.models.parts import PARTS

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(path for path in RECIPES.rglob("*.yaml") if "objective" in yaml.safe_load(path.read_text()))
KINDS = [
    {}, {"layer_kind": "bixt", "decoder_mixing": "local", "decoder_window": 8},
    {"layer_kind": "slot", "decoder_mixing": "concepts", "concept_positions": "cope"},
    {"layer_kind": "hybrid", "timestep_conditioning": True}, {"num_token_layers": 2, "token_window": 8, "funnel": [1]},
    {"num_token_layers": 1, "token_mixer": "conv", "tie_layers": True, "num_iterations": 3, "backprop_iterations": 2},
]  # fmt: skip


def named(options):
    return " ".join(f"{key}={value}" for key, value in options.items()) or "default"


def configure(**options):
    return ConceptConfig(
        vocab_size=64, hidden_size=32, num_concepts=8, num_attention_heads=2, intermediate_size=32,
        num_decoder_layers=1, mask_token_id=1, **options,
    )  # fmt: skip


def view_of(*lengths):
    texts = [np.random.default_rng(n).integers(8, 64, n) for n in lengths]
    tokens = SpecialTokens(mask_id=1, special_ids=frozenset(range(8)), vocab_size=64)
    keys = [SampleKey(0, 0, i) for i in range(len(lengths))]
    return OBJECTIVES["diffusion"](encoder_view="clean").evaluation_views(pack(texts), keys, tokens)["t=0.50"]


@pytest.mark.parametrize("options", [{}, {"layer_kind": "slot"}], ids=named)
def test_activations_are_what_a_real_pass_keeps(options, monkeypatch):
    """The same model on real numbers, its fused operators in Triton's interpreter."""
    monkeypatch.setenv("CONCEPTRON_BACKEND", "triton")
    config, view = configure(num_hidden_layers=1, **options), view_of(16, 16)
    model = ConceptForMaskedLM(config).train()
    ignored = {parameter.shape for parameter in model.lm_head.parameters()}
    with saved_by_part(model, PARTS, ignored, num_tokens=view.encoder.num_tokens) as saved:
        kept = model(view=view)
    del kept
    assert saved == activation_bytes(config, view)
    assert all(saved[part] > 0 for part in ("read", "mix", "feed", "decoder", "head"))


@pytest.mark.parametrize("options", KINDS, ids=named)
def test_no_part_keeps_more_than_the_text_grows(options):
    one, four = (activation_bytes(configure(**options), view_of(n)) for n in (256, 1024))
    for part in one:
        assert four[part] <= 4.1 * one[part] + 64, part  # which tokens are targets is drawn
    assert four["other"] < 1024


def test_half_precision_keeps_less():
    config, view = configure(), view_of(2048)
    full, half = (sum(activation_bytes(config, view, precision).values()) for precision in ("fp32", "bf16"))
    assert 0.4 * full < half < 0.9 * full


def test_the_peer_keeps_a_line():
    """At least the inputs of its four d x d products and of its two feed-forward products, in float32; no N x N."""
    shape = Shape(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, vocab_size=64, max_tokens=1024)
    one, two, four = (encoder_activation_bytes(lambda: bert(shape), n) for n in (256, 512, 1024))
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)
    least = 2 * 4 * (32 + 3 * 32 + 32 + 32 + 64)  # input, q k v, what was read, the feed-forward's inputs
    assert least <= one / 256 <= 3 * least


def test_what_is_kept_of_a_token():
    """One state, keys and values in every layer, or the id; None where a layer cannot."""

    def of_a_token(keep):
        return (kept_bytes(configure(), 3072, "fp32", keep) - kept_bytes(configure(), 2048, "fp32", keep)) / 1024

    states, keys, ids = map(of_a_token, (None, "keys", "ids"))
    assert ids == 8 + 8 and states == 4 * 32 + 8 + 8 and keys > 2 * 2 * 4 * 32  # the id, the position, both the batch's
    assert kept_bytes(configure(layer_kind="slot"), 64, "fp32", "ids") is None


def test_against_full_attention():
    rows = by_length(configure(), "fp32", [512, 4096])
    assert rows[1]["full attention FLOP/token"] - rows[0]["full attention FLOP/token"] == 2 * 4 * 32 * (4096 - 512)
    assert rows[1]["FLOP/token"] < rows[0]["FLOP/token"] and rows[1]["FLOP ratio"] > rows[0]["FLOP ratio"]
    kept = encoder_activation_bytes(lambda: ConceptEncoder(configure()), 512)
    assert rows[0]["activation B/token"] == kept / 512


@pytest.mark.parametrize("options", KINDS, ids=named)
def test_the_command_prints_every_kind_on_one_screen(options, tmp_path, capsys):
    overrides = [f"model.{key}={json.dumps(value)}" for key, value in options.items()]
    overrides += ["batch.micro_tokens=512", *["objective.context=true"] * ("decoder_mixing" in options)]
    longest = "0" if options else "512"  # the second table takes a second
    assert perform(["describe", "demo.yaml", *overrides, "--max-tokens", longest, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) <= 30 and max(map(len, printed)) <= 120
    assert f"({options.get('layer_kind', 'cross')})" in printed[0]
    content = json.loads((tmp_path / "parts.json").read_text())
    *parts, total = content["rows"]
    for column in ("parameters", "forward FLOP/token", "training FLOP/token", "activation B/token"):
        assert total[column] == pytest.approx(sum(row[column] for row in parts)) and math.isfinite(total[column])
    assert {"read", "mix", "feed", "decoder", "head"} <= {row["part"] for row in parts}
    assert content["environment"]["torch"] == torch.__version__


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory) -> Path:
    """A module of transformers, as wide as tiny models."""
    folder = tmp_path_factory.mktemp("bert")
    inner = AutoConfig.for_model(
        "bert", vocab_size=64, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=80,
    )  # fmt: skip
    AutoModel.from_config(inner, add_pooling_layer=False).save_pretrained(folder)
    return folder


def on_a_backbone(folder: Path) -> list[str]:
    return [f"model.backbone={folder}", "model.hidden_size=64", "model.num_attention_heads=2", "data.tokenizer=pydocs",
            "model.backbone_window=64"]  # fmt: skip


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_described(path, capsys, bert_folder):
    own = on_a_backbone(bert_folder) if path.stem == "read" else []
    assert perform(["describe", str(path), "size=tiny", "--max-tokens", "0", *own]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{path.stem}-tiny: width 64") and any(line.startswith("sum ") for line in lines)


def test_a_backbone_and_a_teacher_are_described(bert_folder, tmp_path, capsys):
    """A frozen one has no backward pass, stored states cost nothing, and what a teacher speaks of is read."""

    def part(name, *overrides, longest="0"):
        own = [*on_a_backbone(bert_folder), "size=tiny", "--max-tokens", longest, "--out", str(tmp_path)]
        assert perform(["describe", "pretrain/read.yaml", *own[:-4], *overrides, *own[-4:]]) == 0
        rows = {row["part"]: row for row in json.loads((tmp_path / "parts.json").read_text())["rows"]}
        return rows[name]

    frozen = part("backbone", "data.states_gb=null", longest="1024")  # by length, too
    bert_layer = 4 * 64 * 64 + 2 * 64 * 40
    assert frozen["forward FLOP/token"] == frozen["training FLOP/token"] == 3 * (2 * bert_layer + 4 * 64 * 64)
    lengths = json.loads((tmp_path / "lengths.json").read_text())["rows"]
    assert lengths[0]["FLOP/token"] > frozen["forward FLOP/token"]
    trained = part("backbone", "data.states_gb=null", "objective.states=0", "model.backbone_train=last 2")
    assert trained["training FLOP/token"] == pytest.approx(frozen["forward FLOP/token"] * (1 + 2 * 2 / 3))
    assert part("backbone")["forward FLOP/token"] == 0 < part("feed")["forward FLOP/token"]
    assert part("feed", "objective={name: none}")["forward FLOP/token"] == part("feed")["forward FLOP/token"]
    capsys.readouterr()


def test_a_mixture_costs_the_mean_of_its_parts_and_a_contrast_another_reading():
    """A mixture keeps what its largest part does. For a contrast the two halves of every text are read once more: twice
    the concepts, about as many tokens.
    """
    tokens = SpecialTokens(mask_id=1, special_ids=frozenset(range(8)), vocab_size=4096)
    parts = "[{name: tsdae, weight: 3}, {name: prefix_diffusion}]"
    recipes = [
        load_recipe("demo.yaml", ["batch.micro_tokens=512", *overrides]) for overrides in (
            ["objective={name: tsdae}"], ["objective={name: prefix_diffusion}"],
            [f"objective={{name: mixed, parts: {parts}}}"], ["objective={name: tsdae}", "contrastive={}"],
        )
    ]  # fmt: skip
    config = recipes[0].build_config(vocab_size=4096, mask_token_id=1)
    tsdae, prefix, mixed, contrast = (
        by_part(config, example_views(recipe, tokens, config), 512, "fp32") for recipe in recipes
    )
    for a, b, both, more in list(zip(tsdae, prefix, mixed, contrast, strict=True))[:-1]:
        for column in ("forward FLOP/token", "training FLOP/token"):
            assert both[column] == pytest.approx(0.75 * a[column] + 0.25 * b[column])
        assert both["activation B/token"] == max(a["activation B/token"], b["activation B/token"])
        if a["part"] in ("mix", "feed"):  # of concepts only
            assert more["training FLOP/token"] == 3 * a["training FLOP/token"]
        if a["part"] in ("decoder", "head"):
            assert more == a


def test_numbers_are_short_and_columns_aligned():
    assert [short(x) for x in (0, 7, 999.4, 999.6, 25_790_000, 1.5e15)] == ["-", "7", "999", "1 K", "25.8 M", "1.5 P"]
    assert aligned(["a", "bb"], [["long", "1"]]) == "a     bb\nlong   1"
