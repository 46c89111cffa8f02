"""The report of a training run, or of a bare checkpoint: report.md, figures and summary.json.

Everything in it is read from the run's files or measured here on held-out text; nothing is estimated.
"""

import json
import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ..engine.errors import InputError
from ..engine.telemetry import duration
from . import curves, harness, heldout
from .geometry import gates, metrics, plots
from .subject import Subject, open_subject

NATS = "nats per token"


class Training(NamedTuple):
    """What metrics.jsonl says about a run; None where it says nothing."""

    steps: int
    tokens: int | None
    train_seconds: float | None
    tokens_per_s: float | None
    peak_memory_bytes: int | None


class Findings(NamedTuple):
    """All that a report tells."""

    subject: Subject
    history: list[dict[str, Any]]  # the lines of metrics.jsonl; empty for a bare checkpoint
    training: Training | None
    losses: heldout.Losses | None  # None for an encoder without a decoder
    concepts: heldout.Concepts
    geometry: dict[str, float]
    verdicts: list[gates.Verdict]
    samples: list[heldout.Sample]
    environment: dict[str, Any]  # in which the report was made


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
    harness.write_json(folder / "summary.json", summary(findings))
    harness.write_text(folder / "report.md", markdown(findings))
    print(headline(findings, folder))
    return folder


def find(subject: Subject) -> Findings:
    history = read_history(subject.folder / "metrics.jsonl")
    concepts = heldout.concepts(subject.encoder, subject.loader)
    losses, samples = None, []
    if subject.can_predict:
        losses = heldout.losses(subject.model, subject.loader, subject.train, subject.num_tokens)
        samples = heldout.samples(subject.model, subject.loader, subject.tokenizer, from_concepts=losses.is_seen)
    geometry = metrics.geometry(concepts.values)
    return Findings(
        subject=subject,
        history=history,
        training=training_of(history),
        losses=losses,
        concepts=concepts,
        geometry=geometry,
        verdicts=gates.judge(geometry, int(geometry["num_concepts"])),
        samples=samples,
        environment=harness.environment(subject.seed),
    )


def read_history(metrics_file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none when there is no such file."""
    if not metrics_file.is_file():
        return []
    try:
        return [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise InputError(f"{metrics_file}: not a file of JSON lines ({error}); restore it or move it away") from error


def training_of(history: Sequence[Mapping[str, Any]]) -> Training | None:
    steps = [line for line in history if line["kind"] == "train"]
    if not steps:
        return None
    last = steps[-1]
    end = next((line for line in reversed(history) if line["kind"] == "end"), {})
    return Training(
        steps=last["step"],
        tokens=end.get("tokens", last.get("tokens")),
        train_seconds=end.get("train_seconds", last.get("elapsed_s")),
        tokens_per_s=end.get("tokens_per_s"),
        peak_memory_bytes=end.get("peak_memory_bytes"),
    )


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
        curves.loss_figure(findings.history, entropy, paths["loss"], training_line(findings))
        drawn.append(paths["loss"])
    if losses:
        levels = {"unigram entropy of this text": losses.unigram_entropy}
        if losses.train_unigram is not None:
            levels["unigram of the training text"] = losses.train_unigram
        curves.nll_figure(losses.nll_by_view, losses.is_seen, levels, paths["nll"], targets_line(losses))
        drawn.append(paths["nll"])
    return drawn


# --- in words ---------------------------------------------------------------------------------------------------------


def objective_name(subject: Subject) -> str:
    return subject.recipe.objective["name"] if subject.recipe else type(subject.loader.objective).__name__.lower()


def training_line(findings: Findings) -> str:
    training, subject = findings.training, findings.subject
    parts = [objective_name(subject), f"{num_parameters(subject) / 1e6:.1f} M parameters", f"{training.steps:,} steps"]
    if training.tokens:
        parts.append(f"{training.tokens / 1e6:.1f} M tokens")
    if training.train_seconds:
        parts.append(f"{duration(training.train_seconds)} on {device_name(findings)}")
    return ", ".join(parts)


def targets_line(losses: heldout.Losses) -> str:
    if losses.is_seen:
        return f"{losses.num_targets:,} tokens that the encoder SAW: copying, not to be held against an entropy"
    return f"{losses.num_unseen:,} tokens that the encoder did not see"


def num_parameters(subject: Subject) -> int:
    return sum(parameter.numel() for parameter in subject.model.parameters())


def device_name(findings: Findings) -> str:
    environment = run_environment(findings.subject.folder) or findings.environment
    name, threads = environment.get("device", "cpu"), environment.get("num_threads", environment.get("threads"))
    return name if name != "cpu" else f"{threads} CPU thread{'s' * (threads != 1)}"


def run_environment(folder: Path) -> dict[str, Any]:
    """environment.json of a run: where it was trained, which need not be where the report is made."""
    path = folder / "environment.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def smoothing_floor(label_smoothing: float, vocab_size: int) -> float:
    """The smallest loss under label smoothing, reached by a perfect predictor: the entropy of the smoothed target."""
    if label_smoothing == 0:
        return 0.0
    each = label_smoothing / vocab_size
    true = 1 - label_smoothing + each
    return -true * math.log(true) - (vocab_size - 1) * each * math.log(each)


# --- summary.json -----------------------------------------------------------------------------------------------------


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


# --- what is printed --------------------------------------------------------------------------------------------------


def headline(findings: Findings, folder: Path) -> str:
    subject, losses, geometry, training = findings.subject, findings.losses, findings.geometry, findings.training
    rows = []
    if training:
        speed = f", {training.tokens_per_s:,.0f} tokens/s" if training.tokens_per_s else ""
        rows.append(("training", training_line(findings) + speed))
    if losses and losses.is_seen:
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


# --- report.md --------------------------------------------------------------------------------------------------------


def markdown(findings: Findings) -> str:
    sections = [overview(findings), heldout_section(findings), concepts_section(findings), gates_section(findings)]
    sections += [samples_section(findings), environment_section(findings)]
    return "\n".join(section for section in sections if section)


def overview(findings: Findings) -> str:
    subject, training, losses = findings.subject, findings.training, findings.losses
    rows: list[tuple[str, Any, str]] = []
    if losses and not losses.is_seen:
        rows.append((f"**held-out NLL**, {NATS}", losses.heldout_nll, "of tokens that the encoder did not see"))
    if losses and losses.heldout_nll_seen is not None:
        rows.append((f"held-out NLL, {NATS}", losses.heldout_nll_seen, "of tokens that the encoder **saw**: copying"))
    if losses:
        rows.append((f"**unigram entropy**, {NATS}", losses.unigram_entropy, "of the same held-out text"))
    rank, count = findings.geometry["effective_rank"], findings.geometry["num_concepts"]
    rows.append(("**effective rank** of the concepts", rank, f"of {count}; of their mean over texts, sum S / max S"))
    if training:
        read = f"{training.steps:,} steps, {training.tokens:,} tokens"
        rows.append(("**training time**, s", training.train_seconds, read))
        rows.append(("speed, tokens/s", training.tokens_per_s, "without evaluation, checkpoints and the first steps"))
        peak = training.peak_memory_bytes
        rows.append(("peak memory, MiB", peak / 2**20 if peak else None, "of the training process"))
    rows.append(("parameters", num_parameters(subject), type(subject.model).__name__))
    table = "| | | |\n|---|---:|---|\n" + "".join(f"| {a} | {harness.cell(b)} | {c} |\n" for a, b, c in rows)
    figure = "\n![Training](loss.png)\n" if training else ""
    return f"# Report: {subject.name}\n\n{table}{figure}{smoothing_note(findings)}"


def smoothing_note(findings: Findings) -> str:
    recipe = findings.subject.recipe
    if recipe is None or recipe.train.label_smoothing == 0:
        return ""
    floor = smoothing_floor(recipe.train.label_smoothing, findings.subject.model.config.vocab_size)
    return (
        f"\nThe training loss is smoothed by {recipe.train.label_smoothing:g}: a perfect predictor would have a loss "
        f"of {floor:.4f}, not 0. Held-out figures are not smoothed.\n"
    )


def heldout_section(findings: Findings) -> str:
    losses, subject = findings.losses, findings.subject
    if losses is None:
        return "## Held-out text\n\nThis checkpoint is an encoder without a decoder; it has no loss to measure.\n"
    kind = "seen" if losses.is_seen else "unseen"
    rows = [{"hidden": name, "targets": kind, NATS: value} for name, value in losses.nll_by_view.items()]
    guesses = [
        ("this model, all of the above", losses.heldout_nll_seen if losses.is_seen else losses.heldout_nll),
        ("this model, each text decoded from the concepts of another", losses.nll_of_other_concepts),
        ("unigram entropy: the best guess without context, fitted to this very text", losses.unigram_entropy),
        ("the same guess, fitted to the training text", losses.train_unigram),
        ("every token as likely as any other", math.log(subject.model.config.vocab_size)),
    ]
    comparison = harness.markdown_table([{"predictor": a, NATS: b} for a, b in guesses], ["predictor", NATS])
    warning = (
        "The encoder saw every token that is asked for. This measures copying through the concepts; it is no "
        "prediction and says nothing against an entropy.\n\n"
        if losses.is_seen else ""
    )  # fmt: skip
    return (
        f"## Held-out text\n\nRead: {losses.num_tokens:,} tokens in {losses.num_windows:,} windows ({subject.text}); "
        f"{losses.num_targets:,} targets in all, {losses.num_unseen:,} of them unseen by the encoder. Fixed text, "
        f"fixed corruption, no label smoothing.\n\n{warning}"
        f"{harness.markdown_table(rows, ['hidden', 'targets', NATS])}\n{comparison}\n![NLL](nll.png)\n"
    )


NAMES = (
    ("effective_rank", "effective rank of the mean concepts: sum S / max S"),
    ("rank_mean", "entropy rank of the mean concepts"),
    ("rank_mean_centered", "the same, the concepts' common direction removed"),
    ("rank_text", "entropy rank of one text's concepts"),
    ("rank_text_centered", "the same, the concepts' common direction removed"),
    ("rank_dynamic", "**entropy rank of what the text changes**"),
    ("static_fraction", "share of energy that no text changes"),
    ("dead_slots", "concepts that no text moves"),
    ("similarity_mean", "mean absolute cosine of two concepts of a text"),
    ("similarity_max", "largest cosine of two concepts of a text"),
    ("duplicate_pairs", "pairs with a mean cosine above 0.95"),
    ("dims_95", "directions with 95 % of the variance of the mean concepts"),
    ("participation_ratio", "participation ratio of all concepts of all texts"),
    ("dominance", "share of the largest singular value"),
    ("isotropy", "isotropy, 0 by construction after a LayerNorm"),
    ("twonn_pooled", "intrinsic dimension (TwoNN) of the mean over concepts"),
    ("twonn_slots", "intrinsic dimension (TwoNN) of one concept"),
)


def concepts_section(findings: Findings) -> str:
    geometry, concepts = findings.geometry, findings.concepts
    rows = [{"metric": text, "value": geometry[key]} for key, text in NAMES]
    return (
        f"## Concepts\n\n{geometry['num_concepts']} concepts of width {geometry['width']}, of "
        f"{geometry['num_texts']} held-out texts of {concepts.shortest} to {concepts.longest} tokens with nothing "
        "hidden.\n\n"
        f"{harness.markdown_table(rows, ['metric', 'value'])}\n"
        "![Similarity of the concepts](similarity.png)\n\n![Spectrum of the concepts](spectrum.png)\n"
    )


def gates_section(findings: Findings) -> str:
    measured = [verdict for verdict in findings.verdicts if verdict.verdict != "not measured"]
    rows = [
        {
            "metric": f"`{verdict.gate.key}`", "value": verdict.value,
            "wanted": f"{verdict.gate.sense} {verdict.threshold:g}", "verdict": verdict.verdict,
            "source": verdict.gate.source, "reason, next": verdict.reason,
        }
        for verdict in measured
    ]  # fmt: skip
    rest = sorted({verdict.gate.key for verdict in findings.verdicts if verdict.verdict == "not measured"})
    notes = "".join(f"- {line}\n" for line in gates.contradictions(int(findings.geometry["num_concepts"])))
    table = harness.markdown_table(rows, ["metric", "value", "wanted", "verdict", "source", "reason, next"])
    return (
        "## Gates\n\nThresholds that count concepts were written for 128 and are scaled to this model. They come from "
        f"documents of different ages:\n\n{notes}\n{table}\nNot measured here: {', '.join(rest)}.\n"
    )


def samples_section(findings: Findings) -> str:
    parts = []
    for number, sample in enumerate(findings.samples, start=1):
        parts.append(f"### {number}. {sample.num_right} of {sample.num_hidden} tokens as in the source\n")
        for name in ("source", "hidden", "filled"):
            parts.append(f"{name}\n\n~~~text\n{wrapped(getattr(sample, name))}\n~~~\n")
    return "## Samples\n\n" + findings.samples[0].how + "\n\n" + "\n".join(parts) if parts else ""


def wrapped(text: str) -> str:
    lines = [textwrap.wrap(line, 100, break_long_words=False) or [""] for line in text.strip("\n").splitlines()]
    return "\n".join(line for part in lines for line in part).replace("~~~", "~ ~ ~")


def environment_section(findings: Findings) -> str:
    run = run_environment(findings.subject.folder)
    trained = f"## Trained in\n\n{harness.environment_lines(run)}\n" if run else ""
    return f"{trained}## This report was made in\n\n{harness.environment_lines(findings.environment)}"
