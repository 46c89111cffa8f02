"""The compile table: every shipped configuration is clean, and each kind of fault is found."""

import json
from pathlib import Path

import pytest

from conceptron.__main__ import main
from conceptron.kernels import compile as table
from conceptron.kernels.compile import Row

FABRICATED = str(Path(__file__).parent / "fabricated_builds.py")


@pytest.fixture(scope="module")
def fabricated(tmp_path_factory):
    """The rows of the fabricated kernels by name and architecture, compiled afresh, and the exit code."""
    report = tmp_path_factory.mktemp("compile") / "rows.json"
    argv = ["--builds", FABRICATED, "--arch", "sm_90", "--no-cache", "--json", str(report)]
    code = main(["kernels", "compile", *argv])
    return {row["name"].removeprefix("fabricated/"): row for row in json.loads(report.read_text())}, code


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
    rows, code = fabricated
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


def test_a_second_run_reads_the_cache(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    argv = ["--builds", FABRICATED, "--arch", "sm_80,sm_100", "--only", "fabricated/clean", "--json"]
    rows = []
    for name in ("first.json", "second.json"):
        assert main(["kernels", "compile", *argv, str(tmp_path / name)]) == 0
        rows.append(json.loads((tmp_path / name).read_text()))
    assert [row["cached"] for row in rows[0] + rows[1]] == [False, False, True, True]
    assert [{**row, "cached": None} for row in rows[0]] == [{**row, "cached": None} for row in rows[1]]
    assert rows[0][0]["matrix"].get("HMMA", 0) > 0  # sm_80
    assert any(kind.startswith("UTC") for kind in rows[0][1]["matrix"])  # sm_100
    assert "2 compiled (2 read from the cache), 0 failures" in capfd.readouterr().out


def test_every_operator_says_what_it_ships():
    folders = {path.parent.name for path in Path(table.__file__).parent.glob("*/op.py")}
    assert set(table.OPERATORS) == folders


def test_samples_differ_by_architecture_and_cover_all():
    names = [f"op/kernel/{i}" for i in range(600)]
    picked = {arch: {n for n in names if table.sampled(n, arch, 3)} for arch in ("sm_80", "sm_90")}
    assert all(150 < len(found) < 250 for found in picked.values()) and picked["sm_80"] != picked["sm_90"]
    assert all(table.sampled(n, "sm_90", 1) for n in names)


@pytest.mark.parametrize(("arch", "every"), [("sm_90", "6"), ("sm_80,sm_100", "24")])
def test_shipped_configurations_are_clean(arch, every, capfd):
    """A fixed part of them; all take minutes and are compiled by `conceptron kernels compile`."""
    code = main(["kernels", "compile", "--arch", arch, "--sample", every])
    assert code == 0, capfd.readouterr().out
