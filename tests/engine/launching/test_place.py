"""Launchers' variables: what they say, and one line for whatever they cannot."""

import os

import pytest

from conceptron.__main__ import main
from conceptron.engine.errors import LaunchError
from conceptron.engine.launching.place import VARIABLES, find_place, first_host, is_first

TORCH = dict(RANK="1", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="gpu3", MASTER_PORT="29500")
SLURM = dict(
    SLURM_PROCID="5", SLURM_LOCALID="1", SLURM_STEP_NUM_TASKS="8", SLURM_NTASKS="16", SLURM_STEP_NODELIST="gpu[3-4]",
    SLURM_JOB_ID="123456",
)  # fmt: skip


def test_what_launchers_say():
    assert find_place(TORCH).variables() == TORCH
    place = find_place(SLURM)
    assert (place.rank, place.local_rank, place.size, place.host, place.port) == (5, 1, 8, "gpu3", 23456)
    assert place.by_slurm and not find_place(TORCH).by_slurm
    assert find_place({**SLURM, "MASTER_ADDR": "a", "MASTER_PORT": "7"})[4:6] == ("a", 7)
    assert find_place({**SLURM, **TORCH}).size == 4  # torchrun started by srun
    assert find_place({**TORCH, "LOCAL_WORLD_SIZE": "2"}).local_size == 2


def test_nobody_else():
    assert find_place({}) is None
    assert find_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) is None  # a shell inside an allocation
    assert find_place({"SLURM_PROCID": "0"}) is None


@pytest.mark.parametrize("variables, found", [
    (TORCH | {"RANK": "abc"}, "RANK: expected a whole number from 0 to 3, below WORLD_SIZE = 4, got 'abc'"),
    (TORCH | {"RANK": ""}, "RANK: expected a whole number from 0 to 3, below WORLD_SIZE = 4, got ''"),
    (TORCH | {"RANK": "-1"}, "RANK: expected a whole number from 0 to 3, below WORLD_SIZE = 4, got '-1'"),
    (TORCH | {"RANK": "4"}, "RANK: expected a whole number from 0 to 3, below WORLD_SIZE = 4, got '4'"),
    (TORCH | {"RANK": "\u0661"}, "RANK: expected a whole number"),
    (TORCH | {"WORLD_SIZE": "0"}, "WORLD_SIZE: expected a whole number from 1 to"),
    (TORCH | {"WORLD_SIZE": "1e3"}, "WORLD_SIZE: expected a whole number from 1 to"),
    (TORCH | {"WORLD_SIZE": "9" * 30}, "WORLD_SIZE: expected a whole number from 1 to"),
    (TORCH | {"LOCAL_RANK": "x"}, "LOCAL_RANK: expected a whole number from 0 to 3, got 'x'"),
    (TORCH | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK: expected a whole number from 0 to 1, got '2'"),
    (TORCH | {"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE: expected a whole number from 1 to 4, got '5'"),
    (TORCH | {"MASTER_PORT": "http"}, "MASTER_PORT: expected a whole number from 1 to 65535, got 'http'"),
    (TORCH | {"MASTER_PORT": "65536"}, "MASTER_PORT: expected a whole number from 1 to 65535, got '65536'"),
    (TORCH | {"MASTER_PORT": "0"}, "MASTER_PORT: expected a whole number from 1 to 65535, got '0'"),
    (TORCH | {"MASTER_ADDR": ""}, "MASTER_ADDR: expected a host, got ''"),
    (TORCH | {"MASTER_ADDR": "a\nb"}, r"MASTER_ADDR: expected a host, got 'a\nb'"),
    (SLURM | {"SLURM_PROCID": "8"}, "SLURM_PROCID: expected a whole number from 0 to 7"),
    (SLURM | {"SLURM_LOCALID": "-"}, "SLURM_LOCALID: expected a whole number from 0 to 7, got '-'"),
    (SLURM | {"SLURM_STEP_NUM_TASKS": "8(x2)"}, "SLURM_STEP_NUM_TASKS: expected a whole number from 1 to"),
    (SLURM | {"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID: expected a whole number from 0"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "RANK is set but MASTER_PORT is not; use torchrun"),
])  # fmt: skip
def test_wrong_variables(variables, found):
    with pytest.raises(LaunchError) as caught:
        find_place(variables)
    assert str(caught.value).startswith(f"environment: {found}") and str(caught.value).isprintable()


def test_one_rank_speaks_for_all():
    assert is_first({}) and is_first(TORCH | {"RANK": "0"}) and is_first(SLURM | {"SLURM_PROCID": "0"})
    assert not is_first(TORCH) and not is_first(SLURM) and not is_first({"RANK": "1"})
    assert is_first({"RANK": "one"}) and is_first({"RANK": ""}) and not is_first(SLURM | {"SLURM_PROCID": "9"})


def test_of_what_a_machine_may_lack_one_rank_of_each_speaks():
    for first, place in (("LOCAL_RANK", TORCH), ("SLURM_LOCALID", SLURM)):
        assert is_first(place | {first: "0"}, on_its_machine=True) and not is_first(place, on_its_machine=True)


@pytest.mark.parametrize(
    "nodes, first",
    [("gpu[03-07,9],login1", "gpu03"), ("alone", "alone"), ("a,b", "a"), ("n-[1-2]", "n-1"), ("x[001]", "x001")],
)
def test_first_host_of_a_slurm_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize("variables, found", [
    ({"RANK": "abc", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}, "RANK: expected a whole"),
    ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "none"}, "MASTER_PORT: expected"),
    ({"SLURM_PROCID": "3", "SLURM_NTASKS": "2"}, "SLURM_PROCID: expected a whole number from 0 to 1"),
    ({"DS_ACCELERATOR": "gpu"}, "DS_ACCELERATOR: expected cpu or cuda, got 'gpu'"),
    ({"CONCEPTRON_BACKEND": "cuda"}, "CONCEPTRON_BACKEND: expected one of auto, triton, torch, got 'cuda'"),
    ({"CONCEPTRON_BACKEND": "triton"}, "CONCEPTRON_BACKEND: 'triton' needs CUDA tensors"),
    ({"CONCEPTRON_CHECK": "yes"}, "CONCEPTRON_CHECK: expected 0 or 1, got 'yes'"),
    ({"CONCEPTRON_LCE_CHUNK_MB": "nan"}, "CONCEPTRON_LCE_CHUNK_MB: expected a number of megabytes"),
])  # fmt: skip
def test_a_bad_variable_is_one_line_and_nothing_is_written(variables, found, recipe, tmp_path, monkeypatch, capfd):
    for name in (*VARIABLES, "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = {name: os.environ.get(name) for name in VARIABLES}
    assert main(["train", str(recipe)]) == 2
    output = capfd.readouterr()
    assert output.out == "" and output.err.startswith(f"conceptron: error: environment: {found}")
    assert output.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
    assert {name: os.environ.get(name) for name in VARIABLES} == before


