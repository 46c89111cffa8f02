"""``conceptron gate RUN``: is this run worth going on with? PASS, FAIL or UNKNOWN a metric, and what to do next."""

import argparse
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .analysis import gates
from .analysis.known import known_of
from .measure.results import cell

SCALED_TO = 128  # concepts, where a run without a report does not say how many it has


def main(options: argparse.Namespace) -> int:
    """Prints the verdicts over RUN's report (``conceptron analyze``), its metrics.jsonl and its last evaluation.

    ``options``: run, a folder; strict: exit code 1 where a gate fails; seeds: also the planning documents' thresholds;
    file: another YAML file of gates than ``bench/gates.yaml``, or None.

    Raises:
        InputError: the run, or the file of gates, cannot be used.
    """
    known = known_of(Path(options.run))
    asked = gates.read_gates(Path(options.file) if options.file else None)
    verdicts = gates.judge(known.figures, known.num_concepts or SCALED_TO, asked)
    print(in_lines(verdicts, options.seeds, known.num_concepts))
    if not known.summary:
        print(f"\nno report yet: conceptron analyze {options.run} measures the rest")
    shown = [verdict for verdict in verdicts if options.seeds or not verdict.gate.is_seed]
    return int(options.strict and any(verdict.verdict == gates.FAIL for verdict in shown))


def in_lines(verdicts: Sequence[gates.Verdict], with_seeds: bool, num_concepts: int | None) -> str:
    own = [verdict for verdict in verdicts if not verdict.gate.is_seed]
    lines = [line for verdict in own for line in lines_of(verdict)]
    lines.append(counted(own))
    seeds = [verdict for verdict in verdicts if verdict.gate.is_seed]
    if with_seeds and seeds:
        lines += ["", "The planning documents' thresholds, for comparison with what was planned:"]
        lines += [line for verdict in seeds for line in lines_of(verdict)]
        lines += [counted(seeds), ""]
        for note in gates.contradictions(num_concepts or SCALED_TO):
            lines += textwrap.wrap(note, 118)
    return "\n".join(lines)


def lines_of(verdict: gates.Verdict) -> list[str]:
    gate = verdict.gate
    figure = "not measured" if verdict.value is None else cell(verdict.value)
    lines = [f"{verdict.in_short:<8} {gate.metric:<22} {figure}, wanted {verdict.wanted}"]
    about = [gate.means, f"source: {verdict.source}"]
    if verdict.verdict != gates.PASS:
        about.append(f"{'next' if verdict.verdict == gates.FAIL else 'why'}: {verdict.reason}")
    for text in about:
        lines += textwrap.wrap(text, 108, initial_indent=" " * 9, subsequent_indent=" " * 11)
    return lines


def counted(verdicts: Sequence[gates.Verdict]) -> str:
    counts = Counter(verdict.verdict for verdict in verdicts)
    return f"{counts[gates.PASS]} pass, {counts[gates.FAIL]} fail, {counts[gates.UNKNOWN]} unknown"
