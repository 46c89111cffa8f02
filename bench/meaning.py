"""What vectors mean: sentence similarity, long chapters searched, geometry, words read back, speed. Nothing is trained.

    conceptron bench meaning MODEL --data DIR [--queries TEACHER] [--backbone DIR] [--skip PART ...] [--out DIR]

MODEL is a folder of this package (or a finished run), or any sentence encoder, which is measured in the same way. DIR
holds the data: ``glue/stsb``, ``sick``, ``openstax_books``, each with parquet files named after its splits.

    sts       Pearson and Spearman of the cosine of two sentences: STS-B dev and test, SICK test; no label is used
    chapters  100 beginnings of chapters, 4 to 7 thousand words, two sentences of each as questions: the chapter found
              by its best part, by its one vector, and the part of it that holds the middle of the sentence, or the
              place where it stood (or has its middle within 128 tokens of it); with the sentences left in, and taken
              out; beside BM25 where `bm25s` is installed, the windows of a backbone, and the first 512 tokens
    geometry  of 256 windows of 512 tokens out of these chapters; and out of as many kinds of text as DIR has
    content   words of 128-token texts written again from the concepts alone, from fewer of them, from concepts set to
              zero and from those of another text
    speed     tokens per second of CPU time on 8192 tokens, as `conceptron embed` reads them, beside ``--backbone`` in
              windows of 512, interleaved, in float32 and, where there are units for it, in bfloat16
"""

import argparse
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from scipy.stats import pearsonr, spearmanr

from ..engine.data.teacher import Teacher
from ..engine.embedding.model import ConceptModel
from ..engine.errors import InputError
from ..models.ablation import ablated
from ..models.objectives import Diffusion, SampleKey
from ..models.packing import pack
from .analysis import chapters
from .analysis.embedding import ConceptEmbedder, Parts, SentenceEmbedder, directions, first_tokens, open_embedder
from .analysis.geometry import metrics
from .measure.environment import environment
from .measure.results import markdown_table, write_results

PARTS = ("sts", "chapters", "geometry", "content", "speed")
SENTENCES = {  # name -> file, two sentences, the score
    "STS-B dev": ("glue/stsb/validation.parquet", "sentence1", "sentence2", "label"),
    "STS-B test": ("glue/stsb/test.parquet", "sentence1", "sentence2", "label"),
    "SICK-R": ("sick/test.parquet", "sentence_A", "sentence_B", "relatedness_score"),
}
GEOMETRY = {  # of ``metrics.geometry``
    "num_concepts": "concepts", "effective_rank": "effective rank of what texts have in common",
    "static_fraction": "share of the energy that texts have in common", "rank_dynamic": "rank of what the text changes",
    "dead_slots": "dead concepts",
}  # fmt: skip
NUM_CHAPTERS, MIN_WORDS, MAX_WORDS, PER_CHAPTER = 100, 4000, 7000, 2
WINDOW, NUM_WINDOWS = 512, 256
KINDS = ("eltec_novels", "govweb", "openstax_books", "plos_articles", "techdocs", "wikipedia_articles")
FIRST_CHARS = 40_000  # of a text of these kinds: novels are long
READ_TOKENS, NUM_READ = 128, 64
FEWER = (8, 32)  # concepts that as many tokens are read back from, too
FIRST = 512  # tokens, of the floor that reads no further
LONG, ROUNDS, BACKBONE_WINDOW = 8192, 3, 512

Embedder = ConceptEmbedder | SentenceEmbedder


def columns(path: Path, *names: str) -> list[list[Any]]:
    """Columns of a parquet file.

    Raises:
        InputError: there is no such file or column.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give --data the folder that holds it, or --skip what needs it")
    table = pq.read_table(path)
    for name in names:
        if name not in table.column_names:
            raise InputError(f"{path}: no column {name!r}, only {', '.join(table.column_names)}")
    return [table[name].to_pylist() for name in names]


def row(part: str, what: str, value: float, error: float | None = None, count: int | None = None) -> dict[str, Any]:
    return {"part": part, "what": what, "value": value, "standard_error": error, "count": count}


def sts(model: Embedder, data: Path, limit: int | None) -> list[dict[str, Any]]:
    rows = []
    for name, (file, *fields) in SENTENCES.items():
        a, b, scores = (column[:limit] for column in columns(data / file, *fields))
        texts = sorted({*a, *b})
        place = {text: i for i, text in enumerate(texts)}
        vectors = model.embed(texts)
        cosines = (vectors[[place[text] for text in a]] * vectors[[place[text] for text in b]]).sum(1)
        truth = np.array([float(score) for score in scores])
        pearson, spearman = pearsonr(cosines, truth).statistic, spearmanr(cosines, truth).statistic
        error = (1 - pearson**2) / np.sqrt(len(truth) - 1)
        rows += [row("sts", f"{name}, Pearson", float(pearson), float(error), len(truth)),
                 row("sts", f"{name}, Spearman", float(spearman), None, len(truth))]  # fmt: skip
    return rows


def read_chapters(data: Path, count: int) -> list[str]:
    """The beginnings of chapters, MIN_WORDS to MAX_WORDS long, in a fixed shuffle of all splits.

    Raises:
        InputError: there are not as many chapters of that length.
    """
    texts = []
    for split in ("test", "validation", "train"):
        texts += columns(data / "openstax_books" / f"{split}.parquet", "text")[0]
    generator, found = np.random.default_rng(0), []
    for i in generator.permutation(len(texts)):
        beginning = beginning_of(texts[i], int(generator.integers(MIN_WORDS, MAX_WORDS)))
        if len(beginning.split()) >= MIN_WORDS:
            found.append(beginning)
    if len(found) < max(2, count):
        raise InputError(
            f"--chapters: {data}/openstax_books has {len(found)} chapters of {MIN_WORDS} words, expected "
            f"{max(2, count)}; ask for fewer"
        )
    return found[:count]


def beginning_of(text: str, num_words: int) -> str:
    """Up to the end of the sentence in which word ``num_words`` stands."""
    words = list(re.finditer(r"\S+", text))
    if len(words) <= num_words:
        return text
    end = next((word.end() for word in words[num_words:] if word[0].endswith((".", "!", "?"))), len(text))
    return text[:end]


def retrieval(model: Embedder, texts: Sequence[str], asks: Embedder, parts: int) -> Iterator[list[dict[str, Any]]]:
    """Rows of the chapters without their sentences, then of those with them. ``asks`` embeds the questions.

    ``parts``: of a chapter, for BM25.
    """
    drawn = chapters.draw(texts, PER_CHAPTER)
    queries = asks.embed([question.text for question in drawn.questions])
    for state, documents in (("removed", drawn.removed), ("kept", drawn.kept)):
        is_removed = state == "removed"
        found = model.parts(documents)
        ways = {"best part": chapters.search(queries, found, drawn.questions, is_removed)}
        if model.num_parts:
            ways["one vector"] = chapters.whole(queries, mean_of(found), drawn.questions)
            if len(found) > 1:
                of_rest = chapters.centred(found)
                ways["best part, centred"] = chapters.search(queries, of_rest, drawn.questions, is_removed)
        else:
            ways["one vector"] = chapters.whole(queries, model.embed(documents), drawn.questions)
        if found[0].windows is not None:
            windows = [each.windows for each in found]
            ways["windows of the backbone"] = chapters.search(queries, windows, drawn.questions, is_removed)
        beginnings = model.embed([first_tokens(model, text, FIRST) for text in documents])
        ways[f"first {FIRST} tokens"] = chapters.whole(queries, beginnings, drawn.questions)
        words = chapters.bm25(documents, [each.starts for each in found], drawn.questions, parts, is_removed)
        if words:
            ways["BM25"] = words
        yield [
            row("chapters", f"{name}, sentence {state}, {way}", *values)
            for way, shares in ways.items() for name, values in shares.items()
        ]  # fmt: skip


def mean_of(found: Sequence[Parts]) -> np.ndarray:
    """[n, e] of norm 1."""
    return directions(np.stack([each.vectors.mean(0) for each in found]))


def geometry(model: ConceptEmbedder, windows: Sequence[Sequence[int]], of: str) -> list[dict[str, Any]]:
    figures = metrics.geometry(torch.from_numpy(model.concepts(windows)))
    return [row("geometry", f"{of}, {GEOMETRY[name]}", float(figures[name]), None, len(windows)) for name in GEOMETRY]


def mixed(model: ConceptEmbedder, data: Path) -> list[list[int]]:
    """Windows of every kind of text that ``data`` has, as many of each; none if it has one kind only."""
    files = [data / name / "test.parquet" for name in KINDS]
    kinds = [columns(file, "text")[0] for file in files if file.is_file()]
    each = NUM_WINDOWS // max(1, len(kinds))
    if len(kinds) < 2:
        return []
    return [ids for texts in kinds for ids in cut(model, [text[:FIRST_CHARS] for text in texts[:each]], WINDOW, each)]


def cut(model: ConceptEmbedder, texts: Sequence[str], window: int, count: int) -> list[list[int]]:
    """Windows of token ids, one out of each text in turn, so that they differ."""
    encoded = model.vocabulary.encode(list(texts))
    most = max(len(ids) for ids in encoded) // window
    windows = [ids[i * window : (i + 1) * window] for i in range(most) for ids in encoded]
    full = [ids for ids in windows if len(ids) == window]
    if len(full) < 2:
        raise InputError(f"--data: no two windows of {window} tokens in its chapters")
    return full[:count]


@torch.inference_mode()
def content(model: ConceptEmbedder, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Shares of tokens that the decoder writes right from concepts alone, asked for all at once."""
    network, tokens = model.model, model.vocabulary.tokens
    windows = cut(model, texts, READ_TOKENS, NUM_READ)
    windows = windows[: len(windows) // 2 * 2]  # the concepts of another text: no batch of one
    objective = Diffusion(encoder_view="clean", weighting="none", hidden=model.config.hidden_tokens,
                          context=model.config.decoder_mixing != "none")  # fmt: skip
    C = model.config.num_concepts
    fewer = [count for count in FEWER if count < C]
    ways = [(C, None), *((count, None) for count in fewer), (C, "shuffle"), (C, "zero")]
    hits: dict[tuple[int, str | None], list[torch.Tensor]] = {way: [] for way in ways}
    for begin in range(0, len(windows), 16):
        batch = pack([np.array(ids, dtype=np.int64) for ids in windows[begin : begin + 16]])
        keys = [SampleKey(0, 0, begin + i) for i in range(batch.num_sequences)]
        views = objective.evaluation_views(batch, keys, tokens)
        view = views[max(views)]  # the grid's last: everything is asked for
        encoded = {count: network.encoder(packed=view.encoder, num_concepts=count) for count in (C, *fewer)}
        for (count, how), found in hits.items():
            hidden = network.decode_view(ablated(encoded[count], how), view)
            pairs = zip(hidden.split(1024), view.targets.split(1024), strict=True)  # [1024, V] logits at a time
            found += [network.lm_head(rows).argmax(-1) == targets for rows, targets in pairs]
    names = {None: "words read back", "shuffle": "from another text's concepts", "zero": "from concepts set to zero"}
    return [row("content", names[how] + (f", C = {count}" if count < C else ""),
                *chapters.share(torch.cat(found).numpy())) for (count, how), found in hits.items()]  # fmt: skip


def speed(model: Embedder, backbone: str | None, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Tokens per second of CPU time, the best of some rounds that take turns."""
    readers: dict[str, tuple[Any, Callable[[], Any]]] = {}
    if isinstance(model, ConceptEmbedder):
        (ids,) = cut(model, [" ".join(texts)] * 2, LONG, 1)
        reader = ConceptModel(model.folder, model.device)
        batch = pack([np.array(ids, dtype=np.int64)])
        readers["model"] = reader, lambda: reader.forward(batch, reader.config.num_concepts)
    else:
        readers["model"] = model.teacher, windows_of(model.teacher, texts)
    if backbone:
        bare = Teacher(backbone)
        readers["backbone"] = bare, windows_of(bare, texts)
    precisions = {"float32": False} | ({"bfloat16": True} if all(each.is_mixed for each, _ in readers.values()) else {})
    seconds: dict[tuple[str, str], list[float]] = {(kind, name): [] for kind in precisions for name in readers}
    for turn in range(ROUNDS + 1):
        for kind, name in seconds:
            reader, call = readers[name]
            reader.is_mixed = precisions[kind]
            start = time.process_time()
            call()
            if turn:  # the first is a warm-up
                seconds[kind, name].append(time.process_time() - start)
    rates = {key: LONG / min(values) for key, values in seconds.items()}
    rows = [row("speed", f"tokens per CPU second, {name}, {kind}", rates[kind, name], None, ROUNDS)
            for kind, name in rates]  # fmt: skip
    if backbone:
        rows += [row("speed", f"times the backbone in windows, {kind}",
                     rates[kind, "model"] / rates[kind, "backbone"], None, ROUNDS) for kind in precisions]  # fmt: skip
    return rows


def windows_of(teacher: Teacher, texts: Sequence[str]) -> Callable[[], Any]:
    """Reads LONG tokens in windows, eight at a time."""
    inside = BACKBONE_WINDOW - len(teacher.opening) - len(teacher.closing)
    ids = teacher.tokenizer(" ".join(texts), add_special_tokens=False, truncation=False, padding=False,
                            verbose=False).input_ids[: LONG]  # fmt: skip
    pieces = [[*teacher.opening, *ids[i : i + inside], *teacher.closing] for i in range(0, len(ids), inside)]

    def call() -> None:
        with torch.inference_mode():
            for i in range(0, len(pieces), 8):
                teacher.pool(pieces[i : i + 8])

    return call


def measure(options: argparse.Namespace, model: Embedder) -> Iterator[list[dict[str, Any]]]:
    """The rows, part by part."""
    wanted = [part for part in PARTS if part not in options.skip]
    asks = open_embedder(options.queries) if options.queries else model
    is_ours = isinstance(model, ConceptEmbedder)
    if "sts" in wanted:
        yield sts(model, options.data, options.limit)
    if set(wanted) <= {"sts"}:
        return
    texts = read_chapters(options.data, options.chapters)
    if "geometry" in wanted and is_ours:
        yield geometry(model, cut(model, texts, WINDOW, NUM_WINDOWS), "textbooks")
        if windows := mixed(model, options.data):
            yield geometry(model, windows, "all kinds of text")
    if "content" in wanted and is_ours and hasattr(model.model, "decode_view"):
        yield content(model, texts)
    if "speed" in wanted:
        yield speed(model, options.backbone, texts)
    if "chapters" in wanted:
        yield from retrieval(model, texts, asks, model.num_parts or 128)


def main(options: argparse.Namespace) -> int:
    """The command line."""
    if set(options.skip) >= set(PARTS):
        raise InputError("--skip: expected to leave at least one part, got all of them")
    stamp = environment()
    model, rows = open_embedder(options.model), []
    folder = Path(options.model).expanduser().resolve()
    name = options.name or (folder.parent.name if folder.name == "model" else folder.name)
    stamp["distilled_from"], stamp["backbone"] = model.distilled_from, model.backbone
    title = f"{name}, distilled from {model.distilled_from['teacher']}" if model.distilled_from else name
    for found in measure(options, model):
        rows += found
        write_results(options.out, name, rows, stamp, title=f"What it means: {title}")  # what is there is kept
    print(markdown_table(rows, ["part", "what", "value", "standard_error", "count"]))
    print(f"written to {options.out / name}.json")
    return 0
