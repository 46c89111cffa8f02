"""First weights from another model of this package, or a hub id that cannot be had."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaModel

from conceptron.engine.data import tokenizer
from conceptron.engine.errors import InputError
from conceptron.engine.trainer import train

# so little is learnt that the first weights are still there after the run
STILL = ["train.steps=2", "optim.lr=1e-9", "optim.weight_decay=0", "eval.every=0", "checkpoint.every=0"]


@pytest.fixture(scope="session")
def llama(text, tmp_path_factory) -> Path:
    """A grouped-head model of three layers with the tokenizer of the text, but for its mask token."""
    folder = tmp_path_factory.mktemp("llama")
    words = tokenizer.load(f"{text}/tokenizer")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def untied(recipe_in, tmp_path_factory) -> Path:
    """The model of a run with two layers."""
    recipe = recipe_in(tmp_path_factory.mktemp("untied"))
    return train(recipe, ["train.steps=3", "eval.every=0", "model.num_hidden_layers=2"]) / "model"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_a_tied_layer_starts_from_one_that_is_not(recipe, untied):
    tied = [*STILL, "model.tie_layers=true", "model.num_iterations=3", f"init.source={untied}", "init.layer=1"]
    folder = train(recipe, tied)
    ours, theirs = weights(folder), load_file(untied / "model.safetensors")
    layer = {name for name in theirs if name.startswith("encoder.layers.1.")}
    assert layer
    for name in layer:
        tied_name = name.replace("layers.1.", "layers.0.")
        torch.testing.assert_close(ours[tied_name], theirs[name], rtol=0, atol=1e-6)
    assert "skipped, of a layer other than 1" in (folder / "initialization.txt").read_text()


def test_a_model_of_this_package_goes_on_with_another_objective(recipe, untied):
    more = ["model.num_hidden_layers=2", "model.num_concepts=8", "objective={name: tsdae}"]
    folder = train(recipe, [*STILL, *more, f"init.source={untied}"])
    ours, theirs = weights(folder), load_file(untied / "model.safetensors")
    same = [name for name in theirs if ours[name].shape == theirs[name].shape]
    assert len(same) == len(theirs) - 1  # the concepts, of which there are more now
    for name in same:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
    assert (folder / "initialization.txt").read_text().startswith(
        f"from {untied}: weights: {len(theirs)} loaded, 0 new"
    )


@pytest.mark.parametrize("overrides, found", [
    (["init.source=/nowhere"], "init.source: /nowhere: no such folder here; give a folder"),
    (["init.source={untied}", "init.layer=1"], "init.layer: expected nothing unless model.tie_layers is true"),
    (["init.source={untied}", "init.layers=1"], "init.layers: unknown key; did you mean init.layer?"),
    (["init.source={untied}", "model.hidden_size=36", "model.num_hidden_layers=2"], "init.source: "),
    (["init.source={llama}"], "got one of type llama; model.backbone takes pretrained models of transformers"),
    (["init.surce=x"], "init.surce: unknown key; did you mean init.source?"),
    (["init.layer=3"], "init.source: is missing"),
])  # fmt: skip
def test_what_cannot_be_a_beginning(recipe, untied, llama, overrides, found):
    with pytest.raises(InputError) as caught:
        train(recipe, [text.format(untied=untied, llama=llama) for text in overrides])
    assert found in str(caught.value) and "\n" not in str(caught.value)
    assert not (recipe.parent / "runs").exists()
