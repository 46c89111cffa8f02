"""What a step says of its gradients, and that it says so without walking through the module again."""

import math

import pytest

from conceptron.engine.update import squares_by_part, title

from .conftest import views


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_norms_by_part_are_those_of_the_gradients_and_names_are_found_once(build, stage, monkeypatch):
    other, engine = build(stage), build(stage)
    named = [name for name, _ in engine.module.named_parameters()]
    for step, each in ((0, engine), (1, other), (2, engine)):
        view = views(step)[0]
        each.backward(each(view=view).loss)
        if step == 2:  # all is known of this engine
            monkeypatch.setattr(each.module, "named_parameters", lambda *_: pytest.fail("walked through again"))
        found = squares_by_part(each)
        assert set(found) == {title(name) for name in named} and all(math.isfinite(v) for v in found.values())
        total = math.sqrt(sum(float(square) for square in found.values()))
        if step == 2:
            monkeypatch.undo()
        each.step()
        assert total == pytest.approx(float(each.get_global_grad_norm()), rel=1e-5)
