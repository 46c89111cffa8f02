"""What is known about a run, as flat figures for the gates and for comparing runs."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...engine.errors import InputError
from ...engine.telemetry import read_history

LAST_STEPS = 10  # whose mean loss is "the last"


class Known(NamedTuple):
    figures: dict[str, float | None]
    num_concepts: int | None  # None: the run has no report
    summary: dict[str, Any]  # of its report; empty without one
    history: list[dict[str, Any]]  # the lines of metrics.jsonl


def known_of(run: Path) -> Known:
    """
    Raises:
        InputError: ``run`` is no folder of a run or checkpoint, or a file of it is damaged.
    """
    if not run.is_dir():
        raise InputError(f"{run}: no such folder; give a run folder such as runs/demo")
    report, metrics = run / "report" / "summary.json", run / "metrics.jsonl"
    if not report.is_file() and not metrics.is_file():
        raise InputError(f"{run}: neither a run (metrics.jsonl) nor a report (report/summary.json); "
                         f"conceptron analyze {run} writes a report")  # fmt: skip
    summary = read_summary(report) if report.is_file() else {}
    history = read_history(metrics)
    count = (summary.get("geometry") or {}).get("num_concepts")
    return Known(figures_of(summary, history) | scores_of(run / "evaluate"), count, summary, history)


def read_summary(path: Path, command: str = "analyze") -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); conceptron {command} writes it anew") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object; conceptron {command} writes it anew")
    return content


def scores_of(folder: Path) -> dict[str, float | None]:
    """TASK/METRIC -> score, of what ``conceptron evaluate --out FOLDER`` wrote; none where there is no such folder.

    Raises:
        InputError: a file of it is damaged.
    """
    found: dict[str, float | None] = {}
    for file in sorted(folder.rglob("metrics.json")):
        scores = read_summary(file, "evaluate").get("score")
        if not isinstance(scores, dict):
            raise InputError(f"{file}: expected the scores of a task; conceptron evaluate writes it anew")
        task = file.parent.relative_to(folder).as_posix()
        found |= {f"{task}/{name}": value for name, value in scores.items() if isinstance(value, int | float)}
    return found


def figures_of(summary: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Every figure by the name that gates and tables use; absent or None: not measured."""
    figures: dict[str, float | None] = dict(summary.get("geometry") or {})
    figures |= of_losses(summary.get("losses") or {})
    for part in ("reads", "does"):
        figures |= (summary.get(part) or {}).get("figures", {})
    return figures | of_training(history, summary.get("objective", ""))


def of_losses(losses: Mapping[str, Any]) -> dict[str, float | None]:
    nll, seen, others = (losses.get(name) for name in ("heldout_nll", "heldout_nll_seen", "nll_of_other_concepts"))
    entropy, own = losses.get("unigram_entropy"), nll if nll is not None else seen
    return {
        "heldout_nll": nll,
        "heldout_nll_seen": seen,
        "unigram_entropy": entropy,
        "nll_below_unigram": None if nll is None or entropy is None else entropy - nll,
        "concept_nats": None if own is None or others is None else others - own,
    }


def of_training(history: Sequence[Mapping[str, Any]], objective: str) -> dict[str, float | None]:
    steps = [line for line in history if line["kind"] == "train"]
    if not steps:
        return {}
    last = [line.get("task", line.get("loss")) for line in steps[-LAST_STEPS:]]
    losses = [loss for loss in last if loss is not None and math.isfinite(loss)]
    evaluation = next((line for line in reversed(history) if line["kind"] == "eval"), {})
    nll, pairs = evaluation.get("nll_unseen"), evaluation.get("num_pairs")
    return {
        "bad_steps": sum(line["kind"] == "bad_step" for line in history),
        "loss_above_floor": sum(losses) / len(losses) - steps[-1].get("smoothing_floor", 0.0) if losses else None,
        "mlm_loss": nll if objective == "mlm" else None,
        "suffix_loss": nll if objective == "prefix_diffusion" else None,
        "retrieval_over_chance": evaluation["retrieval"] * pairs if pairs and "retrieval" in evaluation else None,
    }
