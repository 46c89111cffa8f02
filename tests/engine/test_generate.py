import pytest
import torch

from conceptron.engine.data.tokenizer import describe, train
from conceptron.engine.errors import InputError
from conceptron.engine.generate import canvas_of, generate, read
from conceptron.models.config import ConceptConfig
from conceptron.models.generation import Sampling
from conceptron.models.heads import ConceptForMaskedLM

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
    canvas, source = canvas_of(ids, "concepts", 0, tokens)
    assert canvas.input_ids.tolist() == [tokens.mask_id] * 3 and source.input_ids.tolist() == ids
    with pytest.raises(InputError, match="nothing to fill"):
        canvas_of(ids, "fill", 0, tokens)
    with pytest.raises(InputError, match="--length"):
        canvas_of(ids, "prefix", 0, tokens)


@pytest.mark.parametrize(("mode", "text"), [("prefix", "The quick"), ("fill", "The [MASK] brown"), ("concepts", TEXT)])
def test_same_seed_same_text_and_no_special_tokens(folder, mode, text):
    sampling = Sampling(steps=4, temperature=1.0, seed=3)
    first = generate(folder, text, mode=mode, length=12, sampling=sampling, num_samples=2)
    assert first == generate(folder, text, mode=mode, length=12, sampling=sampling, num_samples=2)
    assert first[0] != first[1], "another sample has another seed"
    for sample in first:
        assert "[" not in sample
        assert mode != "prefix" or sample.startswith(text)


def test_what_is_no_model_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        generate(tmp_path, TEXT, mode="prefix", length=4, sampling=Sampling())
    encoder = ConceptForMaskedLM.from_pretrained(folder).encoder
    encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(InputError, match="a ConceptEncoder cannot generate"):
        generate(tmp_path / "encoder", TEXT, mode="prefix", length=4, sampling=Sampling())
