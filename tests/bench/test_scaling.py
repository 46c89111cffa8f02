import json

import pytest
import torch
from transformers import BertConfig, BertModel

from conceptron.__main__ import perform
from conceptron.bench.measure.allocator import allocator_peak
from conceptron.bench.measure.exponents import WINDOWED
from conceptron.bench.measure.peers import Perceiver, Shape, bert, modernbert
from conceptron.bench.scaling import (
    FULL,
    GROWING,
    ON_BACKBONE,
    OURS,
    PERCEIVER,
    UNPADDED,
    WHOLE_BACKBONE,
    WINDOWED_TRAINED,
    encoders,
    expected,
    grown_concepts,
    make_batch,
    measure,
    parse_variant,
    too_much,
    verdicts,
)  # fmt: skip
from conceptron.engine.errors import InputError

TINY = Shape(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, vocab_size=128, max_tokens=128)


def test_concepts_grow_as_in_the_roadmap():
    assert [grown_concepts(n) for n in (512, 4096, 32768)] == [128, 512, 2048]


def test_all_encoders_read_the_same_batch():
    """Each gives finite hidden states, and padding does not reach the real tokens of the padded ones."""
    names = (OURS, GROWING, FULL, UNPADDED, PERCEIVER)
    device = torch.device("cpu")
    batch = make_batch(64, TINY.vocab_size, device)
    assert batch.num_tokens == 64 + 48
    built = encoders(TINY, device)
    for name in names:
        module, call = built[name](64)(batch)
        module.eval()
        with torch.no_grad():
            out = call()
        assert torch.isfinite(out).all(), name
    full, one_by_one = (built[name](64)(batch) for name in (FULL, UNPADDED))
    with torch.no_grad():
        padded, separate = full[1](), one_by_one[1]()
    real = torch.cat([padded[0], padded[1, :48]])
    assert torch.allclose(real, separate, atol=1e-5)


def test_peers_have_the_width_that_was_asked_for():
    for build in (bert, modernbert, lambda shape: Perceiver(shape, 16)):
        module = build(TINY)
        assert any(p.shape == (TINY.vocab_size, TINY.hidden_size) for p in module.parameters())
        layers = module.encoder.layer if hasattr(module, "encoder") else module.layers
        assert len(layers) == TINY.num_layers


CPU = torch.device("cpu")
QUICK = {"budget_s": 0.01, "limit_s": 60.0, "report": lambda text: None}


def test_measure_skips_what_would_take_too_long():
    rows = measure(TINY, [32, 64, 128], CPU, [OURS], **QUICK | {"limit_s": 1e-9})
    first, second, third = (row for row in rows if row["phase"] == "train")
    assert first["time_ms"] > 0 and first["time_ms_samples"] >= 3 and first["peak_bytes"] > 0
    assert second["status"].startswith("not run: expected about") and second["time_ms"] is second["peak_bytes"] is None
    assert third["status"] == second["status"], "what was skipped once stays skipped, for the same reason"


SMALL = {"config": {"model_type": "bert", "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2,
                    "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64},
         "prefix": [2], "suffix": [3], "name": "small"}  # fmt: skip


def test_a_backbone_in_windows_and_in_full_attention():
    """Texts longer than its table of positions are read by both; a frozen one gets no gradient, a trained one does."""
    rows = measure(TINY, [128], CPU, ON_BACKBONE, **QUICK, backbone=SMALL)
    assert [row["encoder"] for row in rows] == [*ON_BACKBONE] * 2 and all(row["time_ms"] > 0 for row in rows)
    assert [row["C"] for row in rows[:3]] == [128, 128, None]
    assert len(verdicts(rows)) == 4
    built, batch = encoders(TINY, CPU, backbone=SMALL), make_batch(128, TINY.vocab_size, CPU)
    for name, is_trained in ((WINDOWED, False), (WINDOWED_TRAINED, True), (WHOLE_BACKBONE, True)):
        module, encode = built[name](128)(batch)
        encode().square().mean().backward()
        module = module if name == WHOLE_BACKBONE else module.backbone.model
        assert is_trained == (module.get_input_embeddings().weight.grad is not None)


def test_a_backbone_is_a_folder(tmp_path, capsys):
    BertModel(BertConfig(**{name: value for name, value in SMALL["config"].items() if name != "model_type"})
              ).save_pretrained(tmp_path / "small")  # fmt: skip
    argv = ["bench", "scaling", "--backbone", str(tmp_path / "small"), "--min-tokens", "96", "--max-tokens", "192",
            "--seconds", "0.01", "--out", str(tmp_path / "out")]  # fmt: skip
    assert perform([*argv, "--only", WINDOWED, WHOLE_BACKBONE]) == 0
    written = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert written["environment"]["backbone"] == "small" and written["environment"]["width"] == 32
    assert {(row["encoder"], row["N"]) for row in written["rows"]} == {
        (name, n) for name in (WINDOWED, WHOLE_BACKBONE) for n in (96, 192)
    }
    assert f"{WINDOWED} is " in capsys.readouterr().out
    with pytest.raises(InputError, match=f"there is no encoder 'concept'; there are {WINDOWED}, "):
        perform([*argv, "--only", OURS])
    with pytest.raises(InputError, match="--backbone: /no/where: no such folder"):
        perform(["bench", "scaling", "--backbone", "/no/where"])


def test_measure_goes_on_where_it_was_cut():
    saved = []
    whole = measure(TINY, [32], CPU, [OURS, PERCEIVER], **QUICK, save=lambda rows: saved.append(len(rows)))
    assert saved == [2, 4], "rows are written after every length and phase"
    kept = whole[:3]  # cut in the middle of a phase
    again = measure(TINY, [32], CPU, [OURS, PERCEIVER], **QUICK, earlier=kept)
    assert again[:3] == kept
    keys = [(row["encoder"], row["phase"], row["N"]) for row in again]
    assert sorted(keys) == sorted((row["encoder"], row["phase"], row["N"]) for row in whole)
    assert len(set(keys)) == len(keys) == 4


def test_a_long_call_is_made_once(monkeypatch):
    import conceptron.bench.scaling as scaling

    calls = []
    real = scaling.phase_call
    monkeypatch.setattr(scaling, "ONCE_S", 0.0)

    def counted(*arguments):
        call = real(*arguments)
        return lambda: calls.append(1) or call()

    monkeypatch.setattr(scaling, "phase_call", counted)
    rows = measure(TINY, [32], CPU, [OURS], **QUICK)
    assert len(calls) == 2 and [row["time_ms_method"] for row in rows] == ["once", "once"]


def grown(values, quantity="time_ms", phase="train"):
    return [{"encoder": OURS, "phase": phase, "N": 512 * 2**i, quantity: value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "needs"),
    [([], 0.0), ([5.0], 20.0), ([5.0, 20.0], 80.0), ([5.0, 10.0], 20.0), ([5.0, 5.1], 10.2), ([5.0, 40.0], 320.0)],
)
def test_what_the_next_length_will_need(values, needs):
    assert expected(grown(values), OURS, "train", "time_ms") == pytest.approx(needs)


def test_what_does_not_fit_in_memory_is_not_run(monkeypatch):
    import conceptron.bench.scaling as scaling

    monkeypatch.setattr(scaling, "free_bytes", lambda device: 8 * 2**30)
    rows = [row | {"time_ms": 1.0} for row in grown([2**30, 2**32], "peak_bytes")]
    assert too_much(rows, OURS, "train", 60.0, CPU) == "not run: expected about 16.0 GiB, 8.0 GiB free"
    assert too_much(rows[:1], OURS, "train", 60.0, CPU) is None
    failed = [row | {"time_ms": None, "status": "OutOfMemoryError: no room"} for row in rows]
    assert too_much(failed, OURS, "train", 60.0, CPU) == "not run: N = 1024 ended with OutOfMemoryError: no room"


def test_variants_are_lines_of_their_own():
    assert parse_variant("layer_kind=slot,nested_concepts=true,funnel=[0,2],num_token_layers=3") == {
        "layer_kind": "slot", "nested_concepts": True, "funnel": [0, 2], "num_token_layers": 3,
    }  # fmt: skip
    for text in ("layer_kind", "nonsense=3"):
        with pytest.raises(ValueError, match="field=value"):
            parse_variant(text)
    rows = measure(TINY, [32], CPU, [OURS, "intermediate_size=32", PERCEIVER], **QUICK)
    assert [row["encoder"] for row in rows if row["phase"] == "train"] == [OURS, "intermediate_size=32", PERCEIVER]
    assert [line.split(" is ")[0] for line in verdicts(rows)] == [
        f"{phase}: {name}" for name in (OURS, "intermediate_size=32") for phase in ("forward", "train")
    ]


def test_allocator_peak_counts_what_lives_at_once():
    def call():
        a = torch.zeros(1 << 18)  # 1 MiB
        b = a + 1
        del a
        return b + 1

    assert allocator_peak(call, "cpu").extra_bytes == pytest.approx(2 << 20, rel=0.01)
