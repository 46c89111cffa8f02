"""Resuming is exact at any stage and number of ranks, in any precision, compiled or not, however it was saved.

A few rows are tried every time, all of them by `pytest -m matrix tests/engine/test_resume.py`.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .running import run_jobs

SAVING = {"beside": ["checkpoint.async=true"], "at once": ["checkpoint.async=false"]}  # way -> overrides
# (stage, ranks, precision, compiled, way of saving). Two ranks have Muon. One, not compiled: test_trainer.py
ROWS = (
    (1, 2, "bf16", False, "at once"),
    (2, 2, "fp32", False, "beside"),
    (3, 2, "bf16", False, "beside"),
    (2, 1, "bf16", True, "beside"),
)
MATRIX = list(itertools.product((1, 2, 3), (1, 2), ("fp32", "bf16"), (False, True), SAVING))
LIMIT_S = 300  # of a row, on a machine that others use as well
COMMON = ["train.steps=4", "eval.every=0", "eval.tokens=200", "checkpoint.every=2", "ema.decay=0.9"]


def name_of(row: tuple) -> str:
    stage, ranks, precision, is_compiled, way = row
    return f"stage-{stage}-{ranks}-{precision}-{'compiled' if is_compiled else 'eager'}-{way.replace(' ', '-')}"


def run_all(
    recipe: Path, rows: Sequence[tuple], folder: Path, backend: str = "eager"
) -> dict[tuple, list[list[int]]]:  # fmt: skip
    """Trains each row from beginning to end, and again from the middle, in a process of its own a rank; exit codes.

    ``backend``: of torch.compile; graphs are the same without inductor's kernels, which take minutes to build.
    """
    jobs = []
    for row in rows:
        stage, ranks, precision, is_compiled, way = row
        given = [*COMMON, *SAVING[way], f"zero.stage={stage}", f"train.precision={precision}"]
        given += [f"train.compile={str(is_compiled).lower()}", f"optim.muon={'{}' if ranks == 2 else 'null'}"]
        whole, resumed = name_of(row), f"{name_of(row)}-resumed"
        common = dict(world=ranks, recipe=str(recipe), backend=backend)
        jobs.append(dict(**common, overrides=[*given, f"run.name={whole}"]))
        jobs.append(dict(
            **common, overrides=[*given, f"run.name={resumed}", "resume=auto"],
            again=[str(folder / "runs" / whole), str(folder / "runs" / resumed), 2],
        ))  # fmt: skip
    codes, _ = run_jobs(jobs, folder, limit_s=LIMIT_S * len(rows), TORCHINDUCTOR_COMPILE_THREADS="1")
    return {row: codes[2 * i : 2 * i + 2] for i, row in enumerate(rows)}


def history(folder: Path) -> list[tuple]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(e["step"], e["loss"].hex(), float(e["grad_norm"]).hex()) for e in entries if e["kind"] == "train"]


def difference(row: tuple, folder: Path) -> str:
    """Where the resumed run is not the whole one; "" if it is, to the last bit."""
    whole, resumed = (folder / "runs" / f"{name_of(row)}{end}" for end in ("", "-resumed"))
    for ours, theirs in zip(history(whole), history(resumed), strict=True):
        if ours != theirs:
            return f"{ours} {theirs}"
    first, second = (load_file(each / "model" / "model.safetensors") for each in (whole, resumed))
    return ", ".join(name for name, tensor in first.items() if not torch.equal(tensor, second[name]))


@pytest.fixture(scope="module")
def ran(recipe_in, tmp_path_factory) -> Callable[..., tuple[dict, Path]]:
    """Runs rows in one process, once; their exit codes, and the folder that they are in."""
    done: dict[tuple, tuple[dict, Path] | None] = {}

    def ran(rows: tuple[tuple, ...]) -> tuple[dict, Path]:
        if rows not in done:
            done[rows] = None  # a process that fails is not started again for each of its rows
            folder = tmp_path_factory.mktemp("resume")
            done[rows] = run_all(recipe_in(folder), rows, folder), folder
        assert done[rows] is not None, "the process of these rows has failed: see the first of them"
        return done[rows]

    return ran


def cases() -> Iterator[Any]:
    """Each row with those that are run with it: of the matrix the four of a stage and a number of ranks that are
    compiled, and the four that are not (`-k eager`: in a tenth of the time)."""

    def group_of(row: tuple) -> tuple:
        return row[0], row[1], row[3]

    for row in ROWS:
        yield pytest.param(ROWS, row, id=name_of(row))
    for _, group in itertools.groupby(sorted(MATRIX, key=group_of), key=group_of):
        rows = tuple(group)
        marks = [pytest.mark.matrix, pytest.mark.timeout(LIMIT_S * len(rows))]
        for row in rows:
            yield pytest.param(rows, row, id=f"matrix-{name_of(row)}", marks=marks)


@pytest.mark.parametrize(("rows", "row"), list(cases()))
def test_a_resumed_run_is_the_whole_one(ran, rows, row):
    codes, folder = ran(rows)
    assert codes[row] == [[0] * row[1]] * 2
    assert difference(row, folder) == ""
