"""`pydocs`: the documentation that an installed Python carries, as a corpus of English prose; `pydocs-small` a part.

One document is one module: the docstrings of the module, its classes and functions, in the order of the file; and one
for each topic of the language reference. Sources are parsed, never imported. Which packages are read is a fixed list,
so the corpus depends on what is installed and on nothing else.

Repeated text is removed over the whole corpus before it is split, so that what is held out was not trained on: of a
paragraph that occurs again, even with some words changed, only the first copy stays.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pickle
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .cache import built, fingerprint, progress, say
from .docstrings import Section, paragraphs
from .sources import Documents, Split

PACKAGES = (
    "torch", "numpy", "scipy", "transformers", "datasets", "huggingface_hub", "matplotlib", "pandas", "sympy",
    "networkx", "deepspeed", "tensorboard", "pydantic", "fontTools", "mpmath", "fsspec", "tqdm", "werkzeug", "jinja2",
    "markdown",
)  # fmt: skip
CORPORA = {"pydocs": PACKAGES, "pydocs-small": ()}  # the small one: the standard library and the language alone
NAMES = tuple(CORPORA)
SKIPPED_FOLDERS = {
    "test", "tests", "testing", "idle_test", "__pycache__", "_vendor", "vendor", "vendored_packages", "_vendored",
    "externals", "third_party", "site-packages", "dist-packages",
}  # fmt: skip
SKIPPED_FILES = re.compile(r"(test_.*|.*_test|.*_pb2|.*_pb2_grpc|conftest)\.py")
HELD_OUT = 0.03  # of the documents
SHINGLE = 8  # words
NEW = 0.75  # a paragraph stays when at least this share of its shingles has not occurred before
SHORTEST = 200  # characters; what is left of a module must have as many

WORD = re.compile(r"[a-z]+")


class Module(NamedTuple):
    name: str
    path: Path


def open_pydocs(cache: Path, name: str = "pydocs") -> tuple[Split, dict[str, Any]]:
    """The corpus, built in ``cache`` when this set of packages has not been seen before; and what the build counted.

    ``name``: one of ``CORPORA``.
    """
    folders = package_folders(CORPORA[name])
    versions = {name: package_version(name) for name in folders}
    identity = fingerprint([platform.python_implementation(), platform.python_version(), versions, own_code()])
    folder = cache / f"pydocs-{identity}"
    index = built(folder, lambda unfinished: write(unfinished, folders))
    train, validation = (
        Documents(name, [identity, split], lambda split=split: read(folder / f"{split}.jsonl"))
        for split in ("train", "validation")
    )
    return Split(train, validation), {key: value for key, value in index.items() if key != "files"}


def read(file: Path) -> Iterator[str]:
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def write(folder: Path, folders: dict[str, Path]) -> dict[str, Any]:
    modules = [module for name, place in folders.items() for module in find_modules(name, place)]
    say(f"reading the documentation in {len(modules)} installed modules")
    found = list(progress(parse([module.path for module in modules]), "module", len(modules)))
    topics = language_topics()
    documents = [*topics, *((module.name, parts) for module, parts in zip(modules, found, strict=True) if parts)]
    texts, counts = assemble(documents)
    num_documents = {}
    for split, held_out in (("train", False), ("validation", True)):
        chosen = [{"name": name, "text": text} for name, text in texts if is_held_out(name) == held_out]
        lines = (json.dumps(document, allow_nan=False) + "\n" for document in chosen)
        (folder / f"{split}.jsonl").write_text("".join(lines))
        num_documents[split] = len(chosen)
    return {
        "packages": {name or "python": package_version(name) for name in folders},
        "documents": num_documents,
        "topics": len(topics),
        "modules": len(modules),
        "unreadable_modules": sum(parts is None for parts in found),
        **counts,
    }


# --- what is installed


def package_folders(names: Sequence[str]) -> dict[str, Path]:
    """Name -> folder of those packages that are installed, found without importing them; "" is the standard library."""
    folders = {"": Path(sysconfig.get_path("stdlib"))}
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin and Path(spec.origin).name == "__init__.py":
            folders[name] = Path(spec.origin).parent
    return folders


def package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name) if name else platform.python_version()
    except importlib.metadata.PackageNotFoundError:
        return ""


def own_code() -> str:
    """A hash of the code that decides what the corpus is."""
    here = Path(__file__)
    return hashlib.sha256(here.read_bytes() + here.with_name("docstrings.py").read_bytes()).hexdigest()


def find_modules(name: str, folder: Path) -> list[Module]:
    """The modules of a package in the order of their paths, without tests and vendored copies of other packages."""
    modules = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(sub for sub in folders if sub not in SKIPPED_FOLDERS and sub.isidentifier())
        for file in sorted(files):
            if file.endswith(".py") and not SKIPPED_FILES.fullmatch(file):
                path = Path(place, file)
                parts = [name, *path.relative_to(folder).with_suffix("").parts]
                modules.append(Module(".".join(part for part in parts if part and part != "__init__"), path))
    return modules


def language_topics() -> list[tuple[str, list[Section]]]:
    """The topics of the language reference; a Python cut down to the minimum comes without them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [(f"python topic {name}", [("", paragraphs(text))]) for name, text in sorted(topics.items())]


def parse(paths: Sequence[Path]) -> Iterator[list[Section] | None]:
    """The docstrings of each file, None for one that cannot be parsed; the work is shared by all cores."""
    num_workers = min(8, len(os.sched_getaffinity(0)), len(paths))
    workers = [start_worker(paths[first::num_workers]) for first in range(num_workers)]
    try:
        for i, path in enumerate(paths):
            try:
                yield pickle.load(workers[i % num_workers].stdout)
            except EOFError as error:
                raise RuntimeError(f"{path}: the program that reads docstrings stopped here") from error
    finally:
        for worker in workers:
            worker.stdout.close()
            worker.kill()
            worker.wait()


def start_worker(paths: Sequence[Path]) -> subprocess.Popen:
    program = Path(__file__).with_name("docstrings.py")
    with tempfile.TemporaryFile() as file:
        file.write("".join(f"{path}\n" for path in paths).encode(errors="surrogateescape"))
        file.seek(0)
        return subprocess.Popen([sys.executable, "-I", "-S", "-X", "utf8", program], stdin=file, stdout=subprocess.PIPE)


# --- documents


def assemble(documents: Iterable[tuple[str, list[Section]]]) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(name, text) of the documents without what is repeated, and counts for the index."""
    documents = list(documents)
    stays = iter(is_new([part for _, sections in documents for _, parts in sections for part in parts]))
    texts, counts = [], {"paragraphs": 0, "repeated_paragraphs": 0, "short_documents": 0}
    for name, sections in documents:
        pieces = [name]
        for title, parts in sections:
            kept = [part for part in parts if next(stays)]
            counts["paragraphs"] += len(parts)
            counts["repeated_paragraphs"] += len(parts) - len(kept)
            kept = without_empty_headings(kept)
            if kept:
                pieces.append("\n\n".join(kept) if not title else f"{title}\n" + "\n\n".join(kept))
        text = "\n\n".join(pieces)
        if len(text) >= SHORTEST:
            texts.append((name, text))
        else:
            counts["short_documents"] += 1
    return texts, counts


def is_heading(paragraph: str) -> bool:
    """`Parameters`, `See Also`, `Example::`: a line that says nothing by itself."""
    return "\n" not in paragraph and len(paragraph) <= 30 and not paragraph.endswith(".") and paragraph.count(" ") <= 3


def without_empty_headings(parts: list[str]) -> list[str]:
    after = [*map(is_heading, parts[1:]), True]
    return [part for part, is_empty in zip(parts, after, strict=False) if not (is_heading(part) and is_empty)]


def is_new(parts: Sequence[str]) -> np.ndarray:
    """[n] bool: does a paragraph say something that no earlier one has said? A heading always counts as new.

    Words are letters only, without case. Two paragraphs share a shingle when they have eight words in a row in common;
    a shorter paragraph is one shingle.
    """
    numbers: defaultdict[str, int] = defaultdict(count(1).__next__)
    words: list[int] = []
    num_words = np.empty(len(parts), dtype=np.int64)
    for i, part in enumerate(parts):
        found = [numbers[word] for word in WORD.findall(part.lower())]
        found += [0] * (SHINGLE - len(found))
        num_words[i] = len(found)
        words += found
    ids = np.array(words, dtype=np.uint64)
    hashes = np.zeros(max(0, len(ids) - SHINGLE + 1), dtype=np.uint64)
    for k in range(SHINGLE):  # a polynomial in an odd number, modulo 2**64
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[k : k + len(hashes)]
    ends = np.cumsum(num_words)
    part_of = np.repeat(np.arange(len(parts)), num_words)[: len(hashes)]
    inside = np.arange(len(hashes)) + SHINGLE <= ends[part_of]  # all eight words in one paragraph
    part_of, hashes = part_of[inside], hashes[inside]
    first = part_of[np.unique(hashes, return_index=True)[1]]  # the paragraph in which each shingle occurs first
    share = np.bincount(first, minlength=len(parts)) / (num_words - SHINGLE + 1)
    has_words = ids[ends - num_words] > 0
    return has_words & (share >= NEW) | np.array([is_heading(part) for part in parts], dtype=bool)


def is_held_out(name: str) -> bool:
    """Decided by the document's name alone, so that a module stays on its side when packages change."""
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return number < HELD_OUT * 2**64
