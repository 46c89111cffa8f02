"""The tokenizer that goes with a model: a call gives what training showed, a pair has one separator, for any."""

import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

from conceptron.engine.data import tokenizer as tokenizers
from conceptron.engine.errors import InputError
from conceptron.engine.generate import read
from conceptron.models.config import ConceptConfig
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.tasks.heads import ConceptForSequenceClassification

FOLDERS = ("bert-base-uncased", "modernbert-layout", "olmo-neox-50k", "smollm2")  # as data sets of tests hold them
SEPARATORS = {
    "pydocs": "[EOS]", "bert-base-uncased": "[SEP]", "modernbert-layout": "[SEP]", "like BERT": "[SEP]",
    "like Llama": "</s>", "MiniLM": "[SEP]",
}  # fmt: skip
FIRST, SECOND = "A plane.", "An air plane."
WORDS = [f"{FIRST} {SECOND} été, A flies two  spaces\n"] * 5


def like_bert() -> PreTrainedTokenizerFast:
    """Word pieces without case, [CLS] and [SEP] around a text, and a file that cuts and pads of its own accord."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(WORDS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_truncation(4)
    made.enable_padding(length=6)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def like_llama() -> PreTrainedTokenizerFast:
    """Pieces with a mark where a word begins, a beginning of text before it, no mask, no padding."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module", params=["pydocs", "like BERT", "like Llama", "MiniLM", *FOLDERS])
def vocabulary(request, tmp_path_factory):
    """The tokenizer of a run, and the folder of what is exported with its model."""
    if request.param == "pydocs":
        own = tokenizers.train([f"{FIRST} {SECOND}"] * 5, 300)
    elif request.param.startswith("like"):
        given = tmp_path_factory.mktemp("given")
        {"like BERT": like_bert, "like Llama": like_llama}[request.param]().save_pretrained(given)
        own = tokenizers.with_mask(tokenizers.load(str(given)))
    elif request.param == "MiniLM":
        if not os.environ.get("CONCEPTRON_REAL_WEIGHTS"):
            pytest.skip("CONCEPTRON_REAL_WEIGHTS names no folder of all-MiniLM-L6-v2")
        own = tokenizers.load(os.environ["CONCEPTRON_REAL_WEIGHTS"])
    else:
        root = os.environ.get("CONCEPTRON_DATA")
        if not root or not (Path(root) / "tokenizers" / request.param).is_dir():
            pytest.skip("CONCEPTRON_DATA names no folder with tokenizers")
        own = tokenizers.with_mask(tokenizers.load(f"{root}/tokenizers/{request.param}"))
    folder = tmp_path_factory.mktemp("model")
    tokenizers.for_use(own, 12).save_pretrained(folder)
    return request.param, tokenizers.describe(own, "here"), folder


def test_a_call_gives_what_training_showed(vocabulary):
    _, trained, folder = vocabulary
    loaded = AutoTokenizer.from_pretrained(folder)
    for text in (FIRST, f"{SECOND}\n  two  spaces", "", "été"):
        assert loaded(text)["input_ids"] == trained.encode([text])[0]
    assert set(loaded(FIRST)) == {"input_ids", "attention_mask"}


def test_a_pair_has_one_separator_and_nothing_else(vocabulary):
    name, trained, folder = vocabulary
    loaded = AutoTokenizer.from_pretrained(folder)
    first, second = trained.encode([FIRST, SECOND])
    joined = loaded(FIRST, SECOND)["input_ids"]
    assert joined == [*first, loaded.sep_token_id, *second] and loaded.sep_token_id is not None
    assert loaded.sep_token == SEPARATORS.get(name, loaded.eos_token)


def test_texts_end_where_training_did_and_pad(vocabulary):
    _, trained, folder = vocabulary
    loaded = AutoTokenizer.from_pretrained(folder)
    batch = loaded([FIRST * 9, FIRST], padding=True, truncation=True, return_tensors="pt")
    (short,) = trained.encode([FIRST])
    assert loaded.model_max_length == 12 and batch["input_ids"].shape == (2, 12)
    assert batch["attention_mask"].sum(1).tolist() == [12, len(short)]
    assert batch["input_ids"][1, : len(short)].tolist() == short


def test_the_mask_takes_the_space_before_it_as_generate_does(vocabulary):
    _, trained, folder = vocabulary
    loaded = AutoTokenizer.from_pretrained(folder)
    text = f"A {loaded.mask_token} flies, {loaded.mask_token}{loaded.mask_token}."
    assert loaded(text)["input_ids"] == read(text, trained)


def test_it_is_the_same_vocabulary(vocabulary):
    _, trained, folder = vocabulary
    again = tokenizers.describe(AutoTokenizer.from_pretrained(folder), "there")
    assert again.tokens.mask_id == trained.tokens.mask_id and again.tokens.vocab_size == trained.tokens.vocab_size
    assert again.tokenizer.get_vocab() == trained.tokenizer.get_vocab()


def test_end_to_end(vocabulary):
    """A pair through a pipeline is the pair that training would have packed; so is what is filled in."""
    _, trained, folder = vocabulary
    loaded = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = ConceptConfig(
        vocab_size=trained.tokens.vocab_size, hidden_size=16, num_concepts=4, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16, num_decoder_layers=1, mask_token_id=trained.tokens.mask_id,
        num_labels=2, initializer_range=1.0,
    )  # fmt: skip
    judge = ConceptForSequenceClassification(config).eval().requires_grad_(False)
    judge.classifier.weight.data.normal_()
    found = pipeline("text-classification", judge, tokenizer=loaded, device="cpu")
    first, second = trained.encode([FIRST, SECOND])
    want = judge(torch.tensor([[*first, loaded.sep_token_id, *second]])).logits.softmax(-1).max()
    assert found({"text": FIRST, "text_pair": SECOND})["score"] == pytest.approx(float(want), abs=1e-5)
    writer = ConceptForMaskedLM(config).eval().requires_grad_(False)
    text = f"A {loaded.mask_token} flies."
    ids = torch.tensor([read(text, trained)])
    scores = writer(ids).logits[0, int((ids[0] == trained.tokens.mask_id).nonzero())].softmax(-1)
    best = pipeline("fill-mask", writer, tokenizer=loaded, device="cpu")(text, top_k=1)[0]
    assert best["token"] == int(scores.argmax()) and best["score"] == pytest.approx(float(scores.max()), abs=1e-5)


@pytest.mark.parametrize("place, found", [
    ("empty", "no tokenizer.json in this folder"), ("file", "expected a folder, got a file"),
    ("link", "a link to nowhere, which is not there"), ("/no/where", "no such folder here; give a folder"),
    ("", "no such folder here"), ("org/none", "no such folder here, and it cannot be fetched from the hub"),
    ("broken", "the tokenizer cannot be loaded"),
])  # fmt: skip
def test_places_where_no_tokenizer_is(place, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "broken"):
        Path(name).mkdir()
    Path("broken/tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": []}}')
    Path("file").write_text("x")
    os.symlink("nowhere", "link")
    with pytest.raises(InputError) as caught:
        tokenizers.load(place)
    said = str(caught.value)
    assert said.startswith("data.tokenizer: ") and found in said and "\n" not in said
