"""Outliers among steps: found, skipped so that nothing is left of them, undone by going back."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from conceptron.engine.checkpoints import checkpoint
from conceptron.engine.data.loader import Loader
from conceptron.engine.errors import InputError
from conceptron.engine.failures.spikes import STRETCH, Spikes
from conceptron.engine.recipe.schema import Train
from conceptron.engine.telemetry import Telemetry
from conceptron.engine.trainer import train

QUIET = [10.0, 10.3, 9.8, 10.1, 9.9, 10.2, 10.0, 9.7]


def spikes(on: str = "skip", **state) -> Spikes:
    return Spikes(Train(steps=1, on_spike=on, spike_window=8, spike_deviations=6), state)


def see(one: Spikes, step: int, loss: float, norm: float = 1.0, objective: str = "") -> bool:
    one.expect(step, objective, loss)
    return one.is_refused(norm)


@pytest.fixture
def warm() -> Spikes:
    one = spikes()
    assert not any(see(one, step, loss) for step, loss in enumerate(QUIET))
    return one


def test_an_outlier_lies_far_above_the_mean_and_does_not_enter_the_window(warm):
    mean, deviation = 10.0, torch.tensor(QUIET, dtype=torch.float64).std(correction=0).item()
    assert not see(warm, 8, 10.0 + 5.9 * deviation)
    warm = spikes(**warm.state())  # as a resumed run has it: every number, to the last bit
    low, high = warm.state()["windows"][""][0], mean
    assert len(low) == 8 and low[-1] == 10.0 + 5.9 * deviation
    assert see(warm, 9, 30.0) and warm.is_skipped
    assert warm.found["what"] == "loss" and warm.found["value"] == 30.0 and warm.found["window"] == 8
    assert warm.state()["windows"][""][0] == low
    assert "step 9: loss 30, above " in warm.in_words() and "its update was not applied" in warm.in_words()
    assert not see(warm, 10, 0.01) and not warm.is_skipped  # far below is no harm
    assert see(warm, 11, high, norm=1.1) and warm.found["what"] == "gradient norm"
    assert not see(warm, 12, high, norm=1.05)  # 6 deviations of a hundredth, where nothing moves


def test_nothing_is_judged_before_half_a_window_is_there_nor_what_is_not_finite():
    one = spikes()
    assert not any(see(one, step, loss) for step, loss in enumerate((1.0, 1.0, 1.0, 100.0)))
    assert not see(one, 4, float("nan")) and len(one.state()["windows"][""][0]) == 4
    assert not see(one, 5, 1000.0, objective="mlm")  # of a window of its own


def test_a_stretch_of_them_is_another_level(warm):
    assert [see(warm, 10 + i, 50.0) for i in range(STRETCH)] == [True] * STRETCH
    assert warm.is_stretch and warm.first == 10
    warm.begin_anew()
    assert not any(see(warm, 20 + i, 50.0 + i % 2) for i in range(8)) and see(warm, 30, 90.0)


@pytest.mark.parametrize("on", ["warn", "skip"])
def test_a_skipped_update_leaves_nothing_behind(on):
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW([{"params": [each]} for each in parameters], lr=0.1, fused=True)
    zero = SimpleNamespace(optimizer=optimizer, _global_grad_norm=1.0)
    one = spikes(on)
    one.attach(SimpleNamespace(optimizer=zero))

    def step(number: int, loss: float) -> None:
        one.expect(number, "", loss)
        for group, parameter in zip(groups, parameters, strict=True):  # group by group, as DeepSpeed does
            optimizer.param_groups = [group]
            parameter.grad = torch.full_like(parameter, loss)
            optimizer.step()
            assert parameter.grad.eq(loss).all()
        optimizer.param_groups = groups

    groups = optimizer.param_groups
    for number, loss in enumerate(QUIET):
        step(number, loss)
    before = [each.detach().clone() for each in parameters]
    moments = [optimizer.state[each]["exp_avg"].clone() for each in parameters]
    step(8, 99.0)
    is_same = [torch.equal(a, b) for a, b in zip(before, parameters, strict=True)]
    is_same += [torch.equal(a, optimizer.state[b]["exp_avg"]) for a, b in zip(moments, parameters, strict=True)]
    assert is_same == [on == "skip"] * 4 and one.found["action"] == ("skipped" if on == "skip" else "none")
    assert optimizer.state[parameters[0]]["step"] == 8 + (on == "warn")


# --- whole runs

FEW_PARTS = ["batch.tokens=96", "eval.tokens=64"]  # stage 3 takes a fifth of a second for each
WATCHED = ["train.spike_window=8", "train.spike_deviations=200", "train.steps=16", "eval.every=0"]


def entries(folder, kind: str = "train") -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def history(folder, after: int = 0) -> list[tuple]:
    return [(e["step"], e["loss"].hex(), float(e["grad_norm"]).hex()) for e in entries(folder) if e["step"] > after]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture
def scaled(monkeypatch):
    """The targets of these steps, counted from 1, weigh so much more."""
    make, factors = Loader.step, {}

    def step(self, number):
        factor = factors.get(number + 1, 1.0)
        views = make(self, number)
        return views if factor == 1 else [replace(view, weights=view.weights * factor) for view in views]

    monkeypatch.setattr(Loader, "step", step)
    return factors


def test_a_skipped_step_is_as_one_that_deepspeed_skips(recipe, scaled, capfd):
    scaled[10] = 1000.0
    watched = [*WATCHED, "train.steps=12"]
    skipped = train(recipe, [*watched, "train.on_spike=skip"])
    (spike,) = entries(skipped, "spike")
    assert spike["step"] == 10 and spike["action"] == "skipped" and spike["windows"] and spike["window"] == 8
    assert "step 10: loss " in capfd.readouterr().err
    assert checkpoint.load_progress(skipped / "checkpoints" / "step-00000012").optimizer_steps == 11
    scaled[10] = float("nan")
    by_deepspeed = train(recipe, [*watched, "train.on_spike=ignore", "run.name=nan"])
    assert history(skipped, 10) == history(by_deepspeed, 10)
    scaled[10] = 1000.0
    warned = train(recipe, [*watched, "run.name=warned"])
    assert entries(warned, "spike")[0]["action"] == "none" and history(warned, 10) != history(skipped, 10)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_stretch_is_undone_and_passed_over(recipe, scaled, stage, monkeypatch, capfd):
    """Steps 10 to 13 are outliers; training goes on from the weights of step 8 with the batches of step 14."""
    scaled.update(dict.fromkeys((10, 11, 12, 13), 1000.0))
    common = [*WATCHED, f"zero.stage={stage}", *(FEW_PARTS if stage == 3 else [])]
    of_rewind = [*common, "train.on_spike=rewind", "checkpoint.every=4"]
    rewound = train(recipe, of_rewind)
    assert [e["step"] for e in entries(rewound, "spike")] == [10, 11, 12, 13]
    (told,) = entries(rewound, "rewind")
    assert (told["step"], told["to"], told["first"]) == (13, 8, 10)
    assert "step 13: back to the weights of step-00000008; batches up to here are passed over" in capfd.readouterr().err
    scaled.update(dict.fromkeys((9, 10, 11, 12, 13), float("nan")))
    by_deepspeed = ["train.on_spike=ignore", "train.max_bad_steps=9", "run.name=nan"]
    expected = train(recipe, [*common, *by_deepspeed])
    assert history(rewound, 13) == history(expected, 13)
    assert all(torch.equal(value, weights(expected)[name]) for name, value in weights(rewound).items())

    if stage == 3:
        return
    scaled.clear()
    scaled.update(dict.fromkeys((10, 11, 12, 13), 1000.0))
    report = Telemetry.step
    monkeypatch.setattr(Telemetry, "step", lambda self, step, *rest: 1 / 0 if step == 15 else report(self, step, *rest))
    with pytest.raises(ZeroDivisionError):
        train(recipe, [*of_rewind, "run.name=again"])
    monkeypatch.setattr(Telemetry, "step", report)
    again = train(recipe, [*of_rewind, "run.name=again", "resume=auto"])  # from step 8: nothing is saved in a stretch
    assert history(again) == history(rewound) and len(entries(again, "rewind")) == 1


def test_without_a_checkpoint_to_go_back_to_it_goes_on(recipe, scaled, capfd):
    scaled.update(dict.fromkeys((10, 11, 12, 13), 1000.0))
    folder = train(recipe, [*WATCHED, "train.on_spike=rewind", "checkpoint.every=0"])
    assert len(entries(folder)) == 16 and not entries(folder, "rewind")
    said = capfd.readouterr().err
    assert "there is no checkpoint from before step 10 to go back to" in said and "compared with what comes" in said


def test_a_run_that_only_rises_ends(recipe, scaled):
    scaled.update({step: 1000.0 for step in range(10, 60)})
    with pytest.raises(InputError, match=r"after 3 times back to step-00000008 the loss rises again; lower optim.lr"):
        train(recipe, [*WATCHED, "train.steps=60", "train.on_spike=rewind", "checkpoint.every=8"])
