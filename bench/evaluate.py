"""``conceptron evaluate --task NAME[,NAME] --model DIR_OR_HUB_ID [data=DIR]``: a model on tasks, under one protocol.

    OUT/TASK/predictions.json references.json metrics.json     of every task; in SCROLLS' and LongBench's own form too
    OUT/downstream.json .csv .md                                one table: scores, intervals, floors, published figures
    OUT/downstream.png .svg, places.png .svg                    the same drawn; synthetic tasks against length
    OUT/costs.json .csv .md                             with --costs: time and memory of a document
    OUT/report.md .html                                         all of it as one page

What an earlier evaluation of the same weights left in OUT of other tasks stays in the tables.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..engine.errors import InputError
from ..engine.labelled.task import expand, load_task
from .documents import downstream as page
from .downstream import cost, figures, seeds, submission
from .downstream.figures import BESIDE, MODELS
from .downstream.grid import PEER, tuned
from .downstream.protocol import Outcome, Settings, run
from .downstream.readers import BAG, UNTRAINED, PeerReader, open_reader
from .measure.environment import environment
from .measure.results import markdown_table, read_results, write_json, write_results

COLUMNS = ("task", "row", "metric", "score", "low", "high", "spread over seeds", "learning rate", "examples",
           "documents", "tokens seen", "tokens given", "beside it")  # fmt: skip
FIELDS = {  # field -> what is asked for
    "data": "a folder", "cache": "a folder", "train": "splits", "report": "splits", "piece": "tokens",
    "concepts": "a whole number", "answer": "written", "seeds": "a whole number", "finetune": "a recipe",
    "rates": "learning rates with commas between", "without": "floors with commas between",
    "beside": "folders of earlier evaluations with commas between",
}  # fmt: skip
FLOORS = {"bag": BAG, "untrained": UNTRAINED}  # a word of the command line -> the row's name


def main(options: argparse.Namespace) -> int:
    """Evaluates, writes and prints the table.

    Args:
        options: ``task`` (names with commas between them), ``model`` (a folder or a hub id), ``settings`` (FIELD=VALUE,
            see FIELDS), ``limit`` (pairs, or documents, of a task; None: all), ``no_floors`` (only the model),
            ``protocol`` (None or "seeds"), ``costs``, ``out``.

    Raises:
        InputError: one line: an unknown task, a model that cannot be read, data that are missing or broken.
    """
    given = settings_of(options.settings)
    if options.protocol == "seeds":
        given = by_seeds(given)
    names = expand(options.task)
    tasks = [load_task(name) for name in names]
    settings = Settings(
        data=Path(given["data"]).expanduser() if "data" in given else None, limit=options.limit,
        train=tuple(given.get("train", "").split(",")) if given.get("train") else (),
        report=tuple(given.get("report", "").split(",")) if given.get("report") else (),
        seeds=whole_number(given, "seeds", 3), with_floors=not options.no_floors,
        written=is_written(given),
    )  # fmt: skip
    how = (whole_number(given, "piece", 0) or None, given.get("cache"), whole_number(given, "concepts", 0) or None)
    reader, floors = open_reader(options.model, *how)
    floors = without(given, floors)
    peers = beside(given)
    stamp = environment() | {"model": options.model, "piece": how[0], "limit": options.limit,
                             "weights": reader.fingerprint}  # fmt: skip
    out = Path(options.out)
    rows, places, costs = (earlier(out, name, names, stamp) for name in ("downstream", "places", "costs"))
    stamp["earlier commands"] = commands_before(out, stamp)
    outcomes: list[Outcome] = []
    of_seeds = options.protocol == "seeds"
    reports = [seeds.report_of(task) if of_seeds and not settings.report else settings.report for task in tasks]
    for task, report in zip(tasks, reports, strict=True):
        mine, others, chosen = reader, [], None
        settings = replace(settings, report=report)
        if "finetune" in given:
            fixed = seeds.overrides(task, reader, settings.train, settings.data, settings.limit) if of_seeds else []
            fixed += PEER if isinstance(reader, PeerReader) else ()
            chosen = tuned(given["finetune"], task, options.model, settings, out / task.name / "runs",
                           rates_of(given), fixed)
            mine, *others = [open_reader(str(run), *how)[0] for run in chosen.folders]
        outcome = run(task, settings, mine, floors, others)
        if chosen is not None:
            outcome.rows[0]["learning rate"] = chosen.lr
        outcome.rows += [row for row in peers if row["task"] == task.name]
        outcomes.append(outcome)
        write_outcome(out / task.name, outcome, stamp)
        rows += outcome.rows
        places += [{"task": task.name, **each} for each in outcome.places]
        if options.costs:
            costs.append({"task": task.name, **cost.of_document(options.model, outcome.median_tokens)})
            write_results(out, "costs", costs, stamp, title="What reading a document costs")
        print(markdown_table(outcome.rows, shown(outcome.rows)), flush=True)
        write_results(out, "downstream", rows, stamp, title=f"Downstream: {options.model}", columns=shown(rows))
    if places:
        write_results(out, "places", places, stamp, title="By length and depth")
    submission.write(out, outcomes)
    figures.draw(out)
    page.write(out)
    print(f"written to {out}")
    return 0


def earlier(out: Path, name: str, tasks: Sequence[str], stamp: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows in ``out`` of other tasks than these, if the same weights were evaluated."""
    path = out / f"{name}.json"
    rows, before = read_results(path) if path.is_file() else ([], {})
    return [row for row in rows if before.get("weights") == stamp["weights"] and row["task"] not in tasks]


def commands_before(out: Path, stamp: Mapping[str, Any]) -> list[str] | None:
    path = out / "downstream.json"
    before = read_results(path)[1] if path.is_file() else {}
    if before.get("weights") != stamp["weights"]:
        return None
    commands = [*(before.get("earlier commands") or []), before["command"]]
    return [each for each in dict.fromkeys(commands) if each != stamp["command"]]


def by_seeds(given: dict[str, str]) -> dict[str, str]:
    """
    Raises:
        InputError: something is given that the protocol fixes.
    """
    fixed = {"finetune": seeds.RECIPE, "rates": str(seeds.RATE), "seeds": "1"}
    for name in fixed.keys() & given.keys():
        raise InputError(f"{name}={given[name]}: --protocol seeds has {name}={fixed[name]}; leave it out")
    return given | fixed


def settings_of(texts: Sequence[str]) -> dict[str, str]:
    """
    Raises:
        InputError: no FIELD=VALUE, or another field.
    """
    found = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or name not in FIELDS or not value:
            expected = ", ".join(f"{field}={what}" for field, what in FIELDS.items())
            raise InputError(f"{text!r}: expected {expected}")
        found[name] = value
    return found


def whole_number(given: dict[str, str], name: str, default: int) -> int:
    value = given.get(name, str(default))
    if not re.fullmatch(r"\d+", value) or (name in given and int(value) < 1):
        raise InputError(f"{name}={value}: expected {FIELDS[name]}, at least 1")
    return int(value)


def without(given: dict[str, str], floors: dict[str, Any]) -> dict[str, Any]:
    """The floors that are read, which takes as long as the model itself, but for those that are left out."""
    named = [name.strip() for name in given["without"].split(",")] if "without" in given else []
    for name in named:
        if name not in FLOORS:
            raise InputError(f"without={name}: expected of {', '.join(FLOORS)}")
    return {name: floor for name, floor in floors.items() if name not in [FLOORS[each] for each in named]}


def beside(given: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of other models, as they were evaluated into these folders, by the names of their models.

    Raises:
        InputError: there is no table in a folder.
    """
    found = []
    for name in given["beside"].split(",") if "beside" in given else []:
        path = Path(name.strip()).expanduser() / "downstream.json"
        if not path.is_file():
            raise InputError(f"beside={name}: expected a folder that conceptron evaluate wrote, there is no {path}")
        rows, stamp = read_results(path)
        place = Path(stamp["model"])
        label = place.parent.name if place.name == "model" else place.name  # of a run its own name
        found += [{**row, "row": f"{label}{BESIDE}"} for row in rows if row["row"] in MODELS]
    return found


def is_written(given: dict[str, str]) -> bool:
    if given.get("answer", "written") != "written":
        raise InputError(f"answer={given['answer']}: expected {FIELDS['answer']}, or nothing")
    return "answer" in given


def rates_of(given: dict[str, str]) -> list[float]:
    try:
        rates = [float(text) for text in given.get("rates", "1e-3").split(",")]
    except ValueError:
        rates = []
    if not rates or min(rates) <= 0:
        raise InputError(f"rates={given['rates']}: expected {FIELDS['rates']}, above 0, such as 3e-4,1e-3")
    return rates


def shown(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [column for column in COLUMNS if any(row.get(column) not in (None, "") for row in rows)]


def write_outcome(folder: Path, outcome: Outcome, stamp: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "predictions.json", outcome.predictions)
    write_json(folder / "references.json", outcome.references)
    write_json(folder / "metrics.json", {"score": outcome.score, "rows": outcome.rows, "places": outcome.places,
                                         "task": outcome.task.model_dump(), "environment": stamp})  # fmt: skip
