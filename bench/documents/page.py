"""report.md: the findings of a report as a page of Markdown."""

import math
import textwrap
from typing import Any

from ...engine.files import finite
from ...models.masked_lm import smoothing_floor
from ..analysis.findings import (
    NATS,
    Findings,
    label_smoothing,
    num_parameters,
    run_environment,
    vocab_size,
)
from ..measure import results


def markdown(findings: Findings) -> str:
    sections = [overview(findings), gates_section(findings), heldout_section(findings), reads_section(findings)]
    sections += [does_section(findings), probes_section(findings), concepts_section(findings)]
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
        note = "of the same held-out text" + (", to which copying does not compare" if losses.is_seen else "")
        rows.append((f"**unigram entropy**, {NATS}", losses.unigram_entropy, note))
    rank, count = findings.geometry["effective_rank"], findings.geometry["num_concepts"]
    rows.append(("**effective rank** of the concepts", rank, f"of {count}; of their mean over texts, sum S / max S"))
    if training:
        read = f"{training.steps:,} steps, {training.tokens:,} tokens"
        rows.append(("**training time**, s", training.train_seconds, read))
        rows.append(("speed, tokens/s", training.tokens_per_s, "without evaluation, checkpoints and the first steps"))
        peak = training.peak_memory_bytes
        rows.append(("peak memory, MiB", peak / 2**20 if peak else None, "of the training process"))
    rows.append(("parameters", num_parameters(subject), type(subject.model).__name__))
    lines = (f"| {a} | {results.cell(b)} | {c} |\n" for a, b, c in rows if b is not None)
    table = "| | | |\n|---|---:|---|\n" + "".join(lines)
    figure = "\n![Training](loss.png)\n" if training else ""
    return f"# Report: {subject.name}\n\n{table}{figure}{smoothing_note(findings)}"


def smoothing_note(findings: Findings) -> str:
    smoothing = label_smoothing(findings.subject)
    if smoothing == 0:
        return ""
    floor = smoothing_floor(smoothing, vocab_size(findings.subject))
    return (
        f"\nThe training loss is smoothed by {smoothing:g}: a perfect predictor would have a loss of {floor:.4f}, "
        "not 0. Held-out figures are not smoothed.\n"
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
        ("every token as likely as any other", math.log(vocab_size(subject))),
    ]
    guesses = guesses[:2] if losses.is_seen else guesses
    known = [{"predictor": a, NATS: b} for a, b in guesses if b is not None]
    comparison = results.markdown_table(known, ["predictor", NATS])
    warning = (
        "The encoder saw every token that is asked for. This measures copying through the concepts; it is no "
        "prediction and says nothing against an entropy.\n\n"
        if losses.is_seen else ""
    )  # fmt: skip
    return (
        f"## Held-out text\n\nRead: {losses.num_tokens:,} tokens in {losses.num_windows:,} windows ({subject.text}); "
        f"{losses.num_targets:,} targets in all, {losses.num_unseen:,} of them unseen by the encoder. Fixed text, "
        f"fixed corruption, no label smoothing.\n\n{warning}"
        f"{results.markdown_table(rows, ['hidden', 'targets', NATS])}\n{comparison}\n![NLL](nll.png)\n"
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
    values = finite(geometry)  # NaN: of too few texts to measure
    rows = [{"metric": text, "value": values[key]} for key, text in NAMES]
    return (
        f"## Concepts\n\n{geometry['num_concepts']} concepts of width {geometry['width']}, of "
        f"{geometry['num_texts']} held-out texts of {concepts.shortest} to {concepts.longest} tokens with nothing "
        "hidden.\n\n"
        f"{results.markdown_table(rows, ['metric', 'value'])}\n"
        "![Similarity of the concepts](similarity.png)\n\n![Spectrum of the concepts](spectrum.png)\n"
    )


def gates_section(findings: Findings) -> str:
    own = [verdict for verdict in findings.verdicts if not verdict.gate.is_seed]
    rows = [
        {
            "verdict": verdict.in_short, "metric": f"`{verdict.gate.metric}`: {verdict.gate.means}",
            "value": verdict.value, "wanted": verdict.wanted, "next": verdict.reason,
        }
        for verdict in own
    ]  # fmt: skip
    table = results.markdown_table(rows, ["verdict", "metric", "value", "wanted", "next"])
    return (
        f"## Gates\n\n{table}\nWhere thresholds come from: `conceptron gate RUN`; with `--seeds` also those of the "
        "planning documents.\n"
    )


def reads_section(findings: Findings) -> str:
    read = findings.reads
    if read is None:
        return ""
    rows = [{"layer": number, **layer} for number, layer in enumerate(read.layers, start=1)]
    known = [{"about": name, **each._asdict()} for name, each in read.information.items()]
    return (
        f"## What concepts read\n\nExact attention maps of {read.num_tokens:,} tokens in {read.num_texts} texts, mean "
        f"over heads.\n\n{results.markdown_table(rows, list(rows[0]))}\nWhat knowing the concept says about a token "
        f"that it reads, in bits (floor: tokens shuffled):\n\n{results.markdown_table(known, list(known[0]))}\n"
        "![What each concept reads](reading.png)\n\n![Which concepts read the text](usage.png)\n"
    )


def does_section(findings: Findings) -> str:
    done = findings.does
    if done is None:
        return ""
    concepts = {"own": "its own", "other": "those of another text", "mean": "the mean over texts", "zero": "none"}
    rows = [{"decoded from": concepts[name], NATS: value} for name, value in done.nll.items()]
    return (
        f"## What concepts do\n\nView {done.view}, {done.num_targets:,} targets in {done.num_texts} texts.\n\n"
        f"{results.markdown_table(rows, ['decoded from', NATS])}\n"
        "![What is lost without each concept](dropped.png)\n\n![How many concepts it takes](kept.png)\n\n"
        "![How much a concept can hold](ratio.png)\n"
    )


def probes_section(findings: Findings) -> str:
    if not findings.probes:
        return ""
    rows = [probe._asdict() for probe in findings.probes]
    return (
        "## What can be read off\n\nShares of the variance that a linear map explains on documents that it was not "
        f"fitted to; of places the share found.\n\n{results.markdown_table(rows, list(rows[0]))}\n"
        "![What can be read off](probes.png)\n"
    )


def samples_section(findings: Findings) -> str:
    parts = []
    for number, sample in enumerate(findings.samples, start=1):
        parts.append(f"### {number}. {sample.num_right} of {sample.num_hidden} tokens as in the source\n")
        for name in ("source", "filled") if sample.num_hidden == sample.num_tokens else ("source", "hidden", "filled"):
            parts.append(f"{name}\n\n~~~text\n{wrapped(getattr(sample, name))}\n~~~\n")
    return "## Samples\n\n" + findings.samples[0].how + "\n\n" + "\n".join(parts) if parts else ""


def wrapped(text: str) -> str:
    lines = [textwrap.wrap(line, 100, break_long_words=False) or [""] for line in text.strip("\n").splitlines()]
    return "\n".join(line for part in lines for line in part).replace("~~~", "~ ~ ~")


def environment_section(findings: Findings) -> str:
    run = run_environment(findings.subject.folder)
    trained = f"## Trained in\n\n{results.environment_lines(run)}\n" if run else ""
    return f"{trained}## This report was made in\n\n{results.environment_lines(findings.environment)}"
