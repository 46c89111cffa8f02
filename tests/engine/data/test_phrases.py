"""Phrases of the training text: counted once, kept in the cache, used by a recipe that names no list."""

from conceptron.engine.data.corpus import open_corpus
from conceptron.engine.data.phrases import open_phrases
from conceptron.engine.recipe.data import DataRecipe
from conceptron.engine.recipe.load import load_recipe
from conceptron.models.objectives import pmi


def test_they_are_those_of_the_training_text(text, tmp_path, capfd):
    data = DataRecipe(source=str(text), tokenizer=f"{text}/tokenizer", window=32, validation=0.2, cache=str(tmp_path))
    file = open_phrases(data)
    corpus = open_corpus(data)
    expected = pmi.build([corpus.train[row] for row in range(len(corpus.train))], corpus.tokens)
    found = pmi.load(str(file))
    assert found.ids == expected.ids and len(found.ids) > 0 and found.vocab_size == corpus.tokens.vocab_size
    assert "counting phrases in 0.0 M tokens" in capfd.readouterr().err
    assert open_phrases(data) == file and "counting" not in capfd.readouterr().err
    assert open_phrases(data.model_copy(update={"window": 16})) != file  # a phrase ends with its window


def test_a_recipe_takes_them_in_every_part_that_needs_them(tmp_path):
    parts = "objective={name: mixed, parts: [{name: mlm, masking: pmi}, {name: tsdae}]}"
    recipe = load_recipe("pretrain/pmi.yaml", [parts])
    assert recipe.needs_phrases
    pmi.save(pmi.Phrases(97, [[3, 4]], [1.0]), tmp_path / "list.json")
    filled = recipe.with_phrases(tmp_path / "list.json")
    assert not filled.needs_phrases and filled.build_objective().parts[0].phrases == str(tmp_path / "list.json")
    assert load_recipe("pretrain/mlm.yaml").needs_phrases is False
