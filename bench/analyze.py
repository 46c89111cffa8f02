"""The report of a training run, or of a bare checkpoint: report.md, figures and summary.json.

Everything in it is read from the run's files or measured here on held-out text; nothing is estimated.
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..engine.errors import InputError
from ..engine.files import is_lost, write_json, write_text
from ..models.masked_lm import smoothing_floor
from .analysis.findings import (
    NATS,
    Findings,
    find,
    label_smoothing,
    num_parameters,
    objective_name,
    run_environment,
    targets_line,
    training_line,
    vocab_size,
)
from .analysis.subject import open_subject
from .documents.page import markdown
from .figures import curves
from .figures import geometry as plots


def analyze(path: str | Path, text: Sequence[str] = ()) -> Path:
    """Writes the report of a run folder or a checkpoint into its ``report/`` and prints a summary.

    Args:
        path: a run folder (recipe.yaml, model/, metrics.jsonl), or a Hugging Face folder of a concept encoder or of a
            model that has one.
        text: files, folders or globs of held-out text. Left out: a run's own validation split; for a bare checkpoint
            that of ``pydocs``.

    Returns:
        The report's folder: report.md, summary.json, loss.png (runs), nll.png, similarity.png, spectrum.png.

    Raises:
        InputError: the folder is neither, the run has not finished, or the text cannot be used.
    """
    subject = open_subject(Path(path), text)
    folder = subject.folder / "report"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}); copy {path} to a folder of your own") from error
    findings = find(subject)
    for figure in draw(findings, folder):
        if not figure.is_file():
            raise RuntimeError(f"{figure} was not written")
    write_json(folder / "summary.json", summary(findings))
    write_text(folder / "report.md", markdown(findings))
    print(headline(findings, folder))
    return folder


def main(options: argparse.Namespace) -> None:
    """The command line."""
    analyze(options.path, options.text)


def draw(findings: Findings, folder: Path) -> list[Path]:
    """Draws every figure that there are data for, and removes older ones that there are none for."""
    paths = {name: folder / f"{name}.png" for name in ("loss", "nll", "similarity", "spectrum")}
    for path in paths.values():
        path.unlink(missing_ok=True)
    drawn = [paths["similarity"], paths["spectrum"]]
    plots.similarity_figure(findings.concepts.values, paths["similarity"])
    plots.spectrum_figure(findings.concepts.values, paths["spectrum"])
    losses = findings.losses
    if findings.training:
        entropy = losses.unigram_entropy if losses else None
        curves.loss_figure(
            findings.history, paths["loss"], training_line(findings), unigram_entropy=entropy,
            smoothing_floor=smoothing_floor(label_smoothing(findings.subject), vocab_size(findings.subject)),
        )  # fmt: skip
        drawn.append(paths["loss"])
    if losses:
        levels = {
            "unigram entropy of this text": losses.unigram_entropy,
            "unigram of the training text": losses.train_unigram,
        }
        levels = {name: value for name, value in levels.items() if value is not None and not losses.is_seen}
        curves.nll_figure(losses.nll_by_view, levels, paths["nll"], targets_line(losses), is_seen=losses.is_seen)
        drawn.append(paths["nll"])
    return drawn


def summary(findings: Findings) -> dict[str, Any]:
    """What scripts want of a report. NLLs and entropies in nats per token; None is "not measured"."""
    subject, losses, training = findings.subject, findings.losses, findings.training
    return {
        "name": subject.name,
        "objective": objective_name(subject),
        "num_parameters": num_parameters(subject),
        "text": subject.text,
        "heldout_nll": losses.heldout_nll if losses else None,
        "unigram_entropy": losses.unigram_entropy if losses else None,
        "effective_rank": findings.geometry["effective_rank"],
        "train_seconds": training.train_seconds if training else None,
        "losses": asdict(losses) if losses else None,
        "training": training._asdict() if training else None,
        "geometry": findings.geometry,
        "gates": [
            {
                "source": verdict.gate.source, "metric": verdict.gate.key, "sense": verdict.gate.sense,
                "threshold": verdict.threshold, "value": verdict.value, "verdict": verdict.verdict,
                "reason": verdict.reason,
            }
            for verdict in findings.verdicts
        ],
        "samples": [sample._asdict() for sample in findings.samples],
        "trained_in": run_environment(subject.folder) or None,
        "environment": findings.environment,
    }  # fmt: skip


def headline(findings: Findings, folder: Path) -> str:
    subject, losses, geometry, training = findings.subject, findings.losses, findings.geometry, findings.training
    rows = []
    if training:
        speed = f", {training.tokens_per_s:,.0f} tokens/s" if training.tokens_per_s else ""
        rows.append(("training", training_line(findings) + speed))
    if losses and is_lost([losses.heldout_nll_seen if losses.is_seen else losses.heldout_nll]):
        rows.append(("held-out NLL", "not finite"))
    elif losses and losses.is_seen:
        rows.append(("held-out NLL", f"{losses.heldout_nll_seen:.3f} {NATS}, of tokens that the encoder SAW (copying)"))
    elif losses:
        below = losses.unigram_entropy - losses.heldout_nll
        place = f"{below:.2f} below" if below >= 0 else f"{-below:.2f} ABOVE"
        entropy = f"{place} the unigram entropy of the same text, {losses.unigram_entropy:.3f}"
        rows.append(("held-out NLL", f"{losses.heldout_nll:.3f} {NATS} (unseen tokens), {entropy}"))
    rows.append(("concepts", concepts_line(geometry)))
    counts = Counter(verdict.verdict for verdict in findings.verdicts)
    rows.append(("gates", f"{counts['PASS']} of {counts['PASS'] + counts['FAIL']} pass"))
    figures = sorted(path.name for path in folder.glob("*.png"))
    rows += [("report", folder / "report.md"), ("figures", ", ".join(str(folder / name) for name in figures))]
    rows.append(("summary", folder / "summary.json"))
    return "\n".join([f"{subject.name}", *(f"  {name:<13} {value}" for name, value in rows)])


def concepts_line(geometry: Mapping[str, float]) -> str:
    return (
        f"effective rank {geometry['effective_rank']:.1f} of {geometry['num_concepts']}; what the text changes has "
        f"rank {geometry['rank_dynamic']:.1f} and {100 * (1 - geometry['static_fraction']):.0f} % of the energy"
    )
