"""Every way in which the folder of a model can be damaged, at every door that opens one: one line, exit code 2."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertModel

from conceptron.__main__ import main
from conceptron.engine import backbone
from conceptron.engine.data import tokenizer
from conceptron.engine.data.corpus import open_corpus
from conceptron.engine.data.teacher import Teacher
from conceptron.engine.errors import InputError
from conceptron.engine.initialize import initialize
from conceptron.engine.launching import launch
from conceptron.engine.model_folder import find
from conceptron.engine.recipe.load import load_recipe
from conceptron.engine.recipe.schema import Init
from conceptron.models.config import ConceptConfig
from conceptron.models.masked_lm import ConceptForMaskedLM

WEIGHTS = "model.safetensors"


def cut(folder: Path, name: str = WEIGHTS, keep: float = 0.6) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(keep * len(whole))])


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors), folder / WEIGHTS, metadata={"format": "pt"})


def other_shapes(tensors: dict) -> dict:
    return {name: torch.cat((tensor, tensor)) if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}


def fewer(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if "embed" in name}


def spoilt(value: float):
    def spoil(tensors: dict) -> dict:
        name = sorted(name for name, tensor in tensors.items() if tensor.ndim == 2)[0]
        tensors[name] = tensors[name].clone().index_fill(0, torch.tensor(0), value)
        return tensors

    return spoil


def fields(folder: Path, **changes) -> None:
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | changes))


def text(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


def relink(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "blob")


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)


DAMAGES = {  # name -> what is done to a folder, what the line says
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir() if path.is_file()], "no config.json"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "config not JSON": (text("config.json", '{"model_type": "con'), "config.json: not JSON"),
    "config in Latin-1": (lambda folder: (folder / "config.json").write_bytes(b'"\xe9"'), "config.json: not JSON"),
    "config empty": (text("config.json", ""), "config.json: not JSON"),
    "config nested": (text("config.json", '{"a":' + "[" * 50_000 + "]" * 50_000 + "}"), "nested too deeply"),
    "config a list": (text("config.json", "[1]"), "expected an object with model_type, got a list"),
    "no model type": (text("config.json", "{}"), "expected text as model_type, got nothing"),
    "model type a list": (lambda folder: fields(folder, model_type=["bert"]), "as model_type, got a list"),
    "unknown model type": (lambda folder: fields(folder, model_type="no-such"), "no-such"),
    "another's model type": (lambda folder: fields(folder, model_type="gpt2"), "gpt2"),
    "width not a number": (lambda folder: fields(folder, hidden_size="wide"), "hidden_size"),
    "width negative": (lambda folder: fields(folder, hidden_size=-8), ""),
    "config a link to nothing": (relink, "a link to nothing"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "expected model.safetensors, which is not there"),
    "weights of no bytes": (text(WEIGHTS, ""), "damaged (0 bytes;"),
    "weights cut short": (cut, "damaged ("),
    "weights cut in the head": (lambda folder: cut(folder, keep=0.002), "damaged ("),
    "weights a page of HTML": (text(WEIGHTS, "<html>Not found</html>" * 9), "damaged ("),
    "index without files": (text(f"{WEIGHTS}.index.json", "[]"), "expected a weight_map"),
    "index of lost files": (text(f"{WEIGHTS}.index.json", '{"weight_map": {"a": "b.safetensors"}}'), "b.safetensors"),
    "other shapes": (lambda folder: rewrite(folder, other_shapes), "has shape ["),
    "missing tensors": (lambda folder: rewrite(folder, fewer), "missing"),
    "NaN": (lambda folder: rewrite(folder, spoilt(float("nan"))), "are not finite"),
    "infinity": (lambda folder: rewrite(folder, spoilt(float("inf"))), "are not finite"),
    "no tokenizer": (no_tokenizer, "tokenizer"),
    "tokenizer not JSON": (text("tokenizer.json", '{"version": '), "tokenizer"),
    "tokenizer empty": (text("tokenizer.json", "{}"), "tokenizer"),
    "tokenizer a list": (text("tokenizer.json", "[[[]]]"), "tokenizer"),
}  # fmt: skip
# what a door does not mind: the tokenizer is the run's there, and what is missing stays as it was drawn
FINE = {
    "init": {"no tokenizer", "tokenizer not JSON", "tokenizer empty", "tokenizer a list", "missing tensors"},
    "backbone": {"no tokenizer"},
}  # fmt: skip
SAID = {("teacher", "another's model type"): "weights are missing"}


@pytest.fixture(scope="module")
def ours(text, tmp_path_factory) -> Path:
    words = AutoTokenizer.from_pretrained(f"{text}/tokenizer")
    torch.manual_seed(0)
    model = ConceptForMaskedLM(ConceptConfig(
        vocab_size=len(words), hidden_size=32, num_concepts=4, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_decoder_layers=1, mask_token_id=words.mask_token_id,
    ))  # fmt: skip
    folder = tmp_path_factory.mktemp("ours")
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(text, tmp_path_factory) -> Path:
    """A BERT with the tokenizer of the text."""
    words = AutoTokenizer.from_pretrained(f"{text}/tokenizer")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("theirs")
    BertModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture
def doors(ours, text, recipe):
    """Name -> a function that opens a folder as the engine does; it raises InputError."""
    words = AutoTokenizer.from_pretrained(f"{text}/tokenizer")

    def init(folder: Path) -> None:
        with launch.world() as world:
            initialize(ConceptForMaskedLM(ConceptConfig.from_pretrained(ours)), Init(source=str(folder)), words, world)

    def open_backbone(folder: Path) -> None:
        with launch.world() as world:
            made = load_recipe(recipe, [
                f"model.backbone={folder}", f"data.tokenizer={text}/tokenizer", "model.backbone_window=32"
            ])  # fmt: skip
            opened = backbone.open_backbone(made, words, world)
            model = ConceptForMaskedLM(made.build_config(
                vocab_size=len(words), mask_token_id=words.mask_token_id, backbone=opened.described
            ))  # fmt: skip
            backbone.fill(model, opened, open_corpus(made.data))

    return {"init": init, "backbone": open_backbone, "teacher": lambda folder: Teacher(str(folder))}


def damaged(source: Path, damage: str, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    DAMAGES[damage][0](folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["generate", "analyze"])
def test_commands_say_it_in_one_line(command, damage, ours, text, tmp_path, capsys):
    folder = damaged(ours, damage, tmp_path)
    more = ["--mode", "fill", "--text", "a [MASK] text"] if command == "generate" else ["--text", f"{text}/00.txt"]
    assert main([command, str(folder), *more]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("conceptron: error: ") and said.err.count("\n") == 1 and not said.out
    expected = DAMAGES[damage][1]
    if command == "analyze" and not (folder / "config.json").is_file():
        expected = "neither a run folder (recipe.yaml) nor a Hugging Face checkpoint"
    assert expected in said.err and str(folder) in said.err
    assert not (folder / "report").exists()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("door", ["init", "backbone", "teacher"])
def test_recipes_say_it_in_one_line(door, damage, doors, ours, theirs, tmp_path):
    folder = damaged(ours if door == "init" else theirs, damage, tmp_path)
    if damage in FINE.get(door, ()):
        doors[door](folder)
        return
    with pytest.raises(InputError) as caught:
        doors[door](folder)
    said = str(caught.value)
    assert "\n" not in said and SAID.get((door, damage), DAMAGES[damage][1]) in said and str(folder) in said
    field = {"init": "init.source", "backbone": "model.backbone", "teacher": "distill.teacher"}[door]
    assert said.startswith(f"{field}: ")


def test_nothing_is_left_behind_by_a_damaged_beginning(recipe, ours, tmp_path, capsys):
    folder = damaged(ours, "weights cut short", tmp_path)
    assert main(["train", str(recipe), f"init.source={folder}"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"conceptron: error: init.source: {folder}/{WEIGHTS}: damaged")
    assert not (recipe.parent / "runs").exists()


@pytest.mark.parametrize("place, found", [
    ("", "no such folder here"), ("/no/where", "no such folder here"), ("a/b/c", "no such folder here"),
    ("~nobody-at-all/x", "not a path"), ("x" * 5000, "not a path"), ("a\nb", "no such folder here"),
    ("file", "expected a folder, got a file"), ("link", "a link to nothing-there, which is not there; mend the link"),
    ("org/none", "no such folder here, and it cannot be fetched from the hub"),
])  # fmt: skip
def test_places_where_no_model_is(place, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    os.symlink("nothing-there", "link")
    with pytest.raises(InputError) as caught:
        find(place, "init.source")
    assert found in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_a_hub_id_is_found_in_the_cache_offline(ours, tmp_path, monkeypatch):
    """As `hf download` lays it out; what the cache does not have is one line."""
    home = tmp_path / "hub" / "models--org--name"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    shutil.copytree(ours, home / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find("org/name", "CHECKPOINT") == home / "snapshots" / commit
    assert len(tokenizer.load("org/name")) == 300
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(InputError, match="it cannot be fetched from the hub"):
        find("org/name", "CHECKPOINT")


def test_a_backbone_is_what_it_was(theirs, doors):
    """The undamaged folders pass: the lines above come from the damage."""
    for door in ("backbone", "teacher"):
        doors[door](theirs)


def test_undamaged_ours(ours, doors, capsys):
    doors["init"](ours)
    assert main(["generate", str(ours), "--text", "a [MASK] text", "--mode", "fill"]) == 0
