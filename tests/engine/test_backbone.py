"""`model.backbone` in a recipe: found, checked, filled, resumed, exported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaModel

from conceptron.engine.data import tokenizer
from conceptron.engine.errors import InputError
from conceptron.engine.trainer import train
from conceptron.models.backbone import Backbone
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.packing import pack

FEW = ["train.steps=3", "eval.every=0", "checkpoint.every=1", "model.backbone_window=16"]
SHORT = ["model.backbone={bert}", "model.backbone_window=16"]


@pytest.fixture(scope="session")
def llama(text, save_random, tmp_path_factory) -> Path:
    words = tokenizer.load(f"{text}/tokenizer")
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return save_random(tmp_path_factory.mktemp("llama"), LlamaModel(config), words)


@pytest.fixture(scope="session")
def other(tmp_path_factory) -> Path:
    """A tokenizer of other words."""
    folder = tmp_path_factory.mktemp("other")
    tokenizer.save(tokenizer.train(["nothing is shared with anything here"] * 3, 290), folder)
    return folder


@pytest.mark.parametrize("stage", [1, 3])
def test_a_frozen_backbone_goes_through_a_run_unchanged(stage, recipe, bert, capfd):
    few = ["batch.tokens=64", "eval.tokens=64"] if stage == 3 else []  # one part a step: they are slow
    folder = train(recipe, [*FEW, *few, f"model.backbone={bert}", f"zero.stage={stage}", "optim.weight_decay=0.5"])
    line = (folder / "initialization.txt").read_text()
    assert line.startswith(f"backbone: {bert.name} (license not stated, sha256 ") and "3 layers, frozen" in line
    assert line.strip() in capfd.readouterr().err
    model = ConceptForMaskedLM.from_pretrained(folder / "model").eval()
    theirs = AutoModel.from_pretrained(bert, add_pooling_layer=False).state_dict()
    ours = model.encoder.backbone.model.state_dict()
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert model.config.backbone["sha256"] and model.config.vocab_size == model.lm_head.weight.shape[0]


def test_the_last_layers_are_trained(recipe, bert):
    folder = train(recipe, [*FEW, f"model.backbone={bert}", "model.backbone_train=last 1",
                            "train.checkpoint_backbone=true", "optim.lr=1e-2"])  # fmt: skip
    ours, theirs = load_file(folder / "model" / "model.safetensors"), load_file(bert / "model.safetensors")
    for name, value in theirs.items():
        if not name.startswith("pooler."):
            moved = not torch.equal(ours[f"encoder.backbone.model.{name}"], value)
            assert moved == name.startswith("encoder.layer.2.") or name.endswith("key.bias"), name


def test_resuming_needs_no_source(recipe, bert):
    own = recipe.parent / "bert"
    shutil.copytree(bert, own)
    overrides = [*FEW, f"model.backbone={own}", f"data.tokenizer={bert}", "model.init_queries=state"]
    folder = train(recipe, overrides)
    before = load_file(folder / "model" / "model.safetensors")
    assert before["encoder.backbone.scale"] != 1 and before["encoder.backbone.mean"].abs().max() > 0
    for gone in (own, folder / "model", folder / "checkpoints" / "step-00000003"):
        shutil.rmtree(gone)
    train(recipe, [*overrides, "resume=auto"])
    after = load_file(folder / "model" / "model.safetensors")
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if entry["kind"] == "train"] == [1, 2, 3]


def test_the_tokenizer_is_the_backbones_unless_told(recipe, bert, text):
    """The exported folder reads text as AutoModel and AutoTokenizer do, and the pooled vector is the plain mean."""
    plain = recipe.read_text().replace(f"tokenizer: {text}/tokenizer, ", "")
    recipe.write_text(plain)
    folder = train(recipe, [*FEW, f"model.backbone={bert}", "model.init_queries=state", "optim.lr=1e-9"])
    encoder = AutoModel.from_pretrained(folder / "model").eval()
    words = AutoTokenizer.from_pretrained(folder / "model")
    ids = words("the encoder reads", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = encoder.backbone(pack([ids[0]]))
        assert torch.allclose(encoder(input_ids=ids).pooler_output[0], states.mean(0), atol=1e-4)


@pytest.mark.parametrize("overrides, found", [
    (["model.backbone=/nowhere"], "model.backbone: /nowhere: no such folder here"),
    (["model.backbone={text}"], "no config.json"),
    (["model.backbone={bert}", "model.backbone_window=33"], "model: backbone_window: expected 1 to 32"),
    (["model.backbone={bert}", "model.backbone_layers=4"], "model: backbone_layers: expected up to 3"),
    (["model.backbone={bert}", "model.backbone_train=1"], "model.backbone_train: expected none, all, or last N"),
    ([*SHORT, "model.backbone_train=last 4"], "model: backbone_train: expected none"),
    ([*SHORT, "train.checkpoint_backbone=true"], "train.checkpoint_backbone: expected false"),
    (["model.backbone={bert}", "data.tokenizer={other}"], "; set data.tokenizer to "),
    (["model.init_queries=state"], "init_queries: expected other than state without a backbone"),
    (["init.source={llama}"], "model.backbone takes pretrained models"),
])  # fmt: skip
def test_what_cannot_be_a_backbone(recipe, bert, llama, other, text, overrides, found):
    with pytest.raises(InputError) as caught:
        places = {"bert": bert, "llama": llama, "other": other, "text": text}
        train(recipe, [override.format(**places) for override in overrides])
    assert found in str(caught.value) and "\n" not in str(caught.value)
    assert not (recipe.parent / "runs").exists()


def test_a_causal_backbone(recipe, llama):
    """Another width is projected; tied heads have the backbone's table."""
    folder = train(recipe, [*FEW, f"model.backbone={llama}", "model.backbone_two_sided=true"])
    model = ConceptForMaskedLM.from_pretrained(folder / "model")
    assert model.encoder.widen_tokens.weight.shape == (30, 24) and model.lm_head.weight.shape[1] == 24


def test_a_number_of_layers_is_chosen_and_the_rest_bridged(recipe, bert):
    """The first and the last of three; a resumed run knows which without its source."""
    own = recipe.parent / "bert"
    shutil.copytree(bert, own)
    overrides = [*FEW, f"model.backbone={own}", f"data.tokenizer={bert}", "model.init_queries=state",
                 "model.backbone_layers=2", "model.backbone_bridges=true"]  # fmt: skip
    folder = train(recipe, overrides)
    assert "layers 0, 2 and linear maps between, frozen" in (folder / "initialization.txt").read_text()
    before = load_file(folder / "model" / "model.safetensors")
    assert before["encoder.backbone.model.encoder.layer.1.bridge.weight"].abs().max() > 1e-4
    model = ConceptForMaskedLM.from_pretrained(folder / "model")
    assert model.config.backbone_layers == [0, 2] and len(model.encoder.backbone.layers) == 2
    for gone in (own, folder / "model", folder / "checkpoints" / "step-00000003"):
        shutil.rmtree(gone)
    train(recipe, [*overrides, "resume=auto"])
    after = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)


# --- states that are stored

READ = [
    "model.init_queries=state", "model.decoder_queries=position", "model.dropout=0", "train.steps=4", "eval.every=0",
    "objective={name: read_back, states: 1.0}", "train.label_smoothing=0", "batch.micro_tokens=128",
    "checkpoint.every=2", "model.backbone_window=16",
]  # fmt: skip


def lines(folder: Path, kind: str) -> list[dict]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["kind"] == kind]


def test_a_run_on_stored_states(recipe, bert, tmp_path, monkeypatch, capfd):
    """The losses are those of computed ones but for 16 bits, and nothing is computed but what is not there."""
    own = [*READ, f"model.backbone={bert}", f"data.cache={tmp_path}/cache"]
    folder = train(recipe, own)
    forward, seen = Backbone.forward, []

    def counted(self, packed):
        seen.append(packed.num_tokens)
        return forward(self, packed)

    monkeypatch.setattr(Backbone, "forward", counted)
    stored = [*own, "data.states_gb=0.1"]
    again = train(recipe, [*stored, "run.name=stored"])
    tokens = sum(entry["tokens"] for entry in lines(folder, "train")[-1:])
    assert "states of " in capfd.readouterr().err and 0 < sum(seen) < 2 * 20000 and tokens > 0
    for one, other in zip(lines(folder, "train"), lines(again, "train"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
        assert one["state_error"] == pytest.approx(other["state_error"], rel=2e-3)
    (figures,), (of_stored,) = lines(folder, "eval"), lines(again, "eval")
    assert figures["state_error"] == pytest.approx(of_stored["state_error"], rel=2e-3)
    assert figures["state_error_without"] > 0.5 and figures["nll_unseen"] is None
    seen.clear()
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints" / "step-00000004")
    resumed = train(recipe, [*stored, "run.name=stored", "resume=auto"])
    assert not seen, "the states of a run that goes on are there"
    assert [entry["step"] for entry in lines(resumed, "train")] == [1, 2, 3, 4]
    for gone in (again / "model", again / "checkpoints" / "step-00000004"):
        shutil.rmtree(gone)
    for store in (tmp_path / "cache").glob("states-*"):
        shutil.rmtree(store)
    with pytest.raises(InputError, match=r"data\.states_gb: .* a run that goes on does not compute them"):
        train(recipe, [*stored, "run.name=stored", "resume=auto"])
    train(recipe, [*own, "run.name=stored", "resume=auto"])


@pytest.mark.parametrize("overrides, found", [
    ([*READ, "data.states_gb=1e-6"], "data.states_gb: "),
    ([*READ, "data.states_gb=0"], "data.states_gb: expected a number in"),
    (["data.states_gb=1", "model.backbone_train=all", "distill={teacher: x, similarity: 0}"],
     "data.states_gb: expected nothing without a frozen"),
    (["model.backbone_window=16", "data.states_gb=1"],
     "data.states_gb: expected nothing with objective diffusion, which never reads a window whole"),
    (["objective={name: read_back, states: 1.0}", "model.backbone=null"], "objective.states: expected 0 without a "),
])  # fmt: skip
def test_states_that_cannot_be_stored_or_read(recipe, bert, overrides, found):
    with pytest.raises(InputError) as caught:
        train(recipe, [f"model.backbone={bert}", *overrides])
    assert found in str(caught.value) and "\n" not in str(caught.value)
    assert not (recipe.parent / "runs").exists()
