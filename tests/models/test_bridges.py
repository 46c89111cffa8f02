"""Which layers of a module stay, and what stands for the others: by rules that look at no label."""

import pytest
import torch
from transformers import AutoConfig

from conceptron.models.backbone import Backbone, keep_layers
from conceptron.models.bridges import choose_layers, fit_bridges, inputs_of, text_means
from conceptron.models.config import ConceptConfig
from conceptron.models.packing import pack

FAMILIES = {
    "bert": {}, "modernbert": dict(local_attention=6, global_attn_every_n_layers=2, pad_token_id=0),
    "llama": dict(num_key_value_heads=2), "qwen3": dict(num_key_value_heads=2, head_dim=8),
}  # fmt: skip


def described(family: str, num_layers: int) -> dict:
    inner = AutoConfig.for_model(
        family, vocab_size=60, hidden_size=24, num_hidden_layers=num_layers, num_attention_heads=4,
        intermediate_size=40, max_position_embeddings=40, **FAMILIES[family],
    )  # fmt: skip
    config = {**inner.to_dict(), "model_type": family}
    return {"config": config, "prefix": [2], "suffix": [3]} if family in ("bert", "modernbert") else {"config": config}


def build(family: str, num_layers: int = 5, **options) -> Backbone:
    torch.manual_seed(0)
    config = ConceptConfig(vocab_size=60, hidden_size=24, num_attention_heads=2, backbone_window=20,
                           backbone=described(family, num_layers), **options)  # fmt: skip
    backbone = Backbone(config).eval()
    with torch.no_grad():
        for name, parameter in backbone.model.named_parameters():
            if parameter.ndim == 2 and ".bridge." not in name:
                parameter.normal_(std=0.3)
    return backbone


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(1)
    return pack([torch.randint(4, 60, (n,), generator=generator) for n in (60, 11, 90, 35, 7, 44, 70, 25)])


def silence(layer: torch.nn.Module) -> None:
    """Makes a layer of Llama write next to nothing."""
    with torch.no_grad():
        layer.self_attn.o_proj.weight.mul_(1e-3)
        layer.mlp.down_proj.weight.mul_(1e-3)


def test_the_layers_that_say_least_go_first(texts):
    whole = build("llama")
    silence(whole.layers[3])
    before = text_means(whole, texts)
    assert choose_layers(whole, 4, texts) == [0, 1, 2, 4]
    silence(whole.layers[1])
    assert choose_layers(whole, 3, texts) == [0, 2, 4]
    assert choose_layers(whole, 2, texts) == [0, 4] and choose_layers(whole, 5, texts) == [0, 1, 2, 3, 4]
    assert choose_layers(whole, 1, texts) == [4] and len(whole.layers) == 5
    assert text_means(whole, texts).shape == before.shape
    for count in (0, 6):
        with pytest.raises(ValueError, match="expected 1 to 5 layers"):
            choose_layers(whole, count, texts)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_look_leaves_the_module_as_it_was(family, texts):
    whole = build(family, 4)
    before, layers = text_means(whole, texts), list(whole.layers)
    types = getattr(whole.model.config, "layer_types", None)
    choose_layers(whole, 2, texts)
    assert torch.equal(text_means(whole, texts), before)
    assert all(a is b for a, b in zip(whole.layers, layers, strict=True))
    assert getattr(whole.model.config, "layer_types", None) == types


@pytest.mark.parametrize("family", FAMILIES)
def test_bridges_do_most_of_what_was_left_out(family, texts):
    """They change nothing before they are fitted; then what comes into a layer is nearer to what it was."""
    numbers = [0, 2, 4] if family == "modernbert" else [0, 3, 4]  # of modernbert's, those that see all of a window
    whole = build(family)
    plain, bridged = (build(family, backbone_layers=numbers, backbone_bridges=b) for b in (False, True))
    for each in (plain, bridged):
        state = {name: value for name, value in whole.model.state_dict().items()}
        kept = keep_layers(build(family).model, numbers).state_dict()
        for name in kept:
            head, dot, rest = name.partition(".layer." if family == "bert" else "layers.")
            if dot:
                place, _, tail = rest.partition(".")
                kept[name] = state[f"{head}{dot}{numbers[int(place)]}.{tail}"]
            else:
                kept[name] = state[name]
        own = {name: value for name, value in each.model.state_dict().items() if ".bridge." in name}
        each.model.load_state_dict(kept | own)
    assert torch.equal(plain(texts), bridged(texts))
    fit_bridges(bridged, whole, numbers, texts)
    places = [i for i, layer in enumerate(bridged.layers) if hasattr(layer, "bridge")]
    assert places == ([1, 2] if family == "modernbert" else [1])
    last = whole.layers[4]
    (expected,) = inputs_of(whole, [last], texts)
    errors = []
    for each in (plain, bridged):
        (found,) = inputs_of(each, [each.layers[-1]], texts)
        found = found + each.layers[-1].bridge(found) if hasattr(each.layers[-1], "bridge") else found
        errors.append(float((found - expected).detach().square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_only_gaps_have_bridges():
    for layers in (None, [0, 1], 2):
        with pytest.raises(ValueError, match="backbone_bridges: expected false where no layer is left out"):
            build("bert", backbone_layers=layers, backbone_bridges=True)
    assert [hasattr(layer, "bridge") for layer in build("bert", backbone_layers=[1, 2, 4], backbone_bridges=True).layers
            ] == [True, False, True]  # fmt: skip
