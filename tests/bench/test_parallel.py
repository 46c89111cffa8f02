"""Bytes and FLOPs of one text over several GPUs, against counts made by hand."""

from conceptron.__main__ import perform
from conceptron.bench import parallel
from conceptron.bench.measure.results import read_results
from conceptron.bench.parallel import Text

TEXT = Text(tokens=1000, width=8, heads=4, concepts=3)


def test_counts_by_hand():
    # forward: from one other GPU 3 rows of 8 16-bit numbers and 4 log-sum-exps; backward: a ring sends half, twice
    assert parallel.concept_bytes(TEXT, 2) == 3 * (8 * 2 + 4 * 4) + 3 * 8 * 4
    # queries, keys, values and what was read, of 500 tokens, half of which stay; twice
    assert parallel.ulysses_bytes(TEXT, 2) == 8 * 250 * 8 * 2
    assert parallel.ulysses_bytes(TEXT, 8) is None
    assert parallel.ring_bytes(TEXT, 2) == 1000 * 8 * (2 + 2 + 4)
    assert parallel.concept_flops(TEXT, 2) == 3 * (4 * 500 * 64 + 4 * 3 * 500 * 8)
    assert parallel.full_flops(TEXT, 1) == 3 * 8 * 1000 * 64 + 14 * 1000**2 * 8


def test_what_concepts_send_does_not_depend_on_the_text():
    longer = TEXT._replace(tokens=10**9)
    assert parallel.concept_bytes(longer, 64) == parallel.concept_bytes(TEXT, 64)
    assert parallel.ring_bytes(longer, 64) == 10**6 * parallel.ring_bytes(TEXT, 64)


def test_the_command(tmp_path, capsys):
    assert perform(["bench", "parallel", "--gpus", "8", "64", "--heads", "8", "--out", str(tmp_path)]) == 0
    rows, stamp = read_results(tmp_path / "parallel.json")
    assert [row["GPUs"] for row in rows] == [8, 64] and rows[1]["Ulysses MB"] is None and stamp["tokens"] == 2**20
    assert rows[0]["tokens a GPU"] == 2**17 and rows[0]["concepts MB"] < rows[0]["ring MB"] / 100
    assert "assumed" in capsys.readouterr().out
