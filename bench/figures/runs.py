"""Figures of the evaluations of a run, and of several runs over each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import plot


def held_out_figure(histories: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> bool:
    """The held-out NLL of each run at its evaluations, against the tokens read; whether there was any to draw.

    ``histories``: the lines of metrics.jsonl by the run's name. What the encoder did not see, or else what it saw.
    """
    lines = {name: points(history) for name, history in histories.items()}
    lines = {name: found for name, found in lines.items() if found}
    if not lines:
        return False
    with plot.canvas(path, "Held-out text", "nats per token at each evaluation", size=(6.4, 4.6)) as (axes,):
        for i, (name, found) in enumerate(lines.items()):
            tokens, values = zip(*found, strict=True)
            style = ("-", "--", ":", "-.")[i // len(plot.SERIES) % 4]
            axes.plot([n / 1e6 for n in tokens], values, style, marker="o", markersize=4,
                      color=plot.SERIES[i % len(plot.SERIES)], label=name)  # fmt: skip
        plot.span(axes, [value for found in lines.values() for _, value in found])
        axes.set(xlabel="million tokens read", ylabel="nats per token")
        plot.legend_below([axes])
    return True


def points(history: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(tokens read, held-out NLL) of each evaluation."""
    read = {line["step"]: line.get("tokens") for line in history if line["kind"] == "train"}
    found = []
    for line in history:
        if line["kind"] != "eval" or read.get(line["step"]) is None:
            continue
        value = line.get("nll_unseen") if line.get("nll_unseen") is not None else line.get("nll_seen")
        if value is not None:
            found.append((read[line["step"]], value))
    return found


HEALTH = (("rank_dynamic", "rank of what texts change"), ("static_fraction", "static share"),
          ("similarity_mean", "mean |cosine|"))  # fmt: skip


def health_figure(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """What every evaluation saw of the concepts, against the steps; whether there were two evaluations to draw."""
    seen = [(line["step"], line["concepts"]) for line in history if line["kind"] == "eval" and line.get("concepts")]
    kinds = [(name, title) for name, title in HEALTH if all(name in figures for _, figures in seen)]
    if len(seen) < 2 or not kinds:
        return False
    note = f"{seen[-1][1]['num_texts']} held-out texts at each evaluation, as the task's easiest view shows them"
    with plot.canvas(path, "The concepts during training", note, size=(9.2, 3.4), columns=len(kinds)) as panels:
        for axes, (name, title), colour in zip(panels, kinds, plot.SERIES, strict=False):
            values = [figures[name] for _, figures in seen]
            axes.plot([step for step, _ in seen], values, "o-", color=colour, markersize=4)
            axes.set_title(title, fontsize=10.5)
            axes.set_xlabel("step")
            axes.set_ylim(0, 1.1 * max(values) or 1)
            plot.thousands(axes)
    return True
