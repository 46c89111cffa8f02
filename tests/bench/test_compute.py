"""More or less computation at test time: the rows, on models whose answers do not depend on it or do in a known way."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from conceptron.bench import compute
from conceptron.bench.analysis.subject import reader
from conceptron.bench.measure.timing import Timing
from conceptron.engine.data import tokenizer
from conceptron.engine.data.windows import Part, Windows
from conceptron.engine.errors import InputError
from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.objectives import MaskedLM, SpecialTokens

SHAPE = dict(
    vocab_size=60, hidden_size=16, num_concepts=6, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
    num_decoder_layers=1, mask_token_id=0,
)  # fmt: skip


def build(**options) -> ConceptForMaskedLM:
    torch.manual_seed(0)
    return ConceptForMaskedLM(ConceptConfig(**{**SHAPE, **options})).eval()


def loader():
    ids = np.random.default_rng(0).integers(1, 60, 160)
    windows = Windows([Part(ids, np.arange(8) * 20, np.full(8, 20, dtype=np.int32))])
    return reader(windows, MaskedLM(), SpecialTokens(mask_id=0, special_ids=frozenset({0}), vocab_size=60))


@pytest.mark.parametrize("kind", ["cross", "slot"])
def test_iterations_of_a_layer_that_has_converged(kind):
    """A tied layer that writes nothing into the concepts: every K gives the same, and nothing moves."""
    model = build(tie_layers=True, layer_kind=kind, slot_update="residual")
    for layer in model.encoder.layers:
        for name, parameter in layer.named_parameters():
            if name.startswith(("mix.out", "feed.down", "read.out", "update.out")):
                torch.nn.init.zeros_(parameter)
    rows = compute.sweep_iterations(model, loader(), [1, 3, 12], 0.01)
    assert [row["value"] for row in rows] == [1, 3, 12] and all(row["trained"] == 3 for row in rows)
    assert all(row["change"] == 0 for row in rows)
    assert [row["nll"] for row in rows] == pytest.approx([rows[0]["nll"]] * 3)
    assert all(isinstance(row["ms"], Timing) and row["ms"].median_ms > 0 for row in rows)


def test_the_trained_number_is_what_the_model_does_by_itself():
    model, text = build(tie_layers=True, block_norm="sandwich"), loader()
    rows = {row["value"]: row for row in compute.sweep_iterations(model, text, [1, 3], 0.01)}
    _, readings = compute.does.read(model, text, 4096)
    assert rows[3]["nll"] == pytest.approx(compute.does.mean(compute.does.ask(model, readings)), rel=1e-6)
    assert rows[1]["nll"] != pytest.approx(rows[3]["nll"], rel=1e-6) and rows[1]["change"] > 0


def test_fewer_concepts_are_those_that_the_decoder_would_get():
    model, text = build(nested_concepts=True), loader()
    rows = compute.sweep_concepts(model, text, [1, 4, 6], 0.01)
    _, (reading,) = compute.does.read(model, text, 4096)
    for row in rows:
        with torch.no_grad():
            nll = model(view=reading.view, num_concepts=row["value"], return_nll=True).nll[reading.asked]
        assert row["nll"] == pytest.approx(float(nll.double().mean()), rel=1e-6)
    assert rows[-1]["trained"] == 6 and rows[0]["change"] is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("compute")
    text = "The reader opens a file and returns its lines one by one. Every thread waits until the lock is released. "
    words = tokenizer.train([text] * 20, 300)
    tokens = tokenizer.describe(words, "words").tokens
    sizes = dict(vocab_size=tokens.vocab_size, mask_token_id=tokens.mask_id)
    models = {
        "both": build(**sizes, tie_layers=True, nested_concepts=True), "neither": build(**sizes),
        "encoder": ConceptEncoder(ConceptConfig(**{**SHAPE, **sizes}, tie_layers=True)),
    }  # fmt: skip
    for name, model in models.items():
        model.save_pretrained(place / name)
        words.save_pretrained(place / name)
    for i in range(6):
        (place / f"{i}.txt").write_text(text[i:] * 2)
    return place


def ask(folder, name, out, **options):
    given = dict(path=str(folder / name), text=[str(folder / "*.txt")], iterations=None, concepts=None, seconds=0.01)
    return compute.main(argparse.Namespace(**{**given, "out": out, **options}))


def test_one_command_one_plot(folder, tmp_path, capsys):
    assert ask(folder, "both", tmp_path / "out", iterations=[2, 5], concepts=[2]) == 0
    rows = json.loads((tmp_path / "out" / "compute.json").read_text())["rows"]
    assert [(row["what"], row["value"]) for row in rows] == [("K", 2), ("K", 3), ("K", 5), ("C", 2), ("C", 6)]
    assert (tmp_path / "out" / "compute.png").stat().st_size > 10_000 and (tmp_path / "out" / "compute.svg").is_file()
    assert "| K | 5 | 3 |" in capsys.readouterr().out


def test_what_cannot_be_swept_is_said(folder, tmp_path):
    with pytest.raises(InputError, match="neither K nor C"):
        ask(folder, "neither", tmp_path / "out")
    with pytest.raises(InputError, match="without a decoder"):
        ask(folder, "encoder", tmp_path / "out")
    with pytest.raises(InputError, match=r"--concepts: expected 1 to the model's C = 6, got 9"):
        ask(folder, "both", tmp_path / "out", concepts=[9])
    assert not (tmp_path / "out").exists()
