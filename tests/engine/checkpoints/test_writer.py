"""Saves beside training: the loop waits for a copy in memory only, and what is written is of that very step."""

import errno
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from conceptron.engine.checkpoints import checkpoint, writer
from conceptron.engine.checkpoints.checkpoint import Progress
from conceptron.engine.checkpoints.retention import Retention, best_step
from conceptron.engine.checkpoints.writer import Writer, save
from conceptron.engine.errors import InputError

STATE = "state-00000-of-00001.safetensors"


def at(step: int) -> Progress:
    return Progress(step=step, optimizer_steps=step)


@pytest.fixture
def held(monkeypatch):
    """Writing waits until this event is set."""
    event, write = threading.Event(), checkpoint.write_state

    def later(*arguments):
        assert event.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "write_state", later)
    yield event
    event.set()


@pytest.mark.parametrize("stage, precision", [(1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_training_goes_on_while_a_disk_is_slow(world, build, steps, tmp_path, held, stage, precision):
    straight = steps(build(stage, precision), 0, 5)
    engine = build(stage, precision)
    steps(engine, 0, 2)
    with Writer(world, tmp_path / "beside", Retention(1)) as beside:
        beside.save(engine, at(2))
        assert steps(engine, 2, 4) == straight[2:4]  # not even the first byte is written
        assert beside.is_busy and not beside.is_ready and beside.num_waits == 0
        assert not checkpoint.list_checkpoints(tmp_path / "beside")
        held.set()
        while beside.is_busy:  # as the loop does, step by step
            if beside.is_ready:
                beside.advance()
        assert beside.num_waits == 0 and beside.num_saved == 1
        beside.save(engine, at(4))  # in the memory of the first
        beside.finish()
        assert beside.num_saved == 2
    found, expected = tmp_path / "beside" / "step-00000004", save(world, tmp_path / "now", engine, at(4), keep_last=1)
    assert not checkpoint.verify(found)
    first, second = load_file(found / STATE), load_file(expected / STATE)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert steps(build(stage, precision, found=found), 4, 5) == straight[4:]


def test_what_is_written_is_of_the_step_of_the_save(world, build, steps, tmp_path, held):
    engine = build()
    steps(engine, 0, 2)
    with Writer(world, tmp_path, Retention(2)) as beside:
        beside.save(engine, at(2))
        after = steps(engine, 2, 4)
        held.set()
        beside.finish()
    assert steps(build(found=tmp_path / "step-00000002"), 2, 4) == after


@pytest.mark.parametrize("part, of", [("write_state", checkpoint), ("publish", checkpoint)])
def test_a_failed_save_is_an_error_at_the_next_opportunity(world, build, tmp_path, monkeypatch, part, of):
    engine = build()
    with Writer(world, tmp_path, Retention(2)) as beside:
        beside.save(engine, at(1))
        beside.finish()

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(of, part, full)
        beside.save(engine, at(2))
        with pytest.raises(OSError, match="No space left on device"):
            beside.finish()
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"] and beside.num_saved == 1
        monkeypatch.undo()
        beside.save(engine, at(3))  # the fault is told once
        beside.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_a_thread_that_ends_in_any_other_way_is_no_success(world, build, tmp_path, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    monkeypatch.setattr(checkpoint, "write_state", lambda *_: 1 / 0)
    beside = Writer(world, tmp_path, Retention(1))
    beside.save(build(), at(1))
    with pytest.raises(OSError, match="rank 0: its writer ended without a result"):
        beside.finish()
    assert not list(tmp_path.iterdir())


def test_without_async_nothing_is_left_to_do(world, build, tmp_path):
    at_once = Writer(world, tmp_path, Retention(1), is_async=False)
    at_once.save(build(), at(1))
    assert not at_once.is_busy and threading.active_count() == len(threading.enumerate())
    assert not any(thread.name == "checkpoint" for thread in threading.enumerate())
    assert not checkpoint.verify(tmp_path / "step-00000001")


def test_the_best_is_kept_and_named(world, build, tmp_path):
    engine, retention = build(), Retention(1, 0, "nll_unseen")
    at_once, best = Writer(world, tmp_path, retention, is_async=False), {}
    for step, value in enumerate((3.0, 2.0, 2.5, float("nan"), 2.0), start=1):
        best = retention.improved(best, step, {"nll_unseen": value, "loss": -step})
        at_once.save(engine, Progress(step=step, best=best))
    assert best == {"metric": "nll_unseen", "value": 2.0, "step": 2} and best_step(tmp_path) == 2
    assert [checkpoint.step_of(each) for each in checkpoint.list_checkpoints(tmp_path)] == [5, 2]
    assert Retention(1, 0, "retrieval").improved(best, 6, {"retrieval": 0.25})["step"] == 6  # another metric
    higher, before = Retention(1, 0, "retrieval"), {"metric": "retrieval", "value": 0.5, "step": 1}
    assert higher.improved(before, 6, {"retrieval": 0.4}) == higher.improved(before, 6, {}) == before
    assert higher.improved(before, 6, {"retrieval": 0.6})["step"] == 6
    (tmp_path / "best.json").write_text("{")
    with pytest.raises(InputError, match=r"best.json: damaged .*; use --step"):
        best_step(tmp_path)
    (tmp_path / "best.json").unlink()
    with pytest.raises(InputError, match="was not told to keep one"):
        best_step(tmp_path)


def test_one_failing_rank_is_named_on_all(build, world, tmp_path):
    pair = SimpleNamespace(
        rank=0, size=1, is_first=True, first_then_share=world.first_then_share,
        gather=lambda outcome: [outcome, (None, "No space left on device")],
    )  # fmt: skip
    beside = writer.Writer(pair, tmp_path, Retention(1))
    beside.save(build(), at(4))
    with pytest.raises(OSError, match="rank 1: No space left on device"):
        beside.finish()
    assert not list(tmp_path.iterdir())
