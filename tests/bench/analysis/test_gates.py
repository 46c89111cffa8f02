"""Gates: read from YAML, judged against figures, printed with what to do next."""

import argparse
import json
import math

import pytest
import torch

from conceptron.bench import gate as command
from conceptron.bench.analysis import gates
from conceptron.bench.analysis.geometry import metrics
from conceptron.bench.analysis.known import figures_of, known_of
from conceptron.engine.errors import InputError

ROW = "{metric: rank_dynamic, means: m, above: {share: 0.25}, source: s, next: n}"


def write(folder, text):
    path = folder / "gates.yaml"
    path.write_text(text)
    return path


def test_one_row_a_metric():
    asked = gates.read_gates()
    for is_seed in (False, True):
        names = [gate.metric for gate in asked if gate.is_seed == is_seed]
        assert len(names) == len(set(names)) > 5
    assert all(t.source and t.next and t.sense in "<>" for gate in asked for t in gate.thresholds)
    rank = next(gate for gate in asked if gate.metric == "effective_rank")
    assert rank.is_seed and [t.at(128) for t in rank.thresholds] == [20, 30, 40, 50, 60, 64, 100]


def test_every_figure_that_is_asked_for_has_that_name():
    """A renamed metric must not turn its gate into "not measured"."""
    noise = torch.randn(64, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    figures = metrics.geometry(0.5 * noise + torch.eye(16, 32))
    history = [
        {"kind": "train", "step": 1, "loss": 2.0},
        {"kind": "eval", "step": 1, "nll_unseen": 3.0, "retrieval": 0.5, "num_pairs": 20},
    ]
    losses = {"heldout_nll": 2.0, "unigram_entropy": 3.0, "nll_of_other_concepts": 2.5}
    read = {"figures": {"usage_perplexity": 9.0, "js_divergence": 0.4}}
    own = {"reads": read, "does": {"figures": {"used_slots": 9}}}
    figures |= figures_of({"losses": losses, "objective": "mlm", **own}, history)
    assert figures["nll_below_unigram"] == 1 and figures["concept_nats"] == 0.5
    assert figures["retrieval_over_chance"] == 10 and figures["mlm_loss"] == 3
    unknown = {v.gate.metric for v in gates.judge(figures, 16, gates.read_gates()) if v.value is None}
    assert unknown == {
        "suffix_loss", "glue/stsb/pearson", "similarity/stsb/pearson", "glue/qqp/f1", "glue/mnli_matched/accuracy",
        "glue/mrpc/f1",
    }  # fmt: skip


def test_thresholds_follow_the_number_of_concepts(tmp_path):
    (gate,) = gates.read_gates(write(tmp_path, f"gates: [{ROW}]"))
    passed = gates.judge_one(gate, 17.0, 64)
    assert (passed.limits, passed.verdict, passed.reason) == ((16.0,), gates.PASS, "")
    failed = gates.judge_one(gate, 17.0, 128)
    assert (failed.limits, failed.verdict, failed.reason, failed.wanted) == ((32.0,), gates.FAIL, "n", "> 32")
    for missing in (None, math.nan):
        assert gates.judge_one(gate, missing, 128).verdict == gates.UNKNOWN


def test_several_thresholds_are_one_verdict(tmp_path):
    text = "seeds: [{metric: x, thresholds: [{below: 5, source: a, next: b}, {below: 3, source: c, next: d}]}]"
    (gate,) = gates.read_gates(write(tmp_path, text))
    verdict = gates.judge_one(gate, 4, 8)
    assert (verdict.in_short, verdict.source, verdict.reason) == ("FAIL 1 of 2", "c", "d")
    assert gates.judge_one(gate, 2, 8).in_short == "PASS 2 of 2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gates: [{metric: x, above: 1, source: s}]", r"gates row 1 \(x\): next: expected text"),
        ("gates: [{metric: x, source: s, next: n}]", "expected either above or below, got neither"),
        ("gates: [{metric: x, above: 1, below: 2, source: s, next: n}]", "got above and below"),
        ("gates: [{metric: x, above: true, source: s, next: n}]", "above: expected a number"),
        ("gates: [{metric: x, above: .nan, source: s, next: n}]", "above: expected a number"),
        ("gates: [{metric: x, above: 1, source: s, next: n, nxt: 3}]", "nxt: unknown; expected"),
        ("gates: [{metric: x, above: 1, source: s, next: n, thresholds: []}]", "either thresholds"),
        ("gates: [7]", "gates row 1: expected a metric"),
        ("other: []", "expected the sections gates and seeds"),
        ("gates: {}", "expected the sections gates and seeds"),
        ("- 1", "expected the sections gates and seeds"),
        ("a: [", "not YAML"),
    ],
)
def test_a_wrong_row_is_named_in_one_line(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as caught:
        gates.read_gates(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def make_run(folder, *, summary=None, loss=2.0):
    folder.mkdir(parents=True)
    lines = [{"kind": "train", "step": i, "loss": loss, "smoothing_floor": 1.4} for i in (1, 2)]
    lines.append({"kind": "bad_step", "step": 3})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if summary is not None:
        (folder / "report").mkdir()
        (folder / "report" / "summary.json").write_text(json.dumps(summary))
    return folder


def ask(run, **options):
    return command.main(argparse.Namespace(**{"run": run, "strict": False, "seeds": False, "file": None, **options}))


def test_the_command_tells_what_is_known_and_what_next(tmp_path, capsys):
    summary = {"geometry": {"num_concepts": 8, "static_fraction": 0.9, "rank_dynamic": 3.0, "effective_rank": 4.0}}
    run = make_run(tmp_path / "run", summary=summary)
    assert ask(run) == 0
    text = capsys.readouterr().out
    assert "FAIL     static_fraction        0.9, wanted < 0.8" in text
    assert "next: let concepts start from the text" in text
    assert "PASS     rank_dynamic           3, wanted > 2" in text
    assert "FAIL     bad_steps              1, wanted < 1" in text
    assert "PASS     loss_above_floor       0.6, wanted > 0.05" in text
    assert "UNKNOWN  used_slots" in text
    assert "effective_rank" not in text and "plan v2" not in text
    assert ask(run, seeds=True) == 0
    text = capsys.readouterr().out
    assert "FAIL 5 of 7 effective_rank" in text and "cannot both be meant" in text
    assert ask(run, strict=True) == 1


def test_strict_is_about_the_rows_that_are_shown(tmp_path, capsys):
    own = write(tmp_path, f"gates: [{ROW}]\nseeds: [{{metric: effective_rank, above: 100, source: s, next: n}}]")
    geometry = {"num_concepts": 8, "rank_dynamic": 3.0, "effective_rank": 4.0}
    run = make_run(tmp_path / "run", summary={"geometry": geometry})
    assert ask(run, strict=True, file=own) == 0
    assert ask(run, strict=True, file=own, seeds=True) == 1
    assert "1 pass, 0 fail, 0 unknown" in capsys.readouterr().out


def test_a_run_without_a_report_is_judged_on_what_there_is(tmp_path, capsys):
    run = make_run(tmp_path / "run", loss=1.41)
    assert ask(run, strict=True) == 1  # the loss lies at its floor
    text = capsys.readouterr().out
    assert "FAIL     loss_above_floor" in text and f"conceptron analyze {run}" in text
    assert known_of(run).num_concepts is None
    with pytest.raises(InputError, match="neither a run"):
        known_of(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        known_of(tmp_path / "nowhere")
    (run / "report").mkdir()
    (run / "report" / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"summary\.json: not JSON"):
        known_of(run)


def test_contradictions_carry_figures():
    first = gates.contradictions(128)[0]
    assert "rank 18.0" in first
    assert "0.0234" in first


def test_downstream_scores_are_figures_too(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    folder = run / "evaluate" / "glue" / "stsb"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"score": {"pearson": 0.65, "spearmanr": None}, "rows": []}))
    assert known_of(run).figures["glue/stsb/pearson"] == 0.65
    ask(run, seeds=True)
    assert "FAIL 2 of 4 glue/stsb/pearson" in capsys.readouterr().out
    (folder / "metrics.json").write_text("[]")
    with pytest.raises(InputError, match="conceptron evaluate writes it anew"):
        known_of(run)
