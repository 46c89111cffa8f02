"""Checkpoints: bitwise to resume from, impossible to mistake, and never half there."""

import json
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from conceptron.engine.checkpoints import checkpoint
from conceptron.engine.checkpoints.checkpoint import Progress
from conceptron.engine.checkpoints.writer import save
from conceptron.engine.errors import InputError
from conceptron.engine.launching.launch import World
from conceptron.models.config import ConceptConfig
from conceptron.models.masked_lm import ConceptForMaskedLM

# stage 3 under bf16, on two ranks: test_resume.py
STAGES = pytest.mark.parametrize("stage, precision", [(1, "fp32"), (2, "bf16"), (3, "fp32")])


def at(step: int) -> Progress:
    return Progress(step=step, optimizer_steps=step, tokens=10 * step, elapsed_s=0.5, identity={"text": {"tokens": 3}})


@pytest.fixture
def saved(world, build, steps, tmp_path):
    """Three checkpoints of one short run."""
    engine = build()
    for step in (1, 2, 3):
        steps(engine, step - 1, step)
        save(world, tmp_path, engine, at(step), keep_last=3)
    return tmp_path


@STAGES
def test_resumes_bitwise(world, build, steps, tmp_path, stage, precision):
    straight = steps(build(stage, precision), 0, 4)
    engine = build(stage, precision)
    before = steps(engine, 0, 2)
    folder = save(world, tmp_path, engine, at(2), keep_last=1)
    after_saving = steps(engine, 2, 4)
    resumed = steps(build(stage, precision, found=folder), 2, 4)
    assert before + after_saving == straight  # saving changes nothing
    assert resumed == straight[2:]
    assert checkpoint.load_progress(folder) == at(2)


@pytest.mark.parametrize("before, after", [(1, 3), (3, 2)])
def test_another_stage_reads_the_same_state(world, build, steps, tmp_path, before, after):
    engine = build(before)
    steps(engine, 0, 2)
    folder = save(world, tmp_path, engine, at(2), keep_last=1)
    torch.testing.assert_close(
        torch.tensor(steps(build(after, found=folder), 2, 4)), torch.tensor(steps(engine, 2, 4)), rtol=1e-5, atol=1e-6
    )
    again = save(world, tmp_path / "again", build(after, found=folder), at(2), keep_last=1)
    first, second = (load_file(path / "state-00000-of-00001.safetensors") for path in (folder, again))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_reads_ranges_across_the_files_of_several_ranks(world, build, steps, tmp_path):
    """What two ranks wrote, cut at odd places, is read by one as if it had been whole."""
    engine = build()
    steps(engine, 0, 2)
    whole = save(world, tmp_path / "whole", engine, at(2), keep_last=1)
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    for key, tensor in load_file(whole / "state-00000-of-00001.safetensors").items():
        name, start, kind = key.split("@")[0], int(key.split("@")[1].split(":")[0]), key.split(":")[1]
        cut = tensor.numel() // 3
        parts[1][f"{name}@{start}:{kind}"] = tensor[:cut].clone()
        parts[0][f"{name}@{start + cut}:{kind}"] = tensor[cut:].clone()
    divided = tmp_path / "divided"
    divided.mkdir()
    for i, tensors in enumerate(parts):
        save_file(tensors, divided / f"state-{i:05d}-of-00002.safetensors")
    (divided / "trainer.json").write_text((whole / "trainer.json").read_text())
    assert steps(build(found=divided), 2, 4) == steps(engine, 2, 4)


def test_keeps_the_newest(world, build, saved):
    assert [path.name for path in checkpoint.list_checkpoints(saved)] == [f"step-0000000{n}" for n in (3, 2, 1)]
    save(world, saved, build(), at(4), keep_last=2)
    assert sorted(path.name for path in saved.iterdir()) == ["step-00000003", "step-00000004"]


def test_holds_no_pickle(saved):
    names = {path.name for path in (saved / "step-00000003").iterdir()}
    assert names == {"MANIFEST.json", "trainer.json", "state-00000-of-00001.safetensors"}


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1  # in the last tensor: safetensors alone would not notice
    path.write_bytes(data)


DAMAGES = {
    "bit flipped": (lambda f: flip_a_bit(f / "state-00000-of-00001.safetensors"), "does not match its checksum"),
    "cut short": (lambda f: (f / "trainer.json").write_text("{"), "bytes instead of"),
    "file missing": (lambda f: (f / "state-00000-of-00001.safetensors").unlink(), "is missing"),
    "no manifest": (lambda f: (f / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
    "manifest cut": (lambda f: (f / "MANIFEST.json").write_text('{"format": 1, "files"'), "MANIFEST.json is damaged"),
    "manifest odd": (lambda f: (f / "MANIFEST.json").write_text("[]"), "MANIFEST.json is damaged"),
    "format": (lambda f: (f / "MANIFEST.json").write_text('{"format": 9, "files": {}}'), "its format is 9"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(world, saved, damage):
    break_it, reason = DAMAGES[damage]
    break_it(saved / "step-00000003")
    found, warnings = checkpoint.find(world, saved)
    assert found == saved / "step-00000002"
    assert len(warnings) == 1 and "step-00000003 is not used" in warnings[0] and reason in warnings[0]


def test_never_starts_anew_when_all_are_damaged(world, saved):
    for folder in checkpoint.list_checkpoints(saved):
        flip_a_bit(folder / "state-00000-of-00001.safetensors")
    with pytest.raises(InputError, match=r"no valid checkpoint left .*does not match its checksum"):
        checkpoint.find(world, saved)


def test_nothing_saved_is_nothing_found(world, tmp_path):
    (tmp_path / ".unfinished-step-00000007").mkdir()
    assert checkpoint.find(world, tmp_path) == (None, [])


def test_a_model_of_another_shape_is_refused(saved):
    folder, shape = saved / "step-00000003", dict(hidden_size=30, num_attention_heads=3, intermediate_size=33)
    wider = ConceptForMaskedLM(ConceptConfig(**shape, vocab_size=98, num_concepts=5, num_hidden_layers=1))
    with pytest.raises(InputError, match=r"encoder.embed_tokens.weight has 2910 of the 2940 elements"):
        checkpoint.load_weights(folder, wider)
    shallow = torch.nn.ModuleDict({"encoder": torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(97, 30)})})
    with pytest.raises(InputError, match="which the model of this recipe lacks"):
        checkpoint.load_weights(folder, shallow)


def test_a_full_disk_leaves_the_earlier_checkpoints(world, build, saved):
    """A limit on the size of files stands in for a full disk: the writer meets an error in the middle of one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="rank 0: "):
            save(world, saved, build(), at(4), keep_last=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(path.name for path in saved.iterdir()) == [f"step-0000000{n}" for n in (1, 2, 3)]
    assert checkpoint.find(world, saved) == (saved / "step-00000003", [])


def test_a_save_cut_off_before_its_name_is_not_a_checkpoint(world, build, saved, monkeypatch):
    """As if the process had been killed when everything but the rename was done."""
    monkeypatch.setattr("pathlib.Path.rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(world, saved, build(), at(4), keep_last=3)
    monkeypatch.undo()
    assert (saved / ".unfinished-step-00000004" / "MANIFEST.json").exists()
    assert checkpoint.find(world, saved)[0] == saved / "step-00000003"
    save(world, saved, build(), at(5), keep_last=3)  # cleans up behind it
    assert not list(saved.glob(".unfinished-*"))


def test_one_failing_rank_fails_all(build, saved, world, monkeypatch):
    class Pair(World):
        def gather(self, value):
            return [value, (None, "rank 1: No space left on device")]

    with pytest.raises(OSError, match="rank 1: No space left on device"):
        save(Pair(0, 0, 1, world.device), saved, build(), at(4), keep_last=1)
    assert json.loads((saved / "step-00000003" / "MANIFEST.json").read_text())["step"] == 3
    assert not (saved / "step-00000004").exists()
