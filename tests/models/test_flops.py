"""The closed forms against torch's own count of the matrix products that really ran, and of the weights there are."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import conceptron.kernels.linear_cross_entropy.op  # noqa: F401  registers the operator that is counted below
from conceptron.bench.measure.parameters import parameters
from conceptron.bench.measure.peers import Shape, bert
from conceptron.models.config import ConceptConfig
from conceptron.models.flops import Sizes, forward_flops, full_attention_flops, step_flops, training_flops
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.objectives import OBJECTIVES
from conceptron.models.objectives.view import SampleKey, SpecialTokens
from conceptron.models.packing import pack
from conceptron.models.parts import PARTS, part_of

BERT = {"prefix": [2], "suffix": [3], "config": {
    "model_type": "bert", "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 40, "max_position_embeddings": 66, "_attn_implementation": "eager",
}}  # fmt: skip
KINDS = [
    {}, {"num_key_value_heads": 1}, {"timestep_conditioning": True}, {"token_dim": 16},
    {"layer_kind": "bixt"}, {"layer_kind": "bixt", "block_norm": "sandwich"},
    {"layer_kind": "slot"}, {"layer_kind": "slot", "slot_update": "residual"},
    {"layer_kind": "hybrid", "num_key_value_heads": 2, "block_norm": "sandwich"},
    {"tie_layers": True, "num_iterations": 5}, {"tie_layers": True, "num_iterations": 3, "layer_kind": "bixt"},
    {"num_token_layers": 2, "token_window": 16}, {"num_token_layers": 1, "token_mixer": "conv", "token_dim": 16},
    {"num_token_layers": 3, "token_window": 16, "funnel": [1, 2], "token_dim": 16},
    {"decoder_queries": "position", "token_dim": 16}, {"tie_word_embeddings": False},
    {"token_positions": "learned", "concept_positions": "learned"}, {"init_queries": "anchor"},
    {"concept_positions": "cope", "num_key_value_heads": 1}, {"condition_dropout": 0.1},
    {"decoder_queries": "weighted", "timestep_conditioning": True, "num_key_value_heads": 1},
    {"decoder_queries": "weighted"}, {"decoder_queries": "weighted", "decoder_mixing": "concepts"},
    {"decoder_mixing": "local", "decoder_window": 8, "timestep_conditioning": True},
    {"decoder_mixing": "concepts", "timestep_conditioning": True}, {"decoder_mixing": "concepts"},
    {"backbone": BERT, "backbone_window": 64}, {"backbone": BERT, "backbone_window": 34, "init_queries": "state"},
]  # fmt: skip
TOKENS = SpecialTokens(mask_id=1, special_ids=frozenset(range(8)), vocab_size=512)


def named(options):
    return " ".join(f"{key}={value}" for key, value in options.items()) or "default"


def configure(**options):
    fields = {"num_attention_heads": 2, "num_hidden_layers": 2, **options}
    return ConceptConfig(
        vocab_size=512, hidden_size=32, num_concepts=16, intermediate_size=48, num_decoder_layers=2, mask_token_id=1,
        **fields,
    )  # fmt: skip


def case(**options):
    torch.manual_seed(0)
    texts = [np.random.default_rng(n).integers(8, 512, n) for n in (64, 64, 64)]
    keys = [SampleKey(0, 0, i) for i in range(3)]
    objective = OBJECTIVES["diffusion"](encoder_view="clean")
    return configure(**options), objective.evaluation_views(pack(texts), keys, TOKENS)["t=0.50"]


def attention_flops(q, k, v, *rest, out_val=None, **options):
    (B, H, rows, D), keys = q, k[2]
    return 2 * 2 * B * H * rows * keys * D


def head_flops(hidden, weight, *rest, out_val=None, **options):
    return 2 * hidden[0] * weight[0] * weight[1]


def counted(model, view):
    """FLOPs by part, of the operators that ran; torch knows all but these two."""
    formulas = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        torch.ops.conceptron.linear_cross_entropy: head_flops,
    }
    found, inside = dict.fromkeys(PARTS, 0), []
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, torch.no_grad():

        def enter(*_):
            inside.append(counter.get_total_flops())

        def leave(part):
            before = inside.pop()
            if not inside:  # the outermost module of its part
                found[part] += counter.get_total_flops() - before

        for name, module in model.named_modules():
            if part := part_of(name):
                module.register_forward_pre_hook(enter)
                module.register_forward_hook(lambda *_, part=part: leave(part))
        model(view=view)
    assert sum(found.values()) == counter.get_total_flops()
    return found


@pytest.mark.parametrize("options", KINDS, ids=named)
def test_forward_is_what_torch_counts_in_every_part(options):
    config, view = case(**options)
    expected = forward_flops(config, Sizes.of(view))
    found = counted(ConceptForMaskedLM(config).eval(), view)
    if config.layer_kind in ("slot", "hybrid"):  # the torch backend has a column of ones beside the values
        scores = view.encoder.num_tokens * 16 * (2 if config.layer_kind == "slot" else 1)
        found["read"] -= config.iterations * 2 * scores
    assert {part: flops for part, flops in found.items() if flops or part in expected} == expected


@pytest.mark.parametrize("options", KINDS, ids=named)
def test_parameters_are_those_of_the_model(options):
    config = configure(**options)
    with torch.device("meta"):
        model = ConceptForMaskedLM(config)
    model.tie_weights()
    found = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        found[part_of(name)] += parameter.numel()
    assert found == parameters(config)


def test_parameters_by_hand():
    """One cross layer: two attentions of 4 d^2 with the vectors of their heads and a norm, a feed-forward of 3 d I."""
    config = ConceptConfig(vocab_size=1000, num_hidden_layers=1, num_decoder_layers=1)  # d 512, C 128, I 1024
    found = parameters(config)
    assert found["read"] == 4 * 512**2 + 4 * 64 + 512 and found["mix"] == found["read"]
    assert found["feed"] == 3 * 512 * 1024 + 512 and found["embedding"] == 1000 * 512 + 512
    assert found["concepts"] == 128 * 512 and found["head"] == 1000


def test_backward_is_twice_the_forward():
    """Of what torch counts by itself: not attention, nor the head, whose gradients are made in its forward pass."""
    config, view = case()
    model, dense = ConceptForMaskedLM(config), []
    model.encoder.keep = "keys"  # nothing is made again, which would not be useful work
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            loss = model(view=view).loss
            if backward:
                loss.backward()
        operators = counter.get_flop_counts()["Global"]
        dense.append(sum(flops for name, flops in operators.items() if "attention" not in str(name)))
    assert dense[1] == pytest.approx(3 * dense[0], rel=0.01)
    sizes = Sizes.of(view)
    assert step_flops(config, sizes) == 3 * sum(forward_flops(config, sizes).values())


def test_frozen_iterations_have_no_backward():
    sizes = Sizes(3, 192, 90, 100, 64, 40)
    deep = configure(tie_layers=True, num_iterations=5, backprop_iterations=2)
    forward = forward_flops(deep, sizes)
    shallow = forward_flops(configure(tie_layers=True, num_iterations=2), sizes)
    assert training_flops(deep, sizes) == {part: forward[part] + 2 * shallow[part] for part in forward}


@pytest.mark.parametrize("options", KINDS, ids=named)
def test_no_part_grows_faster_than_the_text(options):
    config = configure(**options)
    one, two, four = (forward_flops(config, Sizes.of_text(n)) for n in (1024, 2048, 4096))
    for part in one:
        rounding = 0.02 if part == "backbone" else 0  # windows of a text are of one length
        assert four[part] - two[part] == pytest.approx(2 * (two[part] - one[part]), rel=rounding, abs=0), part


def test_the_peer_is_counted_as_it_runs():
    shape = Shape(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, vocab_size=64, max_tokens=100)
    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, torch.no_grad():
        bert(shape).eval()(torch.zeros(1, 100, dtype=torch.int64))
    assert counter.get_total_flops() == full_attention_flops(32, 2, 48, 100)
