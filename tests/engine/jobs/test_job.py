"""The trainer knows a job and nothing else: lines are fitted to points, stopped half-way, and go on."""

import json
import os
import signal
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from conceptron.engine.jobs.job import Loss
from conceptron.engine.launching.launch import StopRequest
from conceptron.engine.recipe.load import load_recipe
from conceptron.engine.run import RunFolder
from conceptron.engine.telemetry import Telemetry
from conceptron.engine.trainer import Trainer
from conceptron.engine.update import update


class Points(NamedTuple):
    x: torch.Tensor  # [n]
    y: torch.Tensor

    def to(self, device, non_blocking=False):
        return Points(self.x.to(device), self.y.to(device))


class Lines:
    """y = 3 x + 1, four points a micro-batch, two micro-batches a step."""

    loss_floor, beginning, files = 0.0, "", {}

    def __init__(self):
        self.evaluated = []

    def identity(self):
        return {"points": {"slope": 3}}

    def describe(self):
        return "points of a line"

    def build(self, is_new):
        return nn.Linear(1, 1)

    def batches(self, start, stop):
        for step in range(start, stop):
            generator = torch.Generator().manual_seed(step)
            points = [torch.randn(4, generator=generator) for _ in range(2)]
            yield [Points(x, 3 * x + 1) for x in points]

    def num_tokens(self, step):
        return 8

    def flops(self, engine, batches):
        return None

    def contents(self, step):
        return {"points": [step]}

    def labels(self, step):
        return {"kind_of_step": "even" if step % 2 == 0 else "odd"}

    def prepare(self, engine, step, batches, seeds):
        count = sum(len(batch.x) for batch in batches)
        return [{"points": batch, "count": count} for batch in batches]

    def loss(self, engine, given):
        points, count = given["points"], given["count"]
        loss = (engine(points.x[:, None])[:, 0] - points.y).square().sum() / count
        return Loss(loss, {"loss": loss.detach()})

    def after_backward(self, engine, num_batches):
        return {}

    def evaluate(self, engine):
        self.evaluated.append(1)
        return {"slope": float(engine.module.weight.detach())}

    def export(self, module, folder):
        folder.mkdir()
        (folder / "line.json").write_text(json.dumps({"slope": float(module.weight.detach())}))
        return folder


def run(recipe_path: Path, world, *overrides: str) -> Path:
    fixed = ["train.steps=40", "optim.lr=0.3", "optim.weight_decay=0", "eval.every=20", "optim.warmup_steps=0"]
    recipe = load_recipe(recipe_path, [*fixed, *overrides])
    with RunFolder(recipe, world) as folder, StopRequest() as stop:
        notes = folder.inspect()
        Trainer(recipe, world, stop, folder, Lines()).fit(notes)
    return folder.path


def losses(folder: Path) -> list[str]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"].hex() for entry in lines if entry["kind"] == "train"]


def test_another_job_is_trained_stopped_and_resumed(recipe, world, monkeypatch):
    straight = run(recipe, world, "run.name=straight")
    assert json.loads((straight / "model" / "line.json").read_text())["slope"] == pytest.approx(3, abs=0.3)
    entries = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert {entry.get("kind_of_step") for entry in entries if entry["kind"] == "train"} == {"even", "odd"}
    assert [entry["step"] for entry in entries if entry["kind"] == "eval"] == [20, 40]
    report = Telemetry.step

    def report_and_send(self, now, *rest):
        report(self, now, *rest)
        if now == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Telemetry, "step", report_and_send)
    with pytest.raises(SystemExit):
        run(recipe, world)
    monkeypatch.undo()
    assert losses(run(recipe, world, "resume=auto")) == losses(straight)


def test_phases_are_told_in_their_order(world):
    class Engine(nn.Linear):
        def __init__(self):
            super().__init__(1, 1)
            self.module, self.optimizer = self, torch.optim.SGD(self.parameters(), 1.0)
            self.optimizer.cpu_offload = True  # nobody knows its gradients by part
            self.set_gradient_accumulation_boundary = lambda is_last: None
            self.backward, self.step = torch.Tensor.backward, self.optimizer.step

    job, laps, engine = Lines(), [], Engine()
    (batches,) = job.batches(5, 6)
    figures, asked = update(
        engine, world, job, 5, batches, lr=0.125, seed=0, asks=lambda: {"written": True}, lap=laps.append
    )
    assert laps == ["data", "forward", "backward", "forward", "backward", "optimizer"]
    assert engine.optimizer.param_groups[0]["lr"] == 0.125 and asked == {"written": 1} and figures["loss"] > 0
