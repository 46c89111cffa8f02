"""The runner on a table of two rows and two seeds, and the summary on figures made up to have known answers."""

import json
import math

import pytest
import yaml

from conceptron.__main__ import perform
from conceptron.bench import ablation
from conceptron.bench.ablation import Measure, cells_of, read_table, write_recipes
from conceptron.bench.analysis import yardsticks
from conceptron.bench.documents.table import BETTER, COLUMNS, WORSE, summarize, verdict
from conceptron.bench.measure.results import read_results
from conceptron.bench.report import derive
from conceptron.engine.data import tokenizer
from conceptron.engine.errors import InputError

WORDS = ["concept", "token", "reads", "writes", "the", "a", "of", "encoder", "decoder", "slowly", "again", "text"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of two tiny rows over a folder of made-up text."""
    folder = tmp_path_factory.mktemp("ablation")
    for i in range(40):
        words = [WORDS[(i * j * j + j) % len(WORDS)] for j in range(20 + 3 * i)]
        (folder / f"{i:02d}.txt").write_text(" ".join(words))
    tokenizer.save(tokenizer.train((path.read_text() for path in folder.glob("*.txt")), 300), folder / "tokenizer")
    model = {"hidden_size": 16, "num_concepts": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 16, "num_decoder_layers": 1}  # fmt: skip
    content = {
        "base": {
            "model": model, "objective": {"name": "tsdae"}, "optim": {"lr": 3e-3},
            "data": {"source": str(folder), "tokenizer": str(folder / "tokenizer"), "window": 32, "validation": 0.3,
                     "cache": str(folder / "cache")},
            "batch": {"tokens": 128, "micro_tokens": 128}, "train": {"steps": 3, "precision": "fp32"},
            "eval": {"every": 0, "tokens": 64}, "checkpoint": {"every": 0},
        },
        "seeds": [0, 1],
        "measure": {"tokens": 512, "texts": 8},
        "rows": [
            {"name": "first", "change": "nothing"},
            {"name": "second", "change": "noisy", "set": {"objective": {"name": "diffusion"}}},
        ],
    }  # fmt: skip
    path = folder / "table.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def changed(table, tmp_path, **fields):
    content = yaml.safe_load(table.read_text()) | fields
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def count_trainings(monkeypatch) -> list[str]:
    """Names of the cells that are really run."""
    ran, run_cell = [], ablation.run_cell
    monkeypatch.setattr(ablation, "run_cell", lambda cell, *rest: ran.append(cell.name) or run_cell(cell, *rest))
    return ran


@pytest.fixture(scope="module")
def half(table, tmp_path_factory):
    """The folder of a table whose last two cells are missing, and what the command printed."""
    out = tmp_path_factory.mktemp("out")
    assert perform(["bench", "ablation", str(table), "--workers", "0", "--threads", "1", "--out", str(out)]) == 0
    for cell in ("first-seed1", "second-seed1"):
        (out / "cells" / f"{cell}.json").unlink()
    return out


def test_every_cell_is_measured_and_the_table_written(table, half):
    rows, environment = read_results(half / "cells.json")
    assert [(row["row"], row["seed"], row["status"]) for row in rows] == [
        ("first", 0, "measured"), ("second", 0, "measured"), ("first", 1, "measured"), ("second", 1, "measured"),
    ]  # fmt: skip
    assert environment["torch"] and environment["command"]
    for row in rows:
        assert all(math.isfinite(row[column.key]) for column in COLUMNS)
        assert 0 <= row["accuracy_deleted"] <= 1 and row["chance"] == pytest.approx(1 / 8)
        assert row["heldout_nll"] == pytest.approx(math.log(300), rel=0.2)  # hardly trained: near a uniform guess
    summary, _ = read_results(half / "ablation.json")
    lines = [(line["row"], line["against"], line["seeds"]) for line in summary]
    assert lines == [("first", "", 2), ("second", "first", 2)]
    assert "±" in summary[0]["hidden NLL"] and "R@1 of a guess 12.5 %" in (half / "ablation.md").read_text()
    for name in ("cells.csv", "ablation.csv", "ablation.md", "ablation.png", "ablation.svg"):
        assert (half / name).stat().st_size > 0
    assert not list(half.glob("runs/*/checkpoints")) and len(list(half.glob("runs/*/model/config.json"))) == 4


def test_a_half_finished_table_goes_on_where_it_stopped(table, half, monkeypatch, capsys):
    kept = (half / "cells" / "first-seed0.json").read_text()
    ran = count_trainings(monkeypatch)
    assert perform(["bench", "ablation", str(table), "--workers", "0", "--threads", "1", "--out", str(half)]) == 0
    assert ran == ["first-seed1", "second-seed1"]
    assert "2 of 4 cells are finished" in capsys.readouterr().out
    assert (half / "cells" / "first-seed0.json").read_text() == kept
    with pytest.raises(InputError, match=r"first-seed0.json: was made with train.steps = 3, now it is 4"):
        perform(["bench", "ablation", str(table), "train.steps=4", "--workers", "0", "--out", str(half)])


def test_no_cell_starts_after_its_time(table, tmp_path, capsys):
    assert perform(["bench", "ablation", str(table), "--workers", "0", "--minutes", "0", "--out", str(tmp_path)]) == 1
    rows, _ = read_results(tmp_path / "cells.json")
    assert {row["status"] for row in rows} == {"not started"}


def test_one_failing_cell_is_told_and_the_others_run(table, tmp_path, monkeypatch, capsys):
    measure = yardsticks.measure

    def broken(subject, *sizes):
        if subject.name == "second-seed0":
            raise ArithmeticError("out of luck")
        return measure(subject, *sizes)

    monkeypatch.setattr(yardsticks, "measure", broken)
    path = changed(table, tmp_path, seeds=[0])
    options = ["--workers", "0", "--threads", "1", "--out", str(tmp_path / "out")]
    assert perform(["bench", "ablation", str(path), *options]) == 1
    assert "second seed 0: ArithmeticError: out of luck" in capsys.readouterr().out
    summary, _ = read_results(tmp_path / "out" / "ablation.json")
    assert [(line["seeds"], line["missing"]) for line in summary] == [
        (1, ""), (0, "seed 0: ArithmeticError: out of luck"),
    ]  # fmt: skip
    assert summary[1]["hidden NLL"] is None


def test_rows_build_on_each_other(table, tmp_path):
    rows = [
        {"name": "a", "change": "-"},
        {"name": "b", "change": "-", "set": {"model.num_concepts": 6}},
        {"name": "c", "change": "-", "set": {"train.steps": 5}},
        {"name": "d", "change": "-", "against": "a", "set": {"objective": {"name": "mlm", "probability": 0.4}}},
    ]
    made = write_recipes(read_table(changed(table, tmp_path, rows=rows)), ["optim.lr=0.5"], tmp_path / "recipes")
    assert [(row.name, row.against) for row in made] == [("a", None), ("b", "a"), ("c", "b"), ("d", "a")]
    recipes = {cell.row.name: cell.recipe for cell in cells_of(made, [7], tmp_path)}
    assert {name: recipe.model["num_concepts"] for name, recipe in recipes.items()} == {"a": 4, "b": 6, "c": 6, "d": 4}
    assert {name: recipe.train.steps for name, recipe in recipes.items()} == {"a": 3, "b": 3, "c": 5, "d": 3}
    assert recipes["d"].objective["probability"] == 0.4 and recipes["d"].run.seed == 7
    assert all(recipe.optim.lr == 0.5 for recipe in recipes.values())


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"rows": [{"name": "a", "change": "-"}, {"name": "a", "change": "-"}]}, "rows.1.name: 'a' is the name"),
        ({"rows": [{"name": "a", "change": "-", "against": "b"}]}, "rows.0.against: expected an earlier row"),
        ({"rows": [{"name": "a", "chance": "-"}]}, "did you mean rows.0.change?"),
        ({"seeds": []}, "seeds"),
    ],
)
def test_a_wrong_table_is_refused_in_one_line(table, tmp_path, fields, line):
    with pytest.raises(InputError) as caught:
        read_table(changed(table, tmp_path, **fields))
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_row_is_refused_before_anything_is_trained(table, tmp_path, monkeypatch):
    ran = count_trainings(monkeypatch)
    rows = [{"name": "a", "change": "-"}, {"name": "b", "change": "-", "set": {"model.num_concept": 3}}]
    with pytest.raises(InputError, match=r"did you mean model\.num_concepts"):
        perform(["bench", "ablation", str(changed(table, tmp_path, rows=rows)), "--out", str(tmp_path / "out")])
    assert not ran


def test_a_difference_is_marked_when_it_is_beyond_the_spread():
    assert verdict([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], -1) == BETTER
    assert verdict([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], 1) == WORSE
    assert verdict([1.0, 3.0, 2.0], [2.0, 4.0, 3.0], 1) == ""  # the means differ by one standard deviation
    assert verdict([1.0], [2.0, 2.1], 1) == "" and verdict([], [], 1) == ""
    assert verdict([1.0, 1.0], [1.0, 1.0], 1) == "" and verdict([1.0, 1.0], [2.0, 2.0], 1) == WORSE
    # Welch: t = 1 / sqrt(2 * 0.25 / 3) = 2.449 with 4 degrees of freedom, of which 2.776 is the 5 % point
    assert verdict([0.5, 1.0, 1.5], [1.5, 2.0, 2.5], 1) == ""
    assert verdict([0.5, 1.0, 1.5], [1.7, 2.2, 2.7], 1) == WORSE  # t = 2.939


def cells(row, against, nll, accuracy):
    made = {"row": row, "against": against, "change": "something", "status": "measured", "num_parameters": 2e6}
    return [{**made, "seed": i, "heldout_nll": nll + x, "accuracy_kept": accuracy}
            for i, x in enumerate((-0.1, 0.0, 0.1))]  # fmt: skip


def test_the_summary_says_what_was_measured():
    first, second = summarize([*cells("a", None, 5, 0.5), *cells("b", "a", 4, 0.4)])
    assert first["hidden NLL"] == "5.000 ± 0.100" and second["hidden NLL"] == f"4.000 ± 0.100 {BETTER}"
    assert second["kept right %"] == f"40.0 ± 0.0 {WORSE}" and second["M parameters"] == "2.00"
    assert (second["better"], second["worse"], second["dynamic rank"]) == ("hidden NLL", "kept right %", None)


def test_a_report_writes_the_table_anew_from_the_cells(half):
    before = (half / "ablation.json").read_bytes()
    for path in half.glob("ablation.*"):
        path.unlink()
    derive(half / "cells.json")
    assert (half / "ablation.json").read_bytes() == before and (half / "ablation.png").stat().st_size > 0


def test_a_cell_knows_what_it_was_made_with(table, tmp_path):
    cells = cells_of(write_recipes(read_table(table), [], tmp_path), [0, 1], tmp_path)
    a, b = (ablation.made_with(cell, Measure()) for cell in cells[::2])
    assert {key for key in a if a[key] != b[key]} == {"run.seed"}
    assert json.loads(json.dumps(a)) == a
