"""What a run tells: metrics.jsonl, TensorBoard, Weights & Biases if asked for, and a progress bar or plain lines."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .errors import InputError
from .files import as_json, in_words, is_lost
from .launching.launch import World
from .recipe.schema import Training
from .weights_and_biases import open_project

ERRORS = ("state_error", "state_error_without")
UNCOUNTED_STEPS = 3  # of each start: allocation, compilation and caches


class Clock:
    """Training time: evaluation, checkpoints and the first steps of a start do not count towards tokens per second."""

    def __init__(self) -> None:
        self._mark = time.perf_counter()
        self._steps = 0
        self.elapsed_s = 0.0
        self._counted_s = 0.0
        self._counted_tokens = 0

    def restart(self) -> None:
        """Leaves out what happened since the last step."""
        self._mark = time.perf_counter()

    def step(self, tokens: int) -> float | None:
        """Ends a step; returns its tokens per second, or None while they are not counted."""
        now = time.perf_counter()
        duration, self._mark = now - self._mark, now
        self.elapsed_s += duration
        self._steps += 1
        if self._steps <= UNCOUNTED_STEPS:
            return None
        self._counted_s += duration
        self._counted_tokens += tokens
        return tokens / duration

    @property
    def tokens_per_s(self) -> float | None:
        return self._counted_tokens / self._counted_s if self._counted_s else None


class Telemetry:
    """Writes on rank 0; on the others every call does nothing. ``floor``: the least that the loss can be, if not 0."""

    def __init__(
        self, folder: Path, world: World, first_step: int, total_steps: int, floor: float = 0.0,
        recipe: Training | None = None,
    ) -> None:  # fmt: skip
        self.active = world.is_first
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        metrics = folder / "metrics.jsonl"
        if metrics.exists():
            forget_after(metrics, first_step)
        self._file = metrics.open("a", encoding="utf-8")
        self._folder = folder / "tb"  # of TensorBoard, which opens its file again for all that it writes
        self._board = SummaryWriter(str(self._folder), purge_step=first_step + 1 if first_step else None)
        self._project = open_project(folder, recipe) if recipe and recipe.logging.wandb else None
        self._is_tty = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps, initial=first_step, unit="step", disable=not self._is_tty, dynamic_ncols=True, leave=True
        )
        self._first_step, self._total_steps = first_step, total_steps
        self._floor = f" (floor {floor:.4f})" if floor else ""
        self._started = self._printed = time.perf_counter()

    def record(self, kind: str, step: int, **values: Any) -> None:
        """One line of metrics.jsonl, on the disk's queue at once, and the numbers in it to the boards.

        Raises:
            InputError: the folder is gone.
        """
        if not self.active:
            return
        if not self._folder.is_dir():
            raise InputError(f"{self._folder}: gone, deleted or moved while the run trained; it ends at step {step}; "
                             "put it back and go on with resume=auto, or start the run again")  # fmt: skip
        self._file.write(as_json({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        figures = dict(numbers(kind, values))
        for name, number in figures.items():
            self._board.add_scalar(name, number, step)
        if self._project is not None:
            self._project.log(figures, step=step)

    def step(self, step: int, loss: float, tokens_per_s: float | None) -> None:
        """Moves the bar; without a terminal, a plain line every ten seconds."""
        if not self.active:
            return
        speed = f"{tokens_per_s:,.0f} tokens/s" if tokens_per_s else "..."
        self._bar.set_postfix_str(f"loss {in_words(loss, '.4f')}{self._floor}, {speed}", refresh=False)
        self._bar.update(step - self._bar.n)
        now = time.perf_counter()
        if not self._is_tty and (now - self._printed >= 10 or step in (self._first_step + 1, self._total_steps)):
            self._printed = now
            left = (now - self._started) / (step - self._first_step) * (self._total_steps - step)
            now_at = f"loss {in_words(loss, '.4f')}{self._floor}"
            self.say(f"step {step}/{self._total_steps}  {now_at}  {speed}  {duration(left)} left")

    def evaluation(self, step: int, figures: dict[str, Any]) -> None:
        self.record("eval", step, **figures)
        grids = {at: figures_at.get("parts", {"": figures_at})
                 for at, figures_at in {"": figures, **figures.get("ratios", {})}.items()}  # fmt: skip
        nll = [
            " ".join(filter(None, (at, part, name, in_words(grid[name], ".4f"))))
            for at, parts in grids.items() for part, grid in parts.items()
            for name in ("nll_unseen", "nll_seen") if grid.get(name) is not None
        ]  # fmt: skip
        found = [f"{name} {in_words(figures[name], '.4f')}" for name in ("contrastive", "retrieval") if name in figures]
        taught = [
            f"{name.replace('_', ' ')} {in_words(figures[name], '.4f')}"
            for name in ("alignment", "alignment_of_stretches") if figures.get(name) is not None
        ]  # fmt: skip
        read = [f"{name.replace('_', ' ')} {figures[name]:.4f}" for name in ERRORS if name in figures]
        texts = [f"nats per token: {', '.join(nll)}"] * bool(nll) + [f"pairs: {', '.join(found)}"] * bool(found)
        texts += [f"teacher: {', '.join(taught)}"] * bool(taught)
        texts += [f"states: {', '.join(read)}"] * bool(read)
        if not texts:  # of another job
            texts = [f"{name} {in_words(value, '.4f')}" for name, value in figures.items() if isinstance(value, float)]
        self.say(f"step {step}: held out, {'; '.join(texts)}")

    def say(self, text: str) -> None:
        """A line for the user, above the bar."""
        if self.active:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self.active:
            self._bar.close()
            self._board.close()
            if self._project is not None:
                self._project.finish()
            self._file.close()


def numbers(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every finite number inside, under its path: "eval/nll_by_t/t=0.10"."""
    if isinstance(value, dict):
        for name, inside in value.items():
            yield from numbers(f"{prefix}/{name}", inside)
    elif isinstance(value, int | float) and not is_lost(value):
        yield prefix, value


def read_history(metrics_file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none when there is no such file."""
    if not metrics_file.is_file():
        return []
    try:
        lines = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise InputError(f"{metrics_file}: not a file of JSON lines ({error}); restore it or move it away") from error
    if not all(isinstance(line, dict) and {"kind", "step"} <= line.keys() for line in lines):
        raise InputError(f"{metrics_file}: a line of it is not one of a run; restore it or move it away")
    return lines


def forget_after(metrics: Path, step: int) -> None:
    """Removes the lines after `step`, which will be written again, and what is no line: a crash may cut one in half."""
    kept = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            is_before = entry["step"] <= step and entry["kind"] != "end"
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if is_before:
            kept.append(line + "\n")
    replacement = metrics.with_suffix(".new")
    replacement.write_text("".join(kept), encoding="utf-8")
    replacement.replace(metrics)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
