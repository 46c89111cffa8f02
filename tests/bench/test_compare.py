"""Runs side by side."""

import argparse
import json
from pathlib import Path

import pytest

from conceptron.bench import compare
from conceptron.bench.documents import beside
from conceptron.engine.errors import InputError


def make_run(folder: Path, *, nll=6.0, entropy=6.5, name=None, steps=3) -> Path:
    (folder / "report").mkdir(parents=True)
    lines = [{"kind": "train", "step": i, "loss": nll, "tokens": 100 * i} for i in range(1, steps + 1)]
    lines += [{"kind": "eval", "step": i, "nll_unseen": nll + 1 / i, "nll_seen": None} for i in (1, steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "name": name or folder.name, "text": "some text", "num_parameters": 1000, "unigram_entropy": entropy,
        "losses": {"heldout_nll": nll, "unigram_entropy": entropy, "nll_of_other_concepts": nll + 0.5},
        "geometry": {"num_concepts": 8, "static_fraction": 0.1, "rank_dynamic": nll},
        "training": {"steps": steps, "tokens": 300, "train_seconds": 2.0}, "does": {"figures": {"used_slots": 8}},
    }  # fmt: skip
    (folder / "report" / "summary.json").write_text(json.dumps(summary))
    return folder


def ask(*runs, **options):
    return compare.runs(argparse.Namespace(**{"runs": list(runs), "seeds": False, "out": None, **options}))


def line_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(start))


def test_side_by_side(tmp_path, capsys):
    assert ask(make_run(tmp_path / "a", nll=6.0), make_run(tmp_path / "b", nll=5.0)) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].split() == ["a", "b"]
    assert line_of(text, "NLL of tokens that the encoder did not see").split()[-2:] == ["6", "5*"]
    assert line_of(text, "how far below").split()[-2:] == ["0.5", "1.5*"]
    assert line_of(text, "entropy rank of what").split()[-2:] == ["6*", "5"]
    assert line_of(text, "concepts that are missed").split()[-2:] == ["8", "8"]  # as good, so no star
    assert "passed of measured" in text and "do not compare" not in text and "†" not in text


def test_other_text_is_warned_of(tmp_path, capsys):
    assert ask(make_run(tmp_path / "a"), make_run(tmp_path / "b", entropy=7.0)) == 0
    assert "their NLLs and entropies do not compare" in capsys.readouterr().out


def test_published_values_are_marked_and_never_best(tmp_path, capsys):
    assert ask(make_run(tmp_path / "a"), seeds=True) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].count("†") == 3 and "published in the planning documents" in text
    ranks = line_of(text, "the planning documents' rank").split()
    assert ranks[-3:] == ["5.07", "15.97", "10.1"]
    assert "*" not in line_of(text, "directions with 95 %")


def test_names_that_are_the_same_become_folders(tmp_path, capsys):
    ask(make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run"))
    first = capsys.readouterr().out.splitlines()[0]
    assert first.split() == [str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run")]


def test_written_as_page_and_tables(tmp_path, capsys):
    out = tmp_path / "out"
    ask(make_run(tmp_path / "a"), make_run(tmp_path / "b", nll=5.0), seeds=True, out=out)
    content = json.loads((out / "compare.json").read_text())
    row = next(row for row in content["rows"] if row["figure"] == "NLL of tokens that the encoder did not see")
    assert (row["a"], row["b"], row["best"]) == (6, 5, "b")
    page = (out / "compare.html").read_text()
    assert page.count("<svg") == 1 and "† diffusion, 2 layers" in page
    assert all((out / f"compare.{suffix}").stat().st_size > 500 for suffix in ("md", "csv"))


def test_bad_input(tmp_path):
    run = make_run(tmp_path / "a")
    with pytest.raises(InputError, match="expected two runs or more"):
        ask(run)
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="neither a run"):
        ask(run, tmp_path / "b")
    (tmp_path / "b" / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="no report yet; conceptron analyze"):
        ask(run, tmp_path / "b")


def test_every_line_has_a_figure_that_reports_know():
    names = [name for _, name, _, _ in beside.LINES]
    assert len(names) == len(set(names))
    known = {name for column in beside.published() for name in column.figures}
    assert known >= {"effective_rank", "similarity_mean", "dims_95"} and len(known & set(names)) >= 8
