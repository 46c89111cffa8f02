"""The closed form against torch's own count of the matrix products that really ran."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conceptron.bench.flops import Sizes, forward_flops, step_flops
from conceptron.models.config import ConceptConfig
from conceptron.models.heads import ConceptForMaskedLM
from conceptron.models.objectives import OBJECTIVES
from conceptron.models.objectives.view import SampleKey, SpecialTokens
from conceptron.models.packing import pack


def case(**options):
    config = ConceptConfig(
        vocab_size=512, hidden_size=32, num_concepts=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, num_decoder_layers=2, mask_token_id=1, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    texts = [np.random.default_rng(n).integers(8, 512, n) for n in (64, 64, 64)]
    tokens = SpecialTokens(mask_id=1, special_ids=frozenset(range(8)), vocab_size=512)
    keys = [SampleKey(0, 0, i) for i in range(3)]
    return config, OBJECTIVES["diffusion"](encoder_view="clean").evaluation_views(pack(texts), keys, tokens)["t=0.50"]


def inside_operators(config: ConceptConfig, sizes: Sizes) -> int:
    """FLOPs of one forward pass that torch cannot count: the attention products and the head are opaque operators."""
    B, T, M, C, d = sizes.num_sequences, sizes.num_tokens, sizes.num_targets, config.num_concepts, config.hidden_size
    products = config.iterations * (C * T + B * C * C) + config.num_decoder_layers * C * M  # scores of a head
    return 2 * 2 * products * d + 2 * M * d * config.vocab_size


@pytest.mark.parametrize(
    "options",
    [{}, {"num_key_value_heads": 1}, {"timestep_conditioning": False}, {"tie_layers": True, "num_iterations": 3}],
)
def test_forward_is_what_torch_counts(options):
    config, view = case(**options)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ConceptForMaskedLM(config)(view=view)
    sizes = Sizes.of(view)
    assert counter.get_total_flops() == sum(forward_flops(config, sizes).values()) - inside_operators(config, sizes)


def test_backward_is_twice_the_forward():
    config, view = case()
    with FlopCounterMode(display=False) as counter:
        ConceptForMaskedLM(config)(view=view).loss.backward()
    dense = sum(flops for name, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))
    sizes = Sizes.of(view)
    assert dense == pytest.approx(step_flops(config, sizes) - 3 * inside_operators(config, sizes), rel=0.01)


def test_cost_is_linear_in_the_text():
    config, _ = case()
    one, two, four = (sum(forward_flops(config, Sizes(1, n, n)).values()) for n in (1024, 2048, 4096))
    assert four - two == 2 * (two - one)


@pytest.mark.parametrize(
    "options", [{"layer_kind": "bixt"}, {"num_token_layers": 1}, {"token_dim": 16}, {"decoder_mixing": "local"}]
)
def test_no_count_is_better_than_a_wrong_one(options):
    config, _ = case(**options)
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"flops: not counted for {name} = {value}"):
        forward_flops(config, Sizes(1, 64, 64))
