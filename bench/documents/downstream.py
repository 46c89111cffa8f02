"""The page of a downstream table, as Markdown and as one HTML file that needs no other."""

import html
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ..measure.results import cell, environment_lines, markdown_table, read_results, write_text

COLUMNS = {  # of a row -> heading
    "row": "", "score": "score", "interval": "95 %", "spread over seeds": "sd of seeds", "learning rate": "rate",
    "examples": "examples", "documents": "documents", "tokens": "tokens seen", "beside it": "beside it",
}  # fmt: skip
NOTES = (
    "Scores are in percent. Intervals: bootstrap over examples, or over documents where several questions share one.",
    "Zeroed and shuffled: the same model without what it read, or with what it read elsewhere. What stays is not owed "
    "to the concepts.",
    "Beside: other models, evaluated by the same program into tables of their own.",
    "Quoted rows are what others published, mostly on the full test split; they were not measured here.",
)
FIGURES = ("downstream", "places")
COSTS = "What reading a document costs"
COSTS_NOTE = (
    "A text of so many tokens, the median of the task's documents and at most 8,192, once by the model and once by "
    "full attention (BERT through SDPA, random weights) of the same width and depth. CPU seconds of one process, and "
    "the MiB that its peak is above what it held before."
)
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#22262b}"
    "table{border-collapse:collapse;margin:.5rem 0 1.5rem;width:100%}td,th{padding:.25rem .6rem;text-align:right;"
    "border-bottom:1px solid #e3e6ea;font-variant-numeric:tabular-nums}td:first-child,td:last-child,th:first-child,"
    "th:last-child{text-align:left}tr.mine td{font-weight:600}tr.quoted td{color:#5b636e;font-style:italic}"
    "svg{max-width:100%;height:auto}h2{margin-top:2rem}pre{white-space:pre-wrap;overflow-wrap:anywhere}"
)


def write(folder: Path) -> None:
    """``report.md`` and ``report.html`` beside ``downstream.json``, from the result files alone."""
    rows, environment = read_results(folder / "downstream.json")
    title = f"Downstream: {environment['model']}"
    parts = [f"# {title}\n", *(f"{note}\n" for note in NOTES), *(f"![{name}]({name}.png)\n" for name in there(folder))]
    for task, mine in sections(rows):
        parts += [f"## {task}\n", markdown_table(mine, used(mine))]
    costs = costs_of(folder)
    if costs:
        parts += [f"## {COSTS}\n", f"{COSTS_NOTE}\n", markdown_table(costs, list(costs[0]))]
    write_text(folder / "report.md", "\n".join([*parts, environment_lines(environment)]))
    body = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(note)}</p>" for note in NOTES)]
    body += [drawing(folder / f"{name}.svg") for name in there(folder)]
    for task, mine in sections(rows):
        body += [f"<h2>{html.escape(task)}</h2>", html_table(mine, {name: COLUMNS[name] for name in used(mine)})]
    if costs:
        body += [f"<h2>{COSTS}</h2>", f"<p>{COSTS_NOTE}</p>", html_table(costs, {name: name for name in costs[0]})]
    body.append(f"<pre>{html.escape(environment_lines(environment))}</pre>")
    head = f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
    write_text(folder / "report.html", "\n".join([head, *body]))


def costs_of(folder: Path) -> list[dict[str, Any]]:
    return read_results(folder / "costs.json")[0] if (folder / "costs.json").is_file() else []


def there(folder: Path) -> list[str]:
    return [name for name in FIGURES if (folder / f"{name}.svg").is_file()]


def sections(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(task and metric, its rows as they are shown)"""
    for (task, metric), mine in groupby(rows, lambda row: (row["task"], row["metric"])):
        yield f"{task}, {metric}", [shown(row) for row in mine]


def shown(row: dict[str, Any]) -> dict[str, Any]:
    low, high, seen, given = (row.get(name) for name in ("low", "high", "tokens seen", "tokens given"))
    return row | {
        "interval": None if low is None else f"{low:.1f} to {high:.1f}",
        "tokens": None if given is None else f"{seen:,} of {given:,}",
    }


def used(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [name for name in COLUMNS if any(row.get(name) not in (None, "") for row in rows)]


def html_table(rows: Sequence[dict[str, Any]], titles: Mapping[str, str]) -> str:
    """``titles``: of the columns, by their names in the rows."""
    lines = ["<table>", f"<tr>{''.join(f'<th>{html.escape(title)}</th>' for title in titles.values())}</tr>"]
    for row in rows:
        who = row.get("row", "")
        kind = "quoted" if who.endswith("(quoted)") else "mine" if who in ("concepts", "encoder") else ""
        cells = "".join(f"<td>{html.escape(text(row.get(name)))}</td>" for name in titles)
        lines.append(f"<tr class='{kind}'>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def text(value: Any) -> str:
    return "" if value in (None, "") else cell(value)


def drawing(file: Path) -> str:
    """The figure itself, without the lines that only a file of its own needs."""
    content = file.read_text(encoding="utf-8")
    return content[content.index("<svg") :]
