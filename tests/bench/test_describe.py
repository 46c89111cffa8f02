"""What a recipe is said to cost, against what its model really keeps, and as it is printed."""

import json
import math

import numpy as np
import pytest
import torch

from conceptron.bench.describe import (
    activation_bytes,
    aligned,
    by_length,
    by_part,
    encoder_activation_bytes,
    example_views,
    main,
    short,
    special_tokens,
)
from conceptron.bench.memory import saved_by_part
from conceptron.bench.parameters import PARTS
from conceptron.bench.peers import Shape, bert
from conceptron.engine.recipe import load_recipe
from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.heads import ConceptForMaskedLM
from conceptron.models.objectives import OBJECTIVES
from conceptron.models.objectives.view import SampleKey, SpecialTokens
from conceptron.models.packing import pack

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
    with saved_by_part(model, PARTS, {parameter.shape for parameter in model.lm_head.parameters()}) as saved:
        kept = model(view=view)
    del kept
    assert saved == activation_bytes(config, view)
    assert all(saved[part] > 0 for part in ("read", "mix", "feed", "decoder", "head"))


@pytest.mark.parametrize("options", KINDS, ids=named)
def test_no_part_keeps_more_than_the_text_grows(options):
    one, two, four = (activation_bytes(configure(**options), view_of(n)) for n in (256, 512, 1024))
    for part in one:
        assert four[part] - two[part] <= 2 * (two[part] - one[part]) + 64, part  # 64: the targets are drawn
    assert four["other"] < 1024


def test_half_precision_keeps_less():
    config, view = configure(), view_of(256)
    full, half = (sum(activation_bytes(config, view, precision).values()) for precision in ("fp32", "bf16"))
    assert 0.4 * full < half < 0.9 * full


def test_the_peer_keeps_a_line():
    """At least the inputs of its four d x d products and of its two feed-forward products, in float32; no N x N."""
    shape = Shape(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, vocab_size=64, max_tokens=1024)
    one, two, four = (encoder_activation_bytes(lambda: bert(shape), n) for n in (256, 512, 1024))
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)
    least = 2 * 4 * (32 + 3 * 32 + 32 + 32 + 64)  # input, q k v, what was read, the feed-forward's inputs
    assert least <= one / 256 <= 3 * least


def test_against_full_attention():
    rows = by_length(configure(), "fp32", [512, 4096])
    assert rows[1]["full attention FLOP/token"] - rows[0]["full attention FLOP/token"] == 2 * 4 * 32 * (4096 - 512)
    assert rows[1]["FLOP/token"] < rows[0]["FLOP/token"] and rows[1]["FLOP ratio"] > rows[0]["FLOP ratio"]
    kept = encoder_activation_bytes(lambda: ConceptEncoder(configure()), 512)
    assert rows[0]["activation B/token"] == kept / 512


@pytest.mark.parametrize("options", KINDS, ids=named)
def test_the_command_prints_every_kind_on_one_screen(options, tmp_path, capsys):
    overrides = [f"model.{key}={json.dumps(value)}" for key, value in options.items()]
    overrides += ["objective.context=true"] if "decoder_mixing" in options else []
    assert main(["demo.yaml", "batch.micro_tokens=512", *overrides, "--max-tokens", "512", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) <= 30 and max(map(len, printed)) <= 120
    assert f"({options.get('layer_kind', 'cross')})" in printed[0]
    content = json.loads((tmp_path / "parts.json").read_text())
    *parts, total = content["rows"]
    for column in ("parameters", "forward FLOP/token", "training FLOP/token", "activation B/token"):
        assert total[column] == pytest.approx(sum(row[column] for row in parts)) and math.isfinite(total[column])
    assert {"read", "mix", "feed", "decoder", "head"} <= {row["part"] for row in parts}
    assert content["environment"]["torch"] == torch.__version__


def test_recipes_with_several_objectives_or_drawn_iterations(capsys):
    """Of a mixture FLOPs are averaged over its parts, by their weight; a drawn number of iterations is its mean."""
    weighted = [0.75, 0.25]
    sections = ["{name: tsdae, weight: 3}", "{name: prefix_diffusion, weight: 1}"]
    shape = ["size=tiny", "model.num_token_layers=0", "model.decoder_mixing=none", "contrastive=null"]

    def decoder_flops(objective: str) -> float:
        recipe = load_recipe("pretrain/concept.yaml", [*shape, f"objective={objective}"])
        tokens = special_tokens(recipe, None)
        config = recipe.build_config(vocab_size=tokens.vocab_size, mask_token_id=tokens.mask_id)
        rows = by_part(config, example_views(recipe, tokens), 512, "fp32")
        return next(row["forward FLOP/token"] for row in rows if row["part"] == "decoder")

    alone = [decoder_flops(section.replace(", weight: 3", "").replace(", weight: 1", "")) for section in sections]
    mixed = decoder_flops(f"{{name: mixed, parts: [{', '.join(sections)}]}}")
    assert alone[0] > 1.2 * alone[1], "TSDAE asks for every token, the other for a part"
    assert mixed == pytest.approx(sum(share * flops for share, flops in zip(weighted, alone, strict=True)))
    overrides = ["size=tiny", "batch.micro_tokens=128", "batch.tokens=128", "--max-tokens", "512"]
    assert main(["ablation/recursive.yaml", *overrides]) == 0
    assert "3 x 1 tied layer" in capsys.readouterr().out


def test_numbers_are_short_and_columns_aligned():
    assert [short(x) for x in (0, 7, 999.4, 999.6, 25_790_000, 1.5e15)] == ["-", "7", "999", "1 K", "25.8 M", "1.5 P"]
    assert aligned(["a", "bb"], [["long", "1"]]) == "a     bb\nlong   1"
