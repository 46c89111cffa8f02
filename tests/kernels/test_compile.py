"""The compile table: every shipped configuration is clean, and each kind of fault is found."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from conceptron.__main__ import main
from conceptron.kernels import compile as table
from conceptron.kernels.compile import Row

FABRICATED, ONE_OF_EACH = (str(Path(__file__).parent / f"{name}.py") for name in ("fabricated_builds", "one_of_each"))
ARCHS = ("sm_80", "sm_90", "sm_100")


@pytest.fixture(scope="module")
def fabricated(tmp_path_factory):
    """The rows of the fabricated kernels by name, compiled afresh, the exit code, and where the cache lies."""
    report = tmp_path_factory.mktemp("compile") / "rows.json"
    argv = ["--builds", FABRICATED, "--arch", "sm_90", "--no-cache", "--json", str(report)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(report.parent))
        code = main(["kernels", "compile", *argv])
    return {row["name"].removeprefix("fabricated/"): row for row in json.loads(report.read_text())}, code, report.parent


@pytest.mark.parametrize(
    ("name", "failure"),
    [
        ("shared-memory", "bytes of shared memory, more than 227 KB"),
        ("stack", "bytes of stack a thread, more than 64"),
        ("no-matrix", "a matrix product without matrix instructions"),
        ("refused", "does not compile: CompileTimeAssertionFailure: "),
    ],
)
def test_each_fault_is_found(fabricated, name, failure):
    rows, code, _ = fabricated
    assert code == 1
    (found,) = rows[name]["failures"]
    assert failure in found


def test_a_clean_kernel_passes(fabricated):
    row = fabricated[0]["clean"]
    assert row["failures"] == []
    assert row["matrix"].get("HGMMA", 0) > 0 and 32 < row["registers"] <= 255 and row["shared_bytes"] >= 2 * 64 * 64 * 2
    assert row["seconds"] > 0 and not row["cached"]


def test_only_the_architectures_of_a_build(fabricated):
    assert "elsewhere" not in fabricated[0]


@pytest.mark.parametrize(
    ("changes", "failure"),
    [
        ({}, None),
        ({"stack_bytes": 64}, None),
        ({"stack_bytes": 72}, "72 bytes of stack"),
        ({"shared_bytes": 163 * 1024}, None),
        ({"shared_bytes": 163 * 1024 + 1}, "more than 163 KB"),
        ({"num_warps": 16, "registers": 128}, None),
        ({"num_warps": 16, "registers": 129}, "129 registers x 512 threads, more than 65536"),
        ({"tensor_columns": 513}, "513 columns of tensor memory"),
        ({"has_dot": True}, "without matrix instructions"),
        ({"has_dot": True, "matrix": {"HMMA": 4}}, None),
        ({"error": "ValueError: no"}, "does not compile: ValueError: no"),
    ],
)
def test_limits(changes, failure):
    failures = Row(**{"name": "x", "arch": "sm_80", "num_warps": 4, "has_dot": False, **changes}).failures()
    assert (not failures) if failure is None else (len(failures) == 1 and failure in failures[0])


def test_amd_is_told_and_not_failed(capsys):
    row = Row("x", "gfx942", 4, False, shared_bytes=65 * 1024)
    assert table.judge([row]) == 0
    assert "skipped: x on gfx942: 66560 bytes of shared memory, more than 64 KB" in capsys.readouterr().out
    assert table.judge([row], ["adaln: its builds cannot be listed: no"]) == 1


def test_matrix_instructions_of_each_architecture():
    code = "HGMMA.64x64x16 ; @P0 HMMA.16816.F32 ; UTCHMMA gdesc ; UTCBAR ; UTCQMMA ; FFMA ; LDSM.16"
    assert table.MATRIX.findall(code) == ["HGMMA", "HMMA", "UTCHMMA", "UTCQMMA"]
    assert table.MATRIX_AMD.findall("v_mfma_f32_32x32x8_bf16 v_fma_f32") == ["v_mfma"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arch", "sm_70"], "--arch: expected one of sm_80"),
        (["--jobs", "0"], "--jobs: expected a whole number from 1 to 4096, got '0'"),
        (["--sample", "0"], "--sample: expected a whole number from 1, got '0'"),
        (["--builds", "nowhere.py"], "--builds: expected a file, found nothing at nowhere.py"),
    ],
)
def test_refused(argv, message, capsys):
    assert main(["kernels", "compile", *argv]) == 2 and message in capsys.readouterr().err


def test_a_second_run_reads_the_cache(fabricated, tmp_path, monkeypatch, capfd):
    first, _, cache = fabricated
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    argv = ["--builds", FABRICATED, "--arch", ",".join(ARCHS), "--only", "fabricated/clean", "--json"]
    assert main(["kernels", "compile", *argv, str(tmp_path / "second.json")]) == 0
    rows = {row["arch"]: row for row in json.loads((tmp_path / "second.json").read_text())}
    assert {arch: row["cached"] for arch, row in rows.items()} == {"sm_80": False, "sm_90": True, "sm_100": False}
    assert {**rows["sm_90"], "cached": False} == first["clean"]
    assert rows["sm_80"]["matrix"].get("HMMA", 0) > 0
    assert any(kind.startswith("UTC") for kind in rows["sm_100"]["matrix"])
    assert "3 compiled (1 read from the cache), 0 failures" in capfd.readouterr().out


def test_every_operator_says_what_it_ships():
    folders = {path.parent.name for path in Path(table.__file__).parent.glob("*/op.py")}
    assert set(table.OPERATORS) == folders


def test_samples_differ_by_architecture_and_cover_all():
    names = [f"op/kernel/{i}" for i in range(600)]
    picked = {arch: {n for n in names if table.sampled(n, arch, 3)} for arch in ("sm_80", "sm_90")}
    assert all(150 < len(found) < 250 for found in picked.values()) and picked["sm_80"] != picked["sm_90"]
    assert all(table.sampled(n, "sm_90", 1) for n in names)


def test_a_sample_is_a_part_of_what_is_listed():
    options = {"builds": None, "only": "", "arch": ["sm_80", "sm_90"]}
    every, some = (table.list_tasks(SimpleNamespace(**options, sample=n))[0] for n in (1, 24))
    names = [{(task.build.name, task.arch) for task in tasks} for tasks in (every, some)]
    assert names[1] < names[0] and len(every) / 48 < len(some) < len(every) / 12


def test_shipped_configurations_are_clean(tmp_path, capfd):
    """One of every kernel; all take an hour and are compiled by `conceptron kernels compile`."""
    argv = ["--builds", ONE_OF_EACH, "--arch", ",".join(ARCHS), "--json", str(tmp_path / "rows.json")]
    assert main(["kernels", "compile", *argv]) == 0, capfd.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["name"].split("/")[0] for row in rows} == set(table.OPERATORS)
    assert {row["arch"] for row in rows if row["matrix"]} == set(ARCHS)
