"""`conceptron build`: the model of a recipe as it starts."""

import argparse
import json
import shutil

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from conceptron.engine.build import main
from conceptron.engine.data import tokenizer
from conceptron.engine.errors import InputError
from conceptron.engine.jobs.pretraining import PretrainingJob
from conceptron.engine.recipe.load import load_recipe
from conceptron.models.masked_lm import ConceptForMaskedLM

STATES = ["model.backbone_window=16", "model.init_queries=state"]


def run(recipe, out, *overrides: str) -> int:
    return main(argparse.Namespace(recipe=str(recipe), overrides=list(overrides), out=out))


def test_it_is_what_a_run_starts_with(recipe, bert, world, tmp_path, capsys):
    overrides = [*STATES, f"model.backbone={bert}"]
    assert run(recipe, tmp_path / "model", *overrides) == 0
    assert "nothing trained" in capsys.readouterr().out and not (tmp_path / "runs").exists()
    loaded = load_recipe(recipe, overrides)
    job = PretrainingJob(loaded, world)
    torch.manual_seed(loaded.run.seed)
    start = job.build(is_new=True).model.state_dict()
    found = ConceptForMaskedLM.from_pretrained(tmp_path / "model").state_dict()
    assert set(found) == set(start) and all(torch.equal(found[name], start[name]) for name in start)


def test_the_mean_of_the_concepts_is_the_backbone_s_pooling(built, bert):
    """By transformers alone, on both sides."""
    words, model, theirs = (AutoTokenizer.from_pretrained(built), AutoModel.from_pretrained(built).eval(),
                            AutoModel.from_pretrained(bert).eval())  # fmt: skip
    ids = words("the encoder reads the text", return_tensors="pt")["input_ids"]
    assert ids.shape[1] <= 16, "one window"
    with torch.no_grad():
        states = theirs(input_ids=ids).last_hidden_state[0]
        assert torch.allclose(model(input_ids=ids).pooler_output[0], states.mean(0), atol=1e-5)


def test_the_card_says_that_nothing_is_trained(built, bert):
    card = (built / "README.md").read_text()
    assert "nothing is trained" in card and f"backbone: {bert.name}" in card and "trained on texts" not in card
    assert "held-out" not in card.lower()


def test_another_model_may_be_written_again_but_nothing_else_is(recipe, tmp_path):
    out = tmp_path / "model"
    assert run(recipe, out) == run(recipe, out) == 0
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="in use already"):
        run(recipe, tmp_path / "notes")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"


def test_a_backbone_that_does_not_average_is_noted(recipe, save_teacher, tmp_path, capsys):
    for pooling, is_noted in (("mean_tokens", False), ("cls_token", True), ("max_tokens", True)):
        place = save_teacher(tmp_path / pooling, 30, pooling)
        assert run(recipe, tmp_path / "model", *STATES, f"model.backbone={place}") == 0
        assert ("and concepts start as means of its states" in capsys.readouterr().out) == is_noted


def without_safetensors(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_code(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "code.Model"}}))


def of_unknown_family(folder):
    (folder / "model.safetensors").unlink()
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=12, n_layer=1, n_head=2)).save_pretrained(folder)


def with_other_words(folder):
    tokenizer.save(tokenizer.train(["nothing is shared with anything here"] * 3, 290), folder)


def with_a_code_file_named(folder):
    with_code(folder)
    (folder / "code.py").write_text("raise SystemExit('it was run')")


@pytest.mark.parametrize("spoil, overrides, found", [
    (without_safetensors, [], "expected model.safetensors, which is not there"),
    (with_code, [], "asks for code of its own (auto_map), which is never run here"),
    (with_a_code_file_named, [], "asks for code of its own (auto_map), which is never run here"),
    (of_unknown_family, [], "expected a model of type bert, "),
    (with_other_words, [], "set data.tokenizer to "),
    (None, ["model.backbone_window=33"], "backbone_window: expected 1 to 32, for which the backbone has positions"),
])  # fmt: skip
def test_what_cannot_be_a_backbone_is_one_line(recipe, bert, tmp_path, spoil, overrides, found):
    own = tmp_path / "own"
    shutil.copytree(bert, own)
    if spoil:
        spoil(own)
    with pytest.raises(InputError) as caught:
        run(recipe, tmp_path / "model", *STATES, f"model.backbone={own}", *overrides)
    assert found in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()
