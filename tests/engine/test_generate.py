import shutil

import pytest
import torch

from conceptron.__main__ import main
from conceptron.engine import model_folder
from conceptron.engine.data.tokenizer import describe, train
from conceptron.engine.errors import InputError
from conceptron.engine.generate import canvas_of, generate, read
from conceptron.models.config import ConceptConfig
from conceptron.models.generation.sampling import Sampling
from conceptron.models.masked_lm import ConceptForMaskedLM

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = train([TEXT * 20], 300)
    torch.manual_seed(0)
    model = ConceptForMaskedLM(ConceptConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_concepts=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_decoder_layers=1, mask_token_id=tokenizer.mask_token_id, initializer_range=0.3,
    ))  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def vocabulary():
    return describe(train([TEXT * 20], 300), "here")


def test_a_mask_in_the_text_becomes_the_mask_id_and_takes_the_space_before_it(vocabulary):
    ids = read("The quick [MASK] fox", vocabulary)
    mask = vocabulary.tokens.mask_id
    left, right = ids[: ids.index(mask)], ids[ids.index(mask) + 1 :]
    assert vocabulary.tokenizer.decode(left) == "The quick"
    assert vocabulary.tokenizer.decode(right) == " fox"
    with pytest.raises(InputError, match="expected some text"):
        read("", vocabulary)


def test_canvas_of_each_mode(vocabulary):
    tokens, ids = vocabulary.tokens, [20, 21, 22]
    canvas, source = canvas_of(ids, "prefix", 2, tokens)
    assert canvas.input_ids.tolist() == [*ids, tokens.mask_id, tokens.mask_id] and source is None
    canvas, source = canvas_of(ids, "concepts", 7, tokens)
    assert canvas.input_ids.tolist() == [tokens.mask_id] * 7 and source.input_ids.tolist() == ids
    canvas, source = canvas_of(ids, "concepts", None, tokens)
    assert canvas.num_tokens == 3
    canvas, source = canvas_of([20, tokens.mask_id, 21], "infill", 4, tokens, read_once=True)
    assert canvas.input_ids.tolist() == [20, *[tokens.mask_id] * 4, 21]
    assert source.input_ids.tolist() == [20, 21] and source.position_ids.tolist() == [0, 5]
    assert source.num_positions().tolist() == [6]
    assert canvas_of(ids, "prefix", None, tokens)[0].num_tokens == 3 + 32
    assert canvas_of([tokens.mask_id], "fill", None, tokens)[0].num_tokens == 1
    for mode in ("fill", "infill"):
        with pytest.raises(InputError, match="nothing to fill"):
            canvas_of(ids, mode, None, tokens)
    for mode, length in (("prefix", 0), ("infill", -1), ("concepts", 0), ("fill", 3)):
        with pytest.raises(InputError, match="--length"):
            canvas_of([*ids, tokens.mask_id], mode, length, tokens)


@pytest.mark.parametrize(
    ("mode", "text", "length"),
    [("prefix", "The quick", 12), ("fill", "The [MASK] brown", None), ("infill", "The [MASK] brown", 5),
     ("concepts", TEXT, None)],
)  # fmt: skip
@pytest.mark.parametrize("read_once", [False, True])
def test_same_seed_same_text_and_no_special_tokens(folder, mode, text, length, read_once):
    options = dict(mode=mode, length=length, read_once=read_once, sampling=Sampling(steps=4, seed=3), num_samples=2)
    first = generate(folder, text, **options)
    assert first == generate(folder, text, **options)
    assert first[0] != first[1], "another sample has another seed"
    for sample in first:
        assert "[" not in sample
        assert mode != "prefix" or sample.startswith(text)


def test_the_command_line_reaches_every_option(folder, capsys):
    options = ["--mode", "infill", "--length", "6", "--read-once", "--steps", "4", "--schedule", "linear", "--unmask",
               "remdm", "--remask", "0.5", "--block", "3", "--temperature", "0.9", "--top-k", "9", "--top-p", "0.8",
               "--clean-up", "--samples", "2", "--seed", "5"]  # fmt: skip
    assert main(["generate", str(folder), "--text", "The [MASK] brown", *options]) == 0
    sampling = Sampling(steps=4, schedule="linear", unmask="remdm", remask=0.5, block=3, temperature=0.9, top_k=9,
                        top_p=0.8, clean_up=True, seed=5)  # fmt: skip
    drawn = generate(
        folder, "The [MASK] brown", mode="infill", length=6, read_once=True, sampling=sampling, num_samples=2
    )
    assert capsys.readouterr().out == "\n---\n".join(drawn) + "\n"


@pytest.mark.parametrize(
    "options, found",
    [
        (["--unmask", "best"], "generate: --unmask: expected one of confidence, margin"),
        (["--guidance", "2"], "--guidance: expected 0 for a model without null concepts"),
        (["--steps", "2", "--block", "4"], "--steps: expected at least 8, one for each block of 4, got 2"),
    ],
)
def test_what_the_model_cannot_do_is_said_in_one_line(folder, capsys, options, found):
    assert main(["generate", str(folder), "--text", "The", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"conceptron: error: {found}") and said.count("\n") == 1


@pytest.mark.parametrize("text, found", [
    ("", "expected some text to read, got none"),
    ("a\ud800b [MASK]", "expected text, got bytes that are not UTF-8 at character 2"),
    (b"caf\xe9".decode(errors="surrogateescape"), "expected text, got bytes that are not UTF-8 at character 4"),
    ("a\0b", "expected text, got NUL at character 2"),
    ("no mask in it", "nothing to fill; write the mask token where text is wanted, or use --mode prefix"),
])  # fmt: skip
def test_text_that_cannot_be_read(folder, capsys, text, found):
    with pytest.raises(InputError) as caught:
        generate(folder, text, mode="fill", sampling=Sampling())
    assert str(caught.value).startswith(f"--text: {found}") and "\n" not in str(caught.value)
    assert main(["generate", str(folder), "--mode", "fill", "--text", text]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize("content, found", [
    (b"caf\xe9", ":1: byte 0xe9 at offset 3 is not UTF-8"), (b"a\nb\0", ":2: a NUL byte, which no text holds"),
    ("The [MASK]".encode("utf-16-le"), ":1: a NUL byte"), (b"", "--text: expected some text to read, got none"),
])  # fmt: skip
def test_files_that_cannot_be_read(folder, tmp_path, capsys, content, found):
    (tmp_path / "text").write_bytes(content)
    assert main(["generate", str(folder), "--mode", "fill", "--file", str(tmp_path / "text")]) == 2
    said = capsys.readouterr().err
    assert found in said and said.count("\n") == 1


def test_logits_that_are_not_finite_are_not_drawn_from(folder, tmp_path, capsys):
    """Weights may be finite and their products not."""
    model = ConceptForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.bias.fill_(3e38)
        model.lm_head.weight.mul_(1e38)
    shutil.copytree(folder, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    assert main(["generate", str(tmp_path / "model"), "--text", "The", "--steps", "1"]) == 2
    said = capsys.readouterr()
    assert "model: the model's logits are not finite; take an earlier checkpoint" in said.err and not said.out


def test_what_is_no_model_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        generate(tmp_path, TEXT, mode="prefix", length=4, sampling=Sampling())
    encoder = ConceptForMaskedLM.from_pretrained(folder).encoder
    encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(InputError, match="a ConceptEncoder cannot generate"):
        generate(tmp_path / "encoder", TEXT, mode="prefix", length=4, sampling=Sampling())


def test_a_hub_id_is_fetched(folder, monkeypatch):
    """Without code and pickles of the repository; what cannot be fetched is one line."""
    asked = []

    def fetch(name, **options):
        asked.append((name, options))
        return folder

    monkeypatch.setattr(model_folder, "snapshot_download", fetch)
    drawn = generate("org/name", "The [MASK] brown", mode="fill", sampling=Sampling(steps=2))
    assert drawn == generate(folder, "The [MASK] brown", mode="fill", sampling=Sampling(steps=2))
    assert [name for name, _ in asked] == ["org/name"] and "*.py" not in asked[0][1]["allow_patterns"]
    monkeypatch.undo()
    with pytest.raises(InputError, match="CHECKPOINT: org/none: no such folder here, and it cannot be fetched"):
        generate("org/none", TEXT, mode="prefix", sampling=Sampling())
