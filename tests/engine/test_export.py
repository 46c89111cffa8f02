"""The folder of a finished model, as other libraries and strangers meet it."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModel, AutoTokenizer

from conceptron import __version__
from conceptron.engine.card import About
from conceptron.engine.data import tokenizer as tokenizers
from conceptron.engine.errors import InputError
from conceptron.engine.export import export
from conceptron.models.config import ConceptConfig
from conceptron.models.masked_lm import ConceptForMaskedLM

TEXTS = ["a plane", "an air plane that left late", "the station", "a train was late"]
LENGTH = 24
ABOUT = About("demo", LENGTH, {"train": {"steps": 3}}, ["texts.jsonl: 120 tokens in 4 documents"], {"loss": 2.5})


def model(tokenizer, **options) -> ConceptForMaskedLM:
    torch.manual_seed(0)
    return ConceptForMaskedLM(ConceptConfig(**{
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_concepts": 6, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 32, "num_decoder_layers": 1,
        "mask_token_id": tokenizer.mask_token_id, "initializer_range": 0.5, **options,
    }))  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(TEXTS * 5, 300)


@pytest.fixture
def folder(world, tokenizer, tmp_path):
    return export(world, model(tokenizer), tokenizer, tmp_path / "model", ABOUT)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_exported(world, tokenizer, folder, value):
    """Which, how many; what stood in the folder before is still there."""
    spoilt = model(tokenizer)
    with torch.no_grad():
        spoilt.lm_head.bias[:3] = value
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"model: not written, 3 of the \d+ numbers of lm_head\.bias are not"):
        export(world, spoilt, tokenizer, folder, ABOUT)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_figure_that_is_not_finite_is_in_words(world, tokenizer, tmp_path):
    about = replace(ABOUT, figures={"loss": float("nan"), "nll": 2.0})
    card = (export(world, model(tokenizer), tokenizer, tmp_path / "model", about) / "README.md").read_text()
    assert "| loss | not finite |" in card and "| nll | 2 |" in card and "nan" not in card.lower().split("---")[-1]


def vectors(folder, texts) -> torch.Tensor:
    """[B, d] of one text at a time, with transformers alone."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    rows = [encoder(**tokenizer(text, return_tensors="pt")).pooler_output for text in texts]
    return torch.nn.functional.normalize(torch.cat(rows).detach(), dim=-1)


def test_sentence_transformers_gives_the_pooled_concepts_whatever_the_padding(folder):
    """Also where the padded length is C: averaging concepts under the mask of tokens would then change in silence."""
    library = pytest.importorskip("sentence_transformers")
    loaded = library.SentenceTransformer(str(folder), device="cpu")  # trust_remote_code stays False
    assert loaded.max_seq_length == LENGTH and loaded.get_embedding_dimension() == 32
    want = vectors(folder, TEXTS)
    ids = loaded.tokenizer(TEXTS)["input_ids"]
    for i, j in ((0, 1), (2, 3), (0, 3)):
        got = loaded.encode([TEXTS[i], TEXTS[j]], convert_to_tensor=True)
        assert torch.allclose(got, want[[i, j]], atol=1e-5)
    by_length = {len(row): text for row, text in zip(ids, TEXTS, strict=True)}
    short = loaded.tokenizer.decode(ids[1][:6])
    assert len(loaded.tokenizer(short)["input_ids"]) == 6 and min(by_length) < 6  # padded to C = 6
    got = loaded.encode([by_length[min(by_length)], short], convert_to_tensor=True)
    assert torch.allclose(got, vectors(folder, [by_length[min(by_length)], short]), atol=1e-5)
    assert torch.allclose(loaded.similarity(want, want), want @ want.T, atol=1e-6)
    long = loaded.encode([" ".join(TEXTS * 9)], convert_to_tensor=True)
    cut = AutoTokenizer.from_pretrained(folder)(" ".join(TEXTS * 9), truncation=True, return_tensors="pt")
    pooled = AutoModel.from_pretrained(folder).eval()(**cut).pooler_output
    assert torch.allclose(long, torch.nn.functional.normalize(pooled, dim=-1), atol=1e-5)


def test_a_folder_saved_by_sentence_transformers_loads_again(folder, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    loaded = library.SentenceTransformer(str(folder), device="cpu")
    loaded.save(str(tmp_path / "again"))
    again = library.SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert torch.equal(again.encode(TEXTS, convert_to_tensor=True), loaded.encode(TEXTS, convert_to_tensor=True))


def test_mteb_runs_a_task_on_it(folder, tmp_path):
    mteb = pytest.importorskip("mteb")
    library = pytest.importorskip("sentence_transformers")
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    class Made(AbsTaskSTS):
        metadata = TaskMetadata(
            name="Made", dataset={"path": "made", "revision": "1"}, description="made up", reference=None, type="STS",
            category="t2t", modalities=["text"], eval_splits=["test"], eval_langs=["eng-Latn"],
            main_score="cosine_spearman", date=None, domains=None, task_subtypes=None, license=None,
            annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation=None,
        )  # fmt: skip
        min_score, max_score = 0, 5

        def load_data(self, **_) -> None:
            rows = {"sentence1": TEXTS, "sentence2": [TEXTS[0], TEXTS[2], TEXTS[2], TEXTS[1]], "score": [5, 1, 5, 2]}
            self.dataset = DatasetDict(test=Dataset.from_dict(rows))
            self.data_loaded = True

    loaded = library.SentenceTransformer(str(folder), device="cpu")
    result = mteb.evaluate(loaded, [Made()], cache=None, overwrite_strategy="always")
    scores = result.task_results[0].scores["test"][0]
    assert -1 <= scores["main_score"] <= 1 and scores["cosine_spearman"] == scores["main_score"]


def test_the_trained_length_is_in_the_folder(world, tokenizer, folder, tmp_path):
    config = AutoConfig.from_pretrained(folder)
    assert config.max_position_embeddings == AutoTokenizer.from_pretrained(folder).model_max_length == LENGTH
    learned = model(tokenizer, token_positions="learned", max_position_embeddings=64)
    other = export(world, learned, tokenizer, tmp_path / "learned", ABOUT)
    assert AutoConfig.from_pretrained(other).max_position_embeddings == 64  # rows of a table
    assert learned.config.max_position_embeddings == 64 and not hasattr(learned.config, "install")


def test_a_stranger_is_told_what_to_install(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["conceptron_version"] == __version__ and "Python package conceptron" in config["install"]
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    first = body.strip().splitlines()[:3]
    assert first[0] == "# demo" and f"conceptron, version {__version__}" in first[2]
    assert yaml.safe_load(head)["library_name"] == "transformers" and "license" not in yaml.safe_load(head)
    for part in ("texts.jsonl: 120 tokens", "| loss | 2.5 |", "steps: 3", "texts of up to 24 tokens", "not recorded"):
        assert part in body


def test_the_card_s_code_runs(folder):
    pytest.importorskip("sentence_transformers")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {"FOLDER": str(folder)}
    exec(code, names)
    assert names["encoded"].pooler_output.shape == names["vectors"].shape == (1, 32)


def test_the_card_names_backbone_and_teacher(world, tokenizer, tmp_path):
    built = model(tokenizer)
    built.config.distilled_from = {"teacher": "org/teacher", "fingerprint": "0", "width": 8}
    body = (export(world, built, tokenizer, tmp_path / "a", ABOUT) / "README.md").read_text()
    assert "- distilled from org/teacher" in body and "base_model:\n- org/teacher" in body
    assert "No held-out figures" in (
        export(world, built, tokenizer, tmp_path / "b", replace(ABOUT, figures={"nll": None})) / "README.md"
    ).read_text()
