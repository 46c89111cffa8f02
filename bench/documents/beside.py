"""Runs side by side: one figure a line, one run a column."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ...engine.errors import InputError
from ...engine.files import write_text
from ..analysis import gates
from ..analysis.known import Known, known_of
from ..figures.runs import held_out_figure
from ..measure.results import cell, write_results
from . import web

PUBLISHED = Path(__file__).parent.parent / "published.yaml"

# group, name of the figure, what it is, +1: more is better, -1: less is, 0: neither
LINES = (
    ("training", "num_parameters", "parameters", 0),
    ("training", "steps", "steps", 0),
    ("training", "tokens", "tokens read", 0),
    ("training", "train_seconds", "seconds of training", 0),
    ("held out", "heldout_nll", "NLL of tokens that the encoder did not see", -1),
    ("held out", "heldout_nll_seen", "NLL of tokens that it saw: copying", 0),
    ("held out", "unigram_entropy", "unigram entropy of the same text", 0),
    ("held out", "nll_below_unigram", "how far below it the model is", 1),
    ("held out", "concept_nats", "lost with the concepts of another text", 1),
    ("held out", "nll_without_concepts", "NLL without concepts", 0),
    ("what concepts do", "used_slots", "concepts that are missed", 1),
    ("what concepts do", "functional_rank", "functional rank", 1),
    ("what concepts do", "concepts_for_95", "concepts for 95 % of what all give", 0),
    ("what concepts read", "usage_perplexity", "concepts that share the text", 1),
    ("what concepts read", "js_divergence", "divergence of two, bits", 1),
    ("what concepts read", "read_width", "width, share of the text", 0),
    ("geometry", "num_concepts", "concepts", 0),
    ("geometry", "rank_dynamic", "entropy rank of what the text changes", 1),
    ("geometry", "static_fraction", "share of energy that no text changes", -1),
    ("geometry", "effective_rank", "the planning documents' rank of the mean concepts", 0),
    ("geometry", "effective_rank_normalized", "the same over the largest possible", 0),
    ("geometry", "similarity_mean", "mean absolute cosine of two concepts", 0),
    ("geometry", "similarity_max", "largest cosine of two concepts", 0),
    ("geometry", "dims_95", "directions with 95 % of the variance", 0),
    ("geometry", "participation_ratio_normalized", "participation ratio over the width", 0),
    ("geometry", "dominance", "share of the largest singular value", 0),
    ("geometry", "uniformity", "uniformity", 0),
    ("geometry", "twonn_pooled", "intrinsic dimension of the mean concept", 0),
)
SAME = ("text", "unigram_entropy")  # of two runs whose held-out figures may be compared
MARK = "†"  # before the name of a column that was published and not measured here


class Column(NamedTuple):
    name: str
    figures: dict[str, Any]
    known: Known | None  # None: published


def column_of(run: Path) -> Column:
    """
    Raises:
        InputError: there is no report of this run.
    """
    known = known_of(run)
    if not known.summary:
        raise InputError(f"{run}: no report yet; conceptron analyze {run} writes it")
    training = known.summary.get("training") or {}
    own = {name: training.get(name) for name in ("steps", "tokens", "train_seconds")}
    figures = {**known.figures, **own, "num_parameters": known.summary.get("num_parameters")}
    return Column(known.summary.get("name") or run.name, figures, known)


def published(path: Path = PUBLISHED) -> list[Column]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [
        Column(f"{MARK} {entry['name']}", {"num_concepts": entry["num_concepts"], **entry["figures"]}, None)
        for entry in content
    ]


def told_apart(columns: Sequence[Column], runs: Sequence[Path]) -> list[Column]:
    """Runs of one name get their folder's."""
    names = [column.name for column in columns]
    return [
        column if names.count(column.name) == 1 else column._replace(name=str(run))
        for column, run in zip(columns, runs, strict=True)
    ]


def beside(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """A line for each figure that any column has; the best of several runs is told by name."""
    lines = []
    for group, name, about, sense in LINES:
        values = {column.name: number(column.figures.get(name)) for column in columns}
        if all(value is None for value in values.values()):
            continue
        own = {c.name: values[c.name] for c in columns if c.known is not None and values[c.name] is not None}
        best = ""
        if sense and len(set(own.values())) > 1:
            best = (max if sense > 0 else min)(own, key=own.__getitem__)
        lines.append({"about": group, "figure": about, **values, "best": best})
    for score in dict.fromkeys(name for column in columns for name in column.figures if "/" in name):
        values = {column.name: number(column.figures.get(score)) for column in columns}
        lines.append({"about": "downstream", "figure": score, **values, "best": ""})
    passed = {column.name: gates_passed(column) for column in columns}
    lines.append({"about": "gates", "figure": "passed of measured", **passed, "best": ""})
    return lines


def number(value: Any) -> float | int | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def gates_passed(column: Column) -> str:
    if column.known is None:
        return ""
    own = [gate for gate in gates.read_gates() if not gate.is_seed]
    verdicts = gates.judge(column.known.figures, column.known.num_concepts or 1, own)
    counts = [verdict.verdict for verdict in verdicts]
    return f"{counts.count(gates.PASS)} of {counts.count(gates.PASS) + counts.count(gates.FAIL)}"


def warnings(columns: Sequence[Column]) -> list[str]:
    """What in these columns must not be compared."""
    own = [column for column in columns if column.known is not None]
    found = []
    if len({repr([column.known.summary.get(name) for name in SAME]) for column in own}) > 1:
        found.append("the runs were judged on other text or in other words: their NLLs and entropies do not compare")
    if len(own) < len(columns):
        found.append(f"{MARK} published in the planning documents: other text, words and protocol, 128 concepts")
    return found


def in_text(lines: Sequence[dict[str, Any]], columns: Sequence[Column]) -> str:
    """For a terminal: aligned, the best of the runs marked with a star."""
    names = [column.name for column in columns]
    rows = [["", *names]]
    for group in dict.fromkeys(line["about"] for line in lines):
        rows.append([group, *[""] * len(names)])
        for line in lines:
            if line["about"] == group:
                values = [("" if line[name] is None else cell(line[name])) + "*" * (line["best"] == name)
                          for name in names]  # fmt: skip
                rows.append([f"  {line['figure']}", *values])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = ["  ".join([row[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows]  # fmt: skip
    return "\n".join(line.rstrip() for line in text)


def write(folder: Path, lines: Sequence[dict[str, Any]], columns: Sequence[Column]) -> list[Path]:
    """``compare`` as page, JSON, CSV and Markdown, and the runs' held-out loss as a figure."""
    environment = {"compared": [column.name for column in columns], "warnings": warnings(columns)}
    write_results(folder, "compare", lines, environment, title="Runs side by side")
    curves = {c.name: c.known.history for c in columns if c.known is not None and c.known.history}
    has_curves = held_out_figure(curves, folder / "held_out.png")
    if not has_curves:
        (folder / "held_out.svg").unlink(missing_ok=True)
    shown = [{**line, **{c.name: "" if line[c.name] is None else line[c.name] for c in columns}} for line in lines]
    about = "; ".join([f"{len(columns)} columns; 'best' among the runs measured here", *warnings(columns)])
    body = "<header><h1>Runs side by side</h1></header>\n" + web.section(
        "Figures", about, web.card(web.table(shown)), web.pair(web.figure(folder, "held_out")),
    )  # fmt: skip
    write_text(folder / "compare.html", web.document("Runs side by side", body))
    return [folder / f"compare.{suffix}" for suffix in ("html", "md", "csv", "json")]

