"""Reports of a fabricated run and of bare checkpoints, whose figures are known."""

import contextlib
import io
import json
import math
import shutil

import numpy as np
import pytest
import torch

from conceptron.__main__ import perform
from conceptron.bench import analyze as report
from conceptron.bench.analysis import heldout
from conceptron.engine.data import tokenizer
from conceptron.engine.data.windows import Part, Windows
from conceptron.engine.errors import InputError
from conceptron.engine.recipe.load import load_recipe, save_recipe
from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.masked_lm import ConceptForMaskedLM, smoothing_floor
from conceptron.models.objectives import SpecialTokens

SENTENCES = (
    "The reader opens a file and returns its lines one by one.",
    "A matrix times a vector is a vector of the same height.",
    "If the key is missing the default value is returned instead.",
    "Every thread waits until the lock has been released.",
    "The gradient of a constant function is zero everywhere.",
    "Names that begin with an underscore are private to the module.",
)
SHAPE = dict(
    hidden_size=32, num_concepts=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
    num_decoder_layers=1,
)  # fmt: skip
RECIPE = """
run: {{name: small, folder: {folder}}}
model: {shape}
data: {{source: {folder}/text, tokenizer: {folder}/words, window: 64, cache: {folder}/cache}}
objective: {objective}
train: {{steps: 30, label_smoothing: {smoothing}}}
eval: {{tokens: 1500}}
"""


def documents(seed: int, count: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(SENTENCES[i] for i in generator.integers(len(SENTENCES), size=12)) for _ in range(count)]


def make_run(folder, *, objective="{name: mlm}", smoothing=0.0, uniform=True):
    """A run folder as the trainer leaves it, with an untrained model; ``uniform``: one whose every guess is 1 / V."""
    (folder / "text").mkdir(parents=True)
    for name, count in (("train", 60), ("validation", 30)):
        lines = [json.dumps({"text": text}) for text in documents(count, count)]
        (folder / "text" / f"{name}.jsonl").write_text("\n".join(lines))
    words = tokenizer.train(documents(0, 50), 400)
    words.save_pretrained(folder / "words")
    shape = SHAPE | {"timestep_conditioning": "diffusion" in objective}
    text = RECIPE.format(shape=shape, folder=folder, objective=objective, smoothing=smoothing)
    (folder / "recipe.in").write_text(text)
    recipe = load_recipe(folder / "recipe.in")
    run = folder / "small"
    run.mkdir()
    save_recipe(recipe, run / "recipe.yaml")
    tokens = tokenizer.describe(words, "words").tokens
    torch.manual_seed(0)
    config = ConceptConfig(**shape, vocab_size=tokens.vocab_size, mask_token_id=tokens.mask_id, pad_token_id=0)
    model = ConceptForMaskedLM(config)
    if uniform:
        torch.nn.init.zeros_(model.lm_head.weight)
        torch.nn.init.zeros_(model.lm_head.bias)
    model.save_pretrained(run / "model")
    words.save_pretrained(run / "model")
    history = [
        {"kind": "train", "step": i, "loss": 6 - i / 20, "tokens": 100 * i, "tokens_per_s": 50.0, "elapsed_s": 2.0 * i}
        for i in range(1, 31)
    ]
    seen = {"num_texts": 64, "rank_dynamic": 4.0, "static_fraction": 0.3, "similarity_mean": 0.2}
    history += [
        {"kind": "eval", "step": i, "nll_unseen": 6 - i / 25, "nll_seen": None, "concepts": seen} for i in (15, 30)
    ]
    history.append({
        "kind": "end", "step": 30, "train_seconds": 61.5, "tokens": 3000, "tokens_per_s": 49.0,
        "peak_memory_bytes": 3 * 2**20,
    })  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    where = {"device": "cpu", "num_threads": 1, "world_size": 2, "packages": {"torch": "x"}}
    (run / "environment.json").write_text(json.dumps(where))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs"))


def read(folder):
    return json.loads((folder / "summary.json").read_text())


def is_figure(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_report_of_a_run(run, capsys):
    folder = report.analyze(str(run))
    assert folder == run / "report"
    summary = read(folder)
    vocab_size = ConceptConfig.from_pretrained(run / "model").vocab_size
    assert summary["heldout_nll"] == pytest.approx(math.log(vocab_size), rel=1e-5)  # every guess is 1 / V
    assert summary["losses"]["nll_of_other_concepts"] == pytest.approx(math.log(vocab_size), rel=1e-5)
    assert 2 < summary["unigram_entropy"] < math.log(vocab_size)
    # the frequencies of other text of the same kind cannot beat those of the text itself
    assert summary["unigram_entropy"] < summary["losses"]["train_unigram"] < summary["unigram_entropy"] + 0.2
    assert 1 <= summary["effective_rank"] <= 8
    assert summary["train_seconds"] == 61.5
    assert set(summary["losses"]["nll_by_view"]) == {"mask=0.15", "mask=0.30", "mask=0.50"}
    assert summary["losses"]["num_unseen"] == summary["losses"]["num_targets"] > 0
    assert {gate["verdict"] for gate in summary["gates"]} == {"PASS", "FAIL", "UNKNOWN"}
    assert list(summary["does"]["nll"].values()) == pytest.approx([math.log(vocab_size)] * 4)
    assert summary["figures"]["used_slots"] == 0  # nothing depends on the concepts
    assert len(summary["reads"]["slots"]) == len(summary["does"]["slots"]) == 8
    probes = [probe["name"] for probe in summary["probes"]]
    assert probes == ["words", "length", "words here", "words elsewhere", "place"]
    assert all(is_figure(folder / f"{name}.png") for name in report.FIGURES)
    text = (folder / "report.md").read_text()
    for name in report.FIGURES:
        if name in ("clusters", "health"):
            continue  # on the page only
        assert f"]({name}.png)" in text
    assert "| **training time**, s | 61.5 | 30 steps, 3,000 tokens |" in text
    assert "unigram entropy" in text
    printed = capsys.readouterr().out
    assert "ABOVE the unigram entropy" in printed
    assert "1m01s on 2 CPU threads" in printed
    assert str(folder / "report.md") in printed
    assert str(folder / "summary.json") in printed


def test_report_agrees_with_the_engine(run):
    # the held-out figures are those that training writes into metrics.jsonl, by the same function on the same text
    from conceptron.engine.data.corpus import open_corpus
    from conceptron.engine.data.loader import Loader
    from conceptron.engine.jobs.evaluation import evaluate
    from conceptron.engine.launching.launch import World

    recipe = load_recipe(run / "recipe.yaml")
    corpus = open_corpus(recipe.data)
    sizes = dict(seed=5, tokens_per_step=recipe.batch.tokens, micro_tokens=recipe.batch.micro_tokens)
    loader = Loader(corpus.validation, recipe.build_objective(), corpus.tokens, **sizes)
    model = ConceptForMaskedLM.from_pretrained(run / "model")
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    trained = evaluate(model, loader, recipe.eval.tokens, World(0, 0, 1, torch.device("cpu")))
    subject = report.open_subject(run)
    subject.model.load_state_dict(model.state_dict())
    found = heldout.losses(subject.model, subject.loader, None, subject.num_tokens)
    assert found.heldout_nll == pytest.approx(trained["nll_unseen"], rel=1e-5)
    assert found.nll_by_view == pytest.approx(trained["nll_by_t"], rel=1e-5)
    assert found.num_targets == trained["num_targets"]
    assert not subject.model.training


def test_seen_targets_are_never_held_against_an_entropy(tmp_path, capsys):
    objective = "{name: diffusion, encoder_view: clean}"
    folder = report.analyze(make_run(tmp_path, objective=objective, smoothing=0.1))
    summary = read(folder)
    assert summary["heldout_nll"] is None
    assert summary["losses"]["heldout_nll_seen"] > 0
    text = (folder / "report.md").read_text()
    assert "**saw**: copying" in text
    assert "smoothed by 0.1" in text
    assert f"{smoothing_floor(0.1, summary_vocab(tmp_path)):.4f}" in text
    printed = capsys.readouterr().out
    assert "SAW (copying)" in printed
    assert "below" not in printed.lower().split("gates")[0]


def summary_vocab(folder) -> int:
    return ConceptConfig.from_pretrained(folder / "small" / "model").vocab_size


@pytest.fixture(scope="module")
def bare(run, tmp_path_factory):
    """The report of a bare checkpoint about a text beside it, and what was printed."""
    folder = tmp_path_factory.mktemp("bare")
    checkpoint, printed = shutil.copytree(run / "model", folder / "checkpoint"), io.StringIO()
    (folder / "some.txt").write_text(" ".join(documents(7, 20)))
    with contextlib.redirect_stdout(printed):
        assert perform(["analyze", str(checkpoint), "--text", str(folder / "some.txt")]) == 0
    return checkpoint / "report", printed.getvalue()


def test_bare_checkpoint_reads_given_text(run, bare):
    folder, printed = bare
    summary = read(folder)
    assert summary["heldout_nll"] == pytest.approx(math.log(summary_vocab(run.parent)), rel=1e-5)
    assert summary["train_seconds"] is None
    assert summary["losses"]["train_unigram"] is None
    assert "some.txt" in summary["text"]
    assert not (folder / "loss.png").exists()
    assert (folder / "nll.png").exists()
    assert "checkpoint" in printed


def test_encoder_without_decoder_has_concepts_only(run, bare, tmp_path):
    encoder = ConceptEncoder.from_pretrained(run / "model")
    checkpoint = tmp_path / "encoder"
    encoder.save_pretrained(checkpoint)
    for file in (run / "model").glob("token*"):
        shutil.copy(file, checkpoint)
    folder = report.analyze(checkpoint, [str(bare[0].parent.parent / "some.txt")])
    summary = read(folder)
    assert summary["heldout_nll"] is None
    assert summary["losses"] is None
    assert summary["samples"] == []
    geometry, of_whole = summary["geometry"], read(bare[0])["geometry"]
    assert geometry.pop("not_finite") == of_whole.pop("not_finite") == ["twonn_pooled", "twonn_slots"]  # of nine texts
    assert geometry == pytest.approx(of_whole)
    assert not (folder / "nll.png").exists()
    assert "no loss to measure" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: shutil.rmtree(run), "no such folder"),
        (lambda run: shutil.rmtree(run / "model"), "has not finished.*resume=auto"),
        (lambda run: (run / "recipe.yaml").unlink(), "neither a run folder"),
        (lambda run: (run / "metrics.jsonl").write_text('{"kind": "tr'), "metrics.jsonl: not a file of JSON lines"),
        (lambda run: (run / "report").write_text(""), "report: cannot be made"),
        (lambda run: (run / "model" / "model.safetensors").write_bytes(b"0123456789"), r"safetensors: damaged \(10"),
        (lambda run: one_concept(run), "two concepts or more, got one"),
        (lambda run: edit(run, "num_hidden_layers", 2), "weights are missing, encoder.layers.1"),
        (lambda run: edit(run, "num_concepts", 9), r"has shape \[8, 32\], the model \[9, 32\]"),
        (lambda run: edit(run, "model_type", "bert"), "expected model_type 'conceptron', got 'bert'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(run, tmp_path, break_it, message):
    copy = shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("report"))
    break_it(copy)
    with pytest.raises(InputError, match=message) as caught:
        report.analyze(copy)
    assert "\n" not in str(caught.value)


def edit(run, field, value):
    path = run / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))


def one_concept(run):
    model = ConceptForMaskedLM.from_pretrained(run / "model")
    ConceptForMaskedLM(ConceptConfig(**{**model.config.to_dict(), "num_concepts": 1})).save_pretrained(run / "model")


def test_foreign_tokenizer_is_refused(run, tmp_path):
    checkpoint = shutil.copytree(run / "model", tmp_path / "c")
    longer = [*documents(0, 50), "other words make more entries in the vocabulary " * 3]
    tokenizer.train(longer, 600).save_pretrained(checkpoint)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match="do not belong together"):
        report.analyze(checkpoint, [str(tmp_path / "a.txt")])


def test_samples_hide_words_and_change_nothing_else(run):
    subject = report.open_subject(run)
    torch.nn.init.normal_(subject.model.lm_head.weight, std=0.3)
    samples = heldout.samples(subject.model, subject.loader, subject.tokenizer, from_concepts=False)
    assert len(samples) == 3
    for sample in samples:
        plain = sample.source.replace("«", "").replace("»", "")
        assert plain in " ".join(SENTENCES * 5) or all(word in " ".join(SENTENCES) for word in plain.split()[1:-1])
        assert sample.hidden.count("__") == sample.num_hidden > 4
        assert 0 <= sample.num_right <= sample.num_hidden
        assert outside(sample.source) == outside(sample.filled)
        assert sample.source != sample.filled  # an untrained model does not guess ten words
        assert "[MASK]" not in sample.filled
    again = heldout.samples(subject.model, subject.loader, subject.tokenizer, from_concepts=False)
    assert again == samples
    copied = heldout.samples(subject.model, subject.loader, subject.tokenizer, from_concepts=True)[0]
    assert set(copied.hidden.split()) == {"__"}
    assert "from its concepts alone" in copied.how


def outside(text: str) -> list[str]:
    return [part.split("»")[-1].strip() for part in text.split("«")]


def test_hidden_words_are_whole():
    pieces = ["The", " re", "ader", " opens", "\n", " a", " file", "\n\n", " one", " by", " one", ".", " End"]
    shown = [0, 4, 7]  # the first has no space before it, the others are line ends
    for seed in range(20):
        is_hidden = heldout.hidden_words(pieces, np.random.Generator(np.random.Philox(seed)))
        assert is_hidden.any()
        assert is_hidden[1] == is_hidden[2], "a word is hidden whole or not at all"
        assert not is_hidden[shown].any()
    assert heldout.hidden_words(["a"] * 60, np.random.Generator(np.random.Philox(0))).sum() in (10, 11)


def test_unigram_cross_entropy_by_hand():
    tokens = SpecialTokens(mask_id=0, special_ids=frozenset({0}), vocab_size=4)
    text = np.array([1, 1, 2, 0, 1, 3], dtype=np.int64)
    windows = Windows([Part(text, np.array([0, 3]), np.array([3, 3], dtype=np.int32))])
    train, held_out = Windows([Part(text, np.array([0]), np.array([3], dtype=np.int32))]), windows
    # counts with one added: token 1: 3, token 2: 2, token 3: 1, of 6; the held-out text has 1 three times, 2 and 3 once
    expected = -(3 * math.log(3 / 6) + math.log(2 / 6) + math.log(1 / 6)) / 5
    assert heldout.unigram_cross_entropy(train, held_out, [0, 1], tokens) == pytest.approx(expected)
