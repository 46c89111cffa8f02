"""page.html: the findings of a report as one page that needs no network: styles, script and figures stand in it."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..analysis.findings import NATS, Findings, num_parameters, objective_name, run_environment, training_line
from ..analysis.gates import FAIL, Verdict
from ..measure.results import cell, environment_lines

HERE = Path(__file__).parent
GOLDEN = 137.508  # degrees: neighbours differ in hue however many concepts there are
LAYER = {
    "usage_perplexity": "share it", "js_divergence": "diverge", "read_entropy": "evenly", "read_width": "widely",
    "centre_spread": "centres",
}  # fmt: skip
FONTS = "'DejaVu Sans', Verdana, sans-serif"  # matplotlib names the first alone


def page(findings: Findings, folder: Path) -> str:
    """``folder`` holds the figures as SVG; those that are missing have no place on the page."""
    name = findings.subject.name
    body = "".join((
        header(findings), gates_section(findings), training_section(findings, folder),
        reads_section(findings, folder), does_section(findings, folder), probes_section(findings, folder),
        geometry_section(findings, folder), samples_section(findings), environment_section(findings),
    ))  # fmt: skip
    return document(f"{name}: what the concepts learned", body)


def document(title: str, body: str) -> str:
    style, script = ((HERE / file).read_text(encoding="utf-8") for file in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}</main>\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


# --- parts ------------------------------------------------------------------------------------------------------------


def section(title: str, about: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n<p class=soft>{escape(about)}</p>\n{''.join(parts)}</section>\n"


def figure(folder: Path, name: str, is_wide: bool = False) -> str:
    """A figure of the folder, or nothing where it was not drawn."""
    path = folder / f"{name}.svg"
    if not path.is_file():
        return ""
    kind = "card figure wide" if is_wide else "card figure"
    return f'<figure class="{kind}" id="{name}">{inline(path.read_text(encoding="utf-8"), name)}</figure>\n'


def inline(svg: str, name: str) -> str:
    """An SVG document as part of a page: as wide as its place, its ids its own."""
    start = svg.index("<svg")
    opening, rest = svg[start : svg.index(">", start)], svg[svg.index(">", start) :]
    svg = re.sub(r'\s(width|height)="[^"]*"', "", opening) + rest
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("'DejaVu Sans'", FONTS).strip()


def pair(*parts: str) -> str:
    return f"<div class=pair>\n{''.join(parts)}</div>\n" if any(parts) else ""


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    names = list(rows[0])

    def mark(values: Sequence[Any]) -> str:
        return " class=number" if any(isinstance(value, int | float) for value in values) else ""

    head = "".join(f"<th{mark([row[name] for row in rows])}>{escape(name)}</th>" for name in names)
    lines = "".join(
        "<tr>" + "".join(f"<td{mark([row[name]])}>{escape(cell(row[name]))}</td>" for name in names) + "</tr>\n"
        for row in rows
    )
    return f"<div class=scroll><table>\n<tr>{head}</tr>\n{lines}</table></div>\n"


def details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>\n{content}</details>\n"


def card(content: str) -> str:
    return f"<div class=card>\n{content}</div>\n"


# --- sections ---------------------------------------------------------------------------------------------------------


def header(findings: Findings) -> str:
    subject, figures = findings.subject, findings.figures
    about = training_line(findings) if findings.training else (
        f"{objective_name(subject)}, {num_parameters(subject) / 1e6:.1f} M parameters"
    )  # fmt: skip
    count = findings.geometry["num_concepts"]
    shown = (
        ("heldout_nll", "held-out NLL", f"{NATS}; unigram {cell(figures.get('unigram_entropy'))}"),
        ("heldout_nll_seen", "held-out NLL, copied", f"{NATS}, of tokens that the encoder saw"),
        ("concept_nats", "nats from the concepts", "lost with those of another text"),
        ("rank_dynamic", "rank of what texts change", f"of {count}"),
        ("used_slots", "concepts that are missed", f"of {count}"),
        ("usage_perplexity", "concepts that share the text", f"of {count}"),
        ("static_fraction", "static share", "of the energy, the same for every text"),
    )
    tiles = "".join(
        f"<div class=card><span class=soft>{escape(title)}</span><b>{cell(figures[name])}</b>"
        f"<span class=soft>{escape(note)}</span></div>\n"
        for name, title, note in shown if figures.get(name) is not None
    )  # fmt: skip
    where = f"held-out text: {subject.text}"
    return (
        f"<header>\n<h1>{escape(subject.name)}</h1>\n<p class=soft>{escape(about)}; {escape(where)}</p>\n"
        f"<div class=tiles>\n{tiles}</div>\n</header>\n"
    )


def gates_section(findings: Findings) -> str:
    own = "".join(gate(verdict) for verdict in findings.verdicts if not verdict.gate.is_seed)
    seeds = "".join(gate(verdict) for verdict in findings.verdicts if verdict.gate.is_seed)
    return section(
        "Is it worth going on?", "Each figure beside what it should be; the first that fails is the first to mend.",
        card(own), details("Thresholds of the planning documents, for comparison", card(seeds)) if seeds else "",
    )  # fmt: skip


def gate(verdict: Verdict) -> str:
    value = "not measured" if verdict.value is None else cell(verdict.value)
    reason = f"<p class=soft>next: {escape(verdict.reason)}</p>" if verdict.verdict == FAIL else ""
    void = f"; {verdict.reason}" if verdict.value is not None and not verdict.passed else ""
    return (
        f"<div class=gate><span class='badge {verdict.verdict}'>{verdict.in_short}</span><div>"
        f"<p><b>{escape(value)}</b>, wanted {escape(verdict.wanted)}: {escape(verdict.gate.means + void)}</p>"
        f"<p class=soft><code>{escape(verdict.gate.metric)}</code>, {escape(verdict.source)}</p>{reason}</div></div>\n"
    )


def training_section(findings: Findings, folder: Path) -> str:
    figures = pair(figure(folder, "loss"), figure(folder, "nll"))
    health = figure(folder, "health", is_wide=True)
    about = "The loss of every step, and what the model makes of text that it has not seen."
    return section("Training", about, figures, health) if figures else ""


def reads_section(findings: Findings, folder: Path) -> str:
    read = findings.reads
    if read is None:
        return ""
    about = (
        f"Exact attention maps of {read.num_tokens:,} held-out tokens in {read.num_texts} texts, last layer, mean over "
        "heads. Each token has the colour of the concept that reads it most, the stronger the larger its share."
    )
    layers = [
        {"layer": k, **{LAYER[name]: value for name, value in layer.items()}}
        for k, layer in enumerate(read.layers, start=1)
    ]
    known = [
        {"bits about": name, "bits": each.bits, "by chance": each.floor, "at most": each.most}
        for name, each in read.information.items()
    ]
    return section(
        "What concepts read", about, coloured(findings),
        pair(figure(folder, "reading"), figure(folder, "usage")),
        pair(card("<p>What knowing the concept says about a token that it reads; by chance: tokens shuffled.</p>\n"
                  f"{table(known)}"),
             card("<p>By layer: concepts that share the text; divergence of two, bits (0 the same, 1 nothing shared); "
                  "how evenly over tokens and how widely, as shares of the text, each reads; how far apart their "
                  f"centres lie.</p>\n{table(layers)}")),
        details(f"All {len(read.slots)} concepts", card(table(slot_rows(findings)))),
    )  # fmt: skip


def coloured(findings: Findings) -> str:
    slots, picture = findings.reads.slots, findings.reads.picture
    words = [", ".join(map(shown, slot.words)) for slot in slots]
    abouts = [escape(f"what it reads beyond their frequency: {each}" if each else "no word above its frequency")
              for each in words]  # fmt: skip
    tokens = "".join(
        f'<span data-c={c} data-s={100 * share:.0f} data-a="{abouts[c]}" '
        f'style="background:hsl({c * GOLDEN % 360:.0f} 75% 60% / {0.15 + 0.7 * share:.2f})">{escape(piece)}</span>'
        for piece, c, share in zip(picture.pieces, picture.readers, picture.shares, strict=True)
    )
    hint = "Point at a token to see who reads it; click to see all that its concept reads most."
    return card(f"<p id=who class=soft>{hint}</p>\n<div class=text>{tokens}</div>\n")


def shown(piece: str) -> str:
    """A token in a list: blanks that nobody would see have a sign."""
    return piece.replace("\n", "⏎").replace("\t", "⇥").strip(" ") or "␣"


def slot_rows(findings: Findings) -> list[dict[str, Any]]:
    done = findings.does
    rows = []
    for number, slot in enumerate(findings.reads.slots):
        row = {
            "concept": number, "centre": slot.centre, "width": slot.width, "evenness": slot.entropy,
            "reads most (%)": 100 * slot.usage,
        }  # fmt: skip
        if done is not None:
            row |= {"missed by (nats)": done.slots[number].increase, "±": done.slots[number].error}
        rows.append({**row, "words": "  ".join(map(shown, slot.words))})
    return rows


def does_section(findings: Findings, folder: Path) -> str:
    done = findings.does
    if done is None:
        return ""
    about = (
        f"The same {done.num_targets:,} held-out targets ({done.view}), asked again with other concepts. Errors are "
        f"over {done.num_texts} texts."
    )
    concepts = {"own": "its own", "other": "those of another text", "mean": "their mean over texts", "zero": "zeros"}
    swapped = [
        {"decoded from": concepts[name], NATS: value, "more": value - done.nll["own"]}
        for name, value in done.nll.items()
    ]
    near, far = done.half_swapped["near"], done.half_swapped["far"]
    half = (
        f"With the first half of the concepts from another text, targets in the first half of the text lose "
        f"{cell(near)} nats, those in the second half {cell(far)}."
    )
    return section(
        "What concepts do", about, pair(card(table(swapped) + f"<p class=soft>{escape(half)}</p>"),
                                        figure(folder, "dropped")),
        pair(figure(folder, "kept"), figure(folder, "ratio")),
    )  # fmt: skip


def probes_section(findings: Findings, folder: Path) -> str:
    if not findings.probes:
        return ""
    asked = [{"probe": probe.name, "asks": probe.asks} for probe in findings.probes]
    about = "By a linear map, on documents that it was not fitted to. A bar means something beside its floors only."
    return section("What can be read off the concepts", about, pair(figure(folder, "probes"), card(table(asked))))


def geometry_section(findings: Findings, folder: Path) -> str:
    about = (
        f"{findings.geometry['num_concepts']} concepts of width {findings.geometry['width']} over "
        f"{findings.geometry['num_texts']} held-out texts. Spread alone says nothing about content: frozen orthogonal "
        "concepts have the best there is."
    )
    rows = [{"metric": name, "value": value} for name, value in findings.geometry.items()]
    return section(
        "The room that they use", about, pair(figure(folder, "spectrum"), figure(folder, "clusters")),
        figure(folder, "similarity", is_wide=True), details("All metrics of the geometry", card(table(rows))),
    )  # fmt: skip


def samples_section(findings: Findings) -> str:
    if not findings.samples:
        return ""
    parts = []
    for sample in findings.samples:
        is_whole = sample.num_hidden == sample.num_tokens
        shown_parts = ("source", "filled") if is_whole else ("source", "hidden", "filled")
        texts = "".join(
            f"<p class=soft>{name}</p><div class=sample>{escape(getattr(sample, name).strip())}</div>\n"
            for name in shown_parts
        )
        parts.append(card(f"<p>{sample.num_right} of {sample.num_hidden} tokens as in the source</p>{texts}"))
    return section("Samples", findings.samples[0].how, pair(*parts))


def environment_section(findings: Findings) -> str:
    trained = run_environment(findings.subject.folder)
    parts = [("Trained in", trained)] if trained else []
    parts.append(("This page was made in", findings.environment))
    lists = "".join(
        details(title, card("<ul>" + "".join(
            f"<li class=soft>{escape(line.removeprefix('- '))}</li>" for line in environment_lines(content).splitlines()
        ) + "</ul>\n"))
        for title, content in parts
    )  # fmt: skip
    return f"<section>\n<h2>Where</h2>\n{lists}</section>\n"
