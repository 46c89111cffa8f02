"""Averaged weights: what they are, and that using them leaves the run as it was."""


import pytest
import torch
from safetensors.torch import load_file

from conceptron.engine import compat
from conceptron.engine.checkpoints.checkpoint import Progress
from conceptron.engine.checkpoints.writer import save
from conceptron.engine.jobs.export import export_step
from conceptron.engine.optimizing.ema import KEY, Average
from conceptron.engine.recipe.schema import Ema
from conceptron.engine.telemetry import Telemetry
from conceptron.engine.trainer import train

from ..running import history


def weights(engine) -> list[torch.Tensor]:
    return [compat.whole(parameter) for parameter in engine.module.parameters()]


@pytest.mark.parametrize("stage, precision", [(1, "fp32"), (3, "bf16")])
def test_the_average_is_its_formula_and_is_gone_outside(build, steps, stage, precision):
    engine, expected = build(stage, precision, lr=0.1), None
    average = Average(engine, Ema(decay=0.25))
    for n in range(1, 4):  # the share rises until the second
        steps(engine, n - 1, n)
        average.update(n)
        decay = min(0.25, (1 + n) / (10 + n))
        now = weights(engine)
        expected = now if n == 1 else [decay * e + (1 - decay) * w for e, w in zip(expected, now, strict=True)]
    with average.served():
        torch.testing.assert_close(weights(engine), expected, rtol=1e-5, atol=1e-7)
        assert not torch.equal(weights(engine)[0], now[0])
        views = steps(engine, 3, 4)  # it is these that a forward pass takes
    assert views[0][0] > 0
    twin = build(stage, precision, lr=0.1)
    before = steps(twin, 0, 3)
    with Average(twin, Ema(decay=0.25)).served():  # nothing averaged yet: nothing changes
        pass
    other = Average(engine := build(stage, precision, lr=0.1), Ema(decay=0.25))
    for n in range(1, 4):  # the share rises until the second
        assert steps(engine, n - 1, n) == before[n - 1 : n]
        other.update(n)
        with other.served():
            pass
    assert all(torch.equal(a, b) for a, b in zip(weights(engine), weights(twin), strict=True))


def test_without_a_decay_there_is_none(build, steps):
    engine = build()
    average = Average(engine, Ema())
    steps(engine, 0, 1)
    average.update(1)
    assert not any(KEY in engine.optimizer.optimizer.state[flat] for flat in compat.partitions(engine))


def test_another_stage_reads_the_averages(world, build, steps, tmp_path):
    engine = build(1)
    average = Average(engine, Ema(decay=0.5))
    for n in (1, 2):
        steps(engine, n - 1, n)
        average.update(n)
    folder = save(world, tmp_path, engine, Progress(step=2, optimizer_steps=2), keep_last=1)
    third = build(3, found=folder)
    with average.served(), Average(third, Ema(decay=0.5)).served():
        assert all(torch.equal(a, b) for a, b in zip(weights(engine), weights(third), strict=True))


AVERAGED = ["train.steps=6", "eval.every=3", "checkpoint.every=2", "ema.decay=0.8"]


def test_a_resumed_run_averages_and_exports_as_the_straight_one(recipe, world, monkeypatch, tmp_path):
    straight = train(recipe, [*AVERAGED, "run.name=straight", "checkpoint.keep_last=3"])
    monkeypatch.setattr(Telemetry, "step", lambda self, step, *rest: 1 / 0 if step == 5 else None)
    with pytest.raises(ZeroDivisionError):
        train(recipe, AVERAGED)
    monkeypatch.undo()
    folder = train(recipe, [*AVERAGED, "resume=auto"])
    assert history(folder, "eval") == history(straight, "eval") and history(folder) == history(straight)
    models = [load_file(each / "model" / "model.safetensors") for each in (folder, straight)]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    state = load_file(straight / "checkpoints" / "step-00000006" / "state-00000-of-00001.safetensors")
    for name, tensor in models[1].items():
        assert torch.equal(tensor.flatten(), state[f"model.{name}@0:{KEY}"])
        assert not torch.equal(tensor.flatten(), state[f"model.{name}@0:weight"])
    for is_average, kind in ((True, KEY), (False, "weight")):
        out, step = export_step(straight, 6, tmp_path / kind, world, is_average)
        exported = load_file(out / "model.safetensors")
        assert step == 6
        assert all(torch.equal(t.flatten(), state[f"model.{n}@0:{kind}"]) for n, t in exported.items())


def test_averages_change_nothing_but_evaluations(recipe):
    off, kept, used = (
        train(recipe, ["train.steps=4", "eval.every=2", f"run.name=run{i}", *more])
        for i, more in enumerate(([], ["ema.decay=0.9", "ema.use=false"], ["ema.decay=0.9"]))
    )
    assert history(off) == history(kept) == history(used)
    assert history(off, "eval") == history(kept, "eval") != history(used, "eval")
