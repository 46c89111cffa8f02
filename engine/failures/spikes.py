"""Steps whose loss or gradient norm is an outlier: said, skipped, or undone.

A step is compared with the `train.spike_window` steps before it: an outlier lies more than `train.spike_deviations`
standard deviations above their mean, in the loss or in the norm of the gradient. Nothing is judged before half a window
is there. Outliers do not enter the window. Objectives of a mixture have windows of their own.

`train.on_spike`:
    warn     it is recorded, and its update applied
    skip     its update is not applied: weights, moments and their step count stay
    rewind   the same; after STRETCH outliers in a row weights and moments go back to the last checkpoint before them.
             Steps go on counting, so their batches, and those since that checkpoint, are passed over for good

After STRETCH outliers in a row that were not undone, this is no spike but another level: the window begins anew.

What is compared has been summed over ranks, so every rank decides the same; windows are part of a checkpoint, so a
resumed run decides the same, too.
"""

import math
from statistics import fmean, pstdev
from typing import Any

from ..recipe.schema import Train

STRETCH = 4  # outliers in a row
LEAST_DEVIATION = 0.01  # of the mean: what is steadier than this is not looked at more closely
NAMES = ("loss", "gradient norm")


class Spikes:
    """One run's. The optimizer asks before it changes anything, so a skipped step costs nothing to undo."""

    def __init__(self, recipe: Train, state: dict[str, Any]) -> None:
        self.on, self.size, self.most = recipe.on_spike, recipe.spike_window, recipe.spike_deviations
        self.windows: dict[str, list[list[float]]] = {}  # objective -> losses, gradient norms
        self.first = self.in_a_row = 0  # of a stretch: the step with which it began, its length
        self.load(state)
        self.found: dict[str, Any] | None = None  # what is wrong with this step; set when its gradient is known
        self._step, self._key, self._loss, self._norm, self._is_judged = 0, "", math.nan, None, True

    def load(self, state: dict[str, Any]) -> None:
        self.windows = {key: [list(of) for of in each] for key, each in state.get("windows", {}).items()}
        self.first, self.in_a_row = state.get("first", 0), state.get("in_a_row", 0)

    def state(self) -> dict[str, Any]:
        windows = {key: [list(of) for of in each] for key, each in self.windows.items()}
        return {"windows": windows, "first": self.first, "in_a_row": self.in_a_row}

    def attach(self, engine: Any) -> None:
        """Lets the optimizer of a DeepSpeed engine ask. A gradient that is None is one that torch's optimizers skip."""
        if self.on == "ignore":
            return
        zero, kept = engine.optimizer, []

        def before(optimizer: Any, *_: Any) -> None:  # once for every group of parameters
            if self.is_refused(float(zero._global_grad_norm)):
                for group in optimizer.param_groups:
                    kept.extend((parameter, parameter.grad) for parameter in group["params"])
                    for parameter in group["params"]:
                        parameter.grad = None

        def after(*_: Any) -> None:
            for parameter, grad in kept:
                parameter.grad = grad  # DeepSpeed's, which may be a buffer that it uses again
            kept.clear()

        zero.optimizer.register_step_pre_hook(before)
        zero.optimizer.register_step_post_hook(after)

    def expect(self, step: int, objective: str, loss: float, norm: float | None = None) -> None:
        """What is known of a step, counted from 1, before its gradient is; ``norm``: of that, where DeepSpeed's is
        another (Muon)."""
        self._step, self._key, self._loss, self._norm = step, objective, loss, norm
        self._is_judged, self.found = False, None

    def is_refused(self, norm: float) -> bool:
        """Whether the update is not to be applied. Asked as often as one likes, a step is judged once."""
        if not self._is_judged:
            self._is_judged = True
            self._judge((self._loss, norm if self._norm is None else self._norm))
        return self.is_skipped

    def _judge(self, values: tuple[float, float]) -> None:
        if not all(map(math.isfinite, values)):  # DeepSpeed skips such a step itself
            return
        windows = self.windows.setdefault(self._key, [[], []])
        limits = [self._limit(window) for window in windows]
        outliers = [i for i in range(2) if values[i] > limits[i]]
        if not outliers:
            self.in_a_row = 0
            for window, value in zip(windows, values, strict=True):
                window.append(value)
                del window[: -self.size]
            return
        self.first = self._step if self.in_a_row == 0 else self.first
        self.in_a_row += 1
        which = outliers[0]
        self.found = {
            "what": NAMES[which], "value": values[which], "limit": limits[which], "mean": fmean(windows[which]),
            "deviation": pstdev(windows[which]), "window": len(windows[which]), "in_a_row": self.in_a_row,
            "action": {"warn": "none", "skip": "skipped", "rewind": "skipped"}[self.on],
        }  # fmt: skip

    def _limit(self, window: list[float]) -> float:
        if 2 * len(window) < self.size:
            return math.inf
        mean = fmean(window)
        return mean + self.most * max(pstdev(window), LEAST_DEVIATION * abs(mean))

    @property
    def is_skipped(self) -> bool:
        """Whether this step's update was not applied."""
        return self.found is not None and self.on in ("skip", "rewind")

    @property
    def is_open(self) -> bool:
        """Whether this may be undone. What would be saved now is no place to go back to, and might push one out."""
        return self.on == "rewind" and self.in_a_row > 0

    @property
    def is_stretch(self) -> bool:
        """Whether this step's outlier makes a stretch of them."""
        return self.found is not None and self.in_a_row >= STRETCH

    def begin_anew(self) -> None:
        """At another level: the windows of this objective are emptied."""
        self.windows[self._key], self.in_a_row = [[], []], 0

    def in_words(self) -> str:
        found = self.found or {}
        what, window = found["what"], found["window"]
        text = f"step {self._step}: {what} {found['value']:.4g}, above {found['limit']:.4g}, "
        text += f"{self.most:g} deviations over the mean of {window} steps ({found['mean']:.4g})"
        return text + ("; its update was not applied" if found["action"] == "skipped" else "")
