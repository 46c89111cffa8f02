"""Predictions in the files that benchmarks take: SCROLLS' CSV and LongBench's JSONL."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..measure.results import write_json, write_text
from .metrics import scrolls

if TYPE_CHECKING:
    from .protocol import Outcome


def write(out: Path, outcomes: Sequence["Outcome"]) -> list[Path]:
    """``scrolls_predictions.csv`` (the leaderboard takes it with all seven tasks), and for LongBench
    ``pred/model/TASK.jsonl`` or ``pred_e/...`` with ``result.json`` beside them."""
    written = []
    of_scrolls = [each for each in outcomes if each.task.family == "scrolls" and each.task.short in scrolls.TASKS]
    if of_scrolls:
        written.append(out / "scrolls_predictions.csv")
        write_text(written[-1], scrolls_csv({each.task.short: each.predictions for each in of_scrolls}))
    for family, name in (("longbench", "pred"), ("longbench_e", "pred_e")):
        mine = [each for each in outcomes if each.task.family == family]
        for each in mine:
            written.append(out / name / "model" / f"{each.task.short}.jsonl")
            written[-1].parent.mkdir(parents=True, exist_ok=True)
            write_text(written[-1], longbench_lines(each.predictions, each.references))
        if mine:
            scores = {each.task.short: each.score if family == "longbench_e" else each.score["score"] for each in mine}
            write_json(out / name / "model" / "result.json", scores)
    return written


def scrolls_csv(predictions: dict[str, dict[str, str]]) -> str:
    """Task,ID,Prediction: a line each, tasks in the benchmark's order."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["Task", "ID", "Prediction"])
    for task in (name for name in scrolls.TASKS if name in predictions):
        writer.writerows([task, name, prediction] for name, prediction in predictions[task].items())
    return text.getvalue()


def longbench_lines(predictions: dict[str, str], references: dict[str, dict]) -> str:
    lines = [
        json.dumps({"pred": prediction, "answers": references[name]["answers"],
                    "all_classes": references[name].get("all_classes"), "length": references[name].get("length")},
                   ensure_ascii=False, allow_nan=False)
        for name, prediction in predictions.items()
    ]  # fmt: skip
    return "".join(f"{line}\n" for line in lines)
