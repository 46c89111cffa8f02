"""Each fault that the doctor looks for, made."""

import importlib.metadata
import os
import shutil

import pytest
import torch
from huggingface_hub import constants

from conceptron.__main__ import perform
from conceptron.engine import doctor
from conceptron.engine.doctor import FAULT, OK, WARNING, Finding


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_this_machine(quick, capsys):
    assert perform(["doctor"]) == 0
    told = capsys.readouterr().out
    names = ("packages", "Triton", "communication", "shared folder", "run folder", "data cache", "hub")
    assert all(name in told for name in names)
    assert told.endswith("this machine can train\n") and FAULT not in told


def test_a_recipe_and_its_tokenizer(quick, tmp_path, capsys):
    assert perform(["doctor", "demo.yaml", f"run.folder={tmp_path}"]) == 0
    assert "1800 steps of 1024 tokens" in capsys.readouterr().out
    assert perform(["doctor", "demo.yaml", f"data.tokenizer={tmp_path}"]) == 1
    told = capsys.readouterr()
    assert "no tokenizer.json in this folder" in told.out and "cannot train" in told.out
    assert perform(["doctor", "demo.yaml", "train.stepz=3"]) == 1
    assert "did you mean train.steps" in capsys.readouterr().out


def test_a_package_that_is_missing_or_too_old(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == "safetensors" else real(name))
    needed = ["safetensors>=0.4", "no-such-package; extra == 'x'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needed)
    assert doctor.packages() == Finding(FAULT, "safetensors is 0.1, needed is >=0.4", doctor.packages().remedy)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["no-such-package>=1"])
    assert doctor.packages().found == "no-such-package is missing"


def test_a_driver_and_a_torch_that_cannot_use_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor.gpu().state == FAULT and "is a build for CPUs" in doctor.gpu().found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    assert doctor.triton() == Finding(FAULT, doctor.triton().found, "install gcc, or set CC")


def test_folders(monkeypatch, tmp_path):
    assert doctor.folder(tmp_path / "not" / "yet").state == OK
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(doctor, "ENOUGH_BYTES", 10**30)
    assert doctor.folder(tmp_path).state == WARNING

    def read_only(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "fsync", read_only)
    found = doctor.folder(tmp_path)
    assert found.state == FAULT and found.found == f"{tmp_path}: Read-only file system"


class Ranks:
    """What `shared` asks of a world of two, whose other rank sees what ``sees`` says."""

    rank, size, is_first = 0, 2, True

    def __init__(self, sees):
        self.sees = sees

    def first_then_share(self, action):
        return action()

    def gather(self, value):
        return [value, (1, "gpu02", self.sees)]


def test_a_folder_that_another_machine_does_not_see(tmp_path):
    there, elsewhere = (doctor.shared(tmp_path / "runs", Ranks(sees)) for sees in (True, False))
    assert there == Finding(OK, f"{tmp_path}: seen by all 2 processes")
    found = f"{tmp_path}: what rank 0 writes there is not seen by rank 1 on gpu02"
    assert elsewhere == Finding(FAULT, found, elsewhere.remedy) and "all machines mount" in elsewhere.remedy
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    found = doctor.hub()
    assert found.state == WARNING and "cannot be reached" in found.found and "data.tokenizer" in found.remedy


def test_a_tokenizer_that_training_makes_is_no_fault():
    for overrides, name in (([], "pydocs"), (["size=tiny"], "pydocs-small")):
        found = doctor.recipe("demo.yaml", overrides)["tokenizer"]()
        assert found.state == doctor.OK and found.found.startswith(f"{name}: trained")
