"""The report of a training run, or of a bare checkpoint: one page, report.md, figures and summary.json.

Everything in it is read from the run's files or measured here on held-out text; nothing is estimated.
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..engine.errors import InputError
from ..engine.files import is_lost, write_json, write_text
from ..models.masked_lm import smoothing_floor
from .analysis.findings import NATS, Findings, find, label_smoothing, targets_line, training_line, vocab_size
from .analysis.gates import FAIL, PASS, UNKNOWN
from .analysis.subject import open_subject
from .documents.page import markdown
from .documents.summary import schema, summary
from .documents.web import page
from .figures import concepts, curves, runs
from .figures import geometry as plots
from .figures import losses as ablations
from .figures.plot import SUFFIXES


def analyze(path: str | Path, text: Sequence[str] = ()) -> Path:
    """Writes the report of a run folder or a checkpoint into its ``report/`` and prints a summary.

    Args:
        path: a run folder (recipe.yaml, model/, metrics.jsonl), or a Hugging Face folder of a concept encoder or of a
            model that has one.
        text: files, folders or globs of held-out text. Left out: a run's own validation split; for a bare checkpoint
            that of ``pydocs``.

    Returns:
        The report's folder: page.html, report.md, summary.json with its schema, and every figure as PNG and SVG.

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
    write_json(folder / "summary.schema.json", schema())
    write_text(folder / "report.md", markdown(findings))
    write_text(folder / "page.html", page(findings, folder))
    print(headline(findings, folder))
    return folder


def main(options: argparse.Namespace) -> None:
    """The command line."""
    analyze(options.path, options.text)


FIGURES = (
    "loss", "nll", "health", "reading", "usage", "dropped", "kept", "ratio", "probes", "spectrum", "clusters",
    "similarity",
)  # fmt: skip


def draw(findings: Findings, folder: Path) -> list[Path]:
    """Draws every figure that there are data for, as PNG (whose paths it returns) and SVG, and removes older ones that
    there are none for."""
    paths = {name: folder / f"{name}.png" for name in FIGURES}
    for path in paths.values():
        for suffix in SUFFIXES:
            path.with_suffix(f".{suffix}").unlink(missing_ok=True)
    drawn = [paths["similarity"], paths["spectrum"], paths["clusters"]]
    plots.similarity_figure(findings.concepts.values, paths["similarity"])
    plots.spectrum_figure(findings.concepts.values, paths["spectrum"])
    concepts.clusters_figure(findings.concepts.values, paths["clusters"])
    losses = findings.losses
    if findings.training:
        entropy = losses.unigram_entropy if losses else None
        curves.loss_figure(
            findings.history, paths["loss"], training_line(findings), unigram_entropy=entropy,
            smoothing_floor=smoothing_floor(label_smoothing(findings.subject), vocab_size(findings.subject)),
        )  # fmt: skip
        drawn.append(paths["loss"])
        if runs.health_figure(findings.history, paths["health"]):
            drawn.append(paths["health"])
    if losses:
        levels = {
            "unigram entropy of this text": losses.unigram_entropy,
            "unigram of the training text": losses.train_unigram,
        }
        levels = {name: value for name, value in levels.items() if value is not None and not losses.is_seen}
        curves.nll_figure(losses.nll_by_view, levels, paths["nll"], targets_line(losses), is_seen=losses.is_seen)
        drawn.append(paths["nll"])
    if findings.reads:
        concepts.reading_figure(findings.reads, paths["reading"])
        concepts.usage_figure(findings.reads, paths["usage"])
        drawn += [paths["reading"], paths["usage"]]
    if findings.does:
        ablations.dropped_figure(findings.does, paths["dropped"])
        ablations.kept_figure(findings.does, paths["kept"])
        ablations.ratio_figure(findings.does, paths["ratio"])
        drawn += [paths["dropped"], paths["kept"], paths["ratio"]]
    if findings.probes:
        ablations.probes_figure(findings.probes, paths["probes"])
        drawn.append(paths["probes"])
    return drawn


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
    if findings.does:
        done = findings.does
        rows.append(("used", f"{done.figures['used_slots']} of {len(done.slots)} concepts are missed when left out"))
    own = [verdict for verdict in findings.verdicts if not verdict.gate.is_seed]
    counts = Counter(verdict.verdict for verdict in own)
    rows.append(("gates", f"{counts[PASS]} pass, {counts[FAIL]} fail, {counts[UNKNOWN]} not measured"))
    rows += [(verdict.gate.metric, f"next: {verdict.reason}") for verdict in own if verdict.verdict == FAIL]
    rows += [("page", folder / "page.html"), ("report", folder / "report.md"), ("summary", folder / "summary.json")]
    return "\n".join([f"{subject.name}", *(f"  {name:<13} {value}" for name, value in rows)])


def concepts_line(geometry: Mapping[str, float]) -> str:
    return (
        f"effective rank {geometry['effective_rank']:.1f} of {geometry['num_concepts']}; what the text changes has "
        f"rank {geometry['rank_dynamic']:.1f} and {100 * (1 - geometry['static_fraction']):.0f} % of the energy"
    )
