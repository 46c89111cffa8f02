"""pydocs on a small tree of made-up packages: what is taken, what is left out, what counts as repeated."""

import ast
import email
import io
import json
import py_compile
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conceptron.engine.data import cache, docstrings, pydocs

LONG = (
    "This paragraph is long enough to be worth keeping, and it says in plain words what the thing does: it takes "
    "a {0} and turns it into another {0}, slowly, with a {1} in between that nobody has asked for but everybody likes."
)
WORDS = ["tree", "river", "stone", "cloud", "engine", "ladder", "window", "garden", "bottle", "pencil", "mirror"]


def paragraph(i):
    return " ".join(np.random.default_rng(i).choice(WORDS, 40)).capitalize() + "."


@pytest.fixture
def packages(tmp_path):
    """Two packages; some of their text is the same."""
    files = {
        "alpha/__init__.py": f'"""{paragraph(0)}"""\nraise SystemExit("never imported")\n',
        "alpha/one.py": f'"""{paragraph(1)}\n\n{paragraph(2)}"""\n\nclass A:\n    """{paragraph(3)}"""\n',
        "alpha/two.py": f'"""{paragraph(4)}\n\n{paragraph(2)}"""\n',
        "alpha/tests/test_one.py": f'"""{paragraph(5)}"""\n',
        "alpha/_vendor/other.py": f'"""{paragraph(5)}"""\n',
        "alpha/broken.py": 'def (:\n"""text"""\n',
        "alpha/latin.py": b'"""f\xfcr"""\n',
        "alpha/null.py": b'"""a\x00b"""\n',
        "alpha/nested.py": "x = " + "(" * 5000 + ")" * 5000 + "\n",
        "alpha/short.py": '"""Only a few words."""\n',
        "beta/__init__.py": "",
        "beta/copy.py": f'"""{paragraph(1)}\n\n{paragraph(2).upper()}\n\n{paragraph(6)}"""\n',
    }
    for name, text in files.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return {name: tmp_path / "site" / name for name in ("alpha", "beta")}


def corpus(packages):
    modules = [module for name, folder in packages.items() for module in pydocs.find_modules(name, folder)]
    found = list(pydocs.parse([module.path for module in modules]))
    names = [module.name for module in modules]
    return dict(zip(names, found, strict=True))


# --- docstrings


SOURCE = '''
"""Of the module."""
import never_there
class A(Base):
    """Of the class."""
    x = 1
    "not a docstring"
    def f(self):
        r"""Of the method.

        Parameters
        ----------
        x : :class:`~torch.Tensor`
            With `code`, see :func:`the text <target>`.

            >>> f(x)
            3

        After it.
        """
        def inner():
            """Of the inner function."""
            return self
    async def g(self): """Of the coroutine."""
    h = lambda self: "not a docstring"
if sys.platform == "win32":
    def h(): """On Windows."""
else:
    def h(): """Elsewhere."""
try:
    import fast
except ImportError:
    def k(): """In a handler."""
else:
    class B:
        def m(self): return "not a docstring"
finally:
    @decorated
    class C(metaclass=M):
        __slots__ = ()
        def m(self): """In the last clause."""
for x in range(3):
    def m(): """In a loop."""
'''
SECTIONS = [
    ("", ["Of the module."]),
    ("A", ["Of the class."]),
    ("A.f", ["Of the method.", "Parameters", "x : torch.Tensor\n    With `code`, see the text.", "After it."]),
    ("A.f.inner", ["Of the inner function."]),
    ("A.g", ["Of the coroutine."]),
    ("h", ["On Windows."]),
    ("h", ["Elsewhere."]),
    ("k", ["In a handler."]),
    ("C.m", ["In the last clause."]),
    ("m", ["In a loop."]),
]
SETTERS = '''
add_docstr(torch.abs, r"""abs(input)

Computes the absolute value of each element in the input given here.""".format(**common))
add_newdoc("numpy._core", "ufunc", """Functions that operate element by element on whole arrays.""")
add_newdoc("numpy._core", "ndarray", ("T", "View of the transposed array."))
print("not a docstring either")
'''
SET = [
    ("torch.abs", ["abs(input)", "Computes the absolute value of each element in the input given here."]),
    ("ufunc", ["Functions that operate element by element on whole arrays."]),
    ("ndarray.T", ["View of the transposed array."]),
]


def test_docstrings_come_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    assert docstrings.sections(str(path)) == SECTIONS  # compiled here
    py_compile.compile(str(path), doraise=True)
    assert docstrings.sections(str(path)) == SECTIONS  # by an installer
    path.write_text(SOURCE + SETTERS)
    assert docstrings.sections(str(path)) == SECTIONS + SET


def test_what_is_compiled_of_another_source_or_damaged_is_not_read(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('"""Of the old module."""\n')
    place = Path(py_compile.compile(str(path), doraise=True))
    path.write_text('"""Of the new one, longer."""\n')
    assert docstrings.sections(str(path)) == [("", ["Of the new one, longer."])]
    py_compile.compile(str(path), doraise=True)
    place.write_bytes(place.read_bytes()[:20])
    assert docstrings.sections(str(path)) == [("", ["Of the new one, longer."])]


def test_both_ways_to_read_a_file_find_the_same():
    for path in sorted(Path(json.__file__).parent.glob("*.py")) + sorted(Path(email.__file__).parent.glob("*.py")):
        parsed: list = []
        docstrings.visit(ast.parse(path.read_bytes()), "", parsed)
        assert docstrings.sections(str(path)) == parsed


@pytest.mark.parametrize("text", ["1.0  2.5\n4.0  5.5", "+---+---+\n| a | b |", ">>> f()\n[1, 2]", ".. image:: a.png"])
def test_what_is_not_prose_is_left_out(text):
    assert docstrings.paragraphs(f"Before it.\n\n{text}\n\nAfter it.") == ["Before it.", "After it."]


def test_modules_are_found_and_unreadable_ones_are_passed_over(packages):
    found = corpus(packages)
    assert list(found) == [
        "alpha", "alpha.broken", "alpha.latin", "alpha.nested", "alpha.null", "alpha.one", "alpha.short", "alpha.two",
        "beta", "beta.copy",
    ]  # fmt: skip
    assert {name for name, sections in found.items() if sections is None} == {
        "alpha.broken", "alpha.latin", "alpha.nested", "alpha.null",
    }  # fmt: skip
    assert [name for name, _ in found["alpha.one"]] == ["", "A"]


def test_a_worker_that_dies_is_noticed(monkeypatch, tmp_path):
    (tmp_path / "a.py").write_text('"""Text."""')
    monkeypatch.setattr(pydocs, "start_worker", lambda paths: subprocess.Popen(
        [sys.executable, "-c", "raise SystemExit(3)"], stdout=subprocess.PIPE))  # fmt: skip
    with pytest.raises(RuntimeError, match=r"a\.py: the program that reads docstrings stopped here"):
        list(pydocs.parse([tmp_path / "a.py"]))


# --- what is repeated


def test_only_the_first_copy_of_a_paragraph_stays(packages):
    documents = [(name, sections) for name, sections in corpus(packages).items() if sections]
    texts, counts = pydocs.assemble(documents)
    texts = dict(texts)
    assert list(texts) == ["alpha", "alpha.one", "alpha.two", "beta.copy"]
    assert paragraph(2) in texts["alpha.one"] and paragraph(2) not in texts["alpha.two"]
    assert paragraph(6) in texts["beta.copy"]
    assert paragraph(1) not in texts["beta.copy"] and paragraph(2).upper() not in texts["beta.copy"]
    assert texts["alpha.one"] == f"alpha.one\n\n{paragraph(1)}\n\n{paragraph(2)}\n\nA\n{paragraph(3)}"
    assert counts == {"paragraphs": 10, "repeated_paragraphs": 3, "short_documents": 1}


@pytest.mark.parametrize(("second", "is_new"), [
    (LONG.format("Linear", "BertModel"), False),
    (LONG.format("tensor", "GPT model"), False),  # all three changed: still most of it is what the first one says
    ("See above. " + LONG.format("Linear", "LlamaModel"), False),
    (" ".join(reversed(LONG.split())), True),
    (LONG[:60] + paragraph(7), True),
    ("Parameters", True),
    ("12, 34.", False),
])  # fmt: skip
def test_is_new(second, is_new):
    assert pydocs.is_new([LONG.format("Linear", "LlamaModel"), second]).tolist() == [True, is_new]


def test_is_new_by_counting():
    random = np.random.default_rng(0)
    parts = []
    for _ in range(60):
        words = random.choice(WORDS[:2], random.integers(1, 30))
        parts.append(" ".join(words) + ".")
    seen, expected = set(), []
    for part in parts:
        words = part[:-1].split()
        shingles = [tuple(words[i : i + 8]) for i in range(max(1, len(words) - 7))]
        new = set(shingles) - seen
        seen |= new
        expected.append(len(new) >= 0.75 * len(shingles))
    assert pydocs.is_new(parts).tolist() == expected
    assert 10 < sum(expected) < len(parts) - 10
    assert pydocs.is_new([]).tolist() == []


def test_headings_without_text_go():
    parts = ["Text here.", "Parameters", "x : int.", "Returns", "Examples", "Notes", "One.", "See Also"]
    assert pydocs.without_empty_headings(parts) == ["Text here.", "Parameters", "x : int.", "Notes", "One."]


# --- the split, and the real thing


def test_the_build_is_split_by_document_and_repeatable(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(pydocs, "language_topics", lambda: [])
    monkeypatch.setattr(pydocs, "is_held_out", lambda name: name == "alpha.two" or name.startswith("beta"))
    folders = [tmp_path / name for name in ("a", "b")]
    indices = []
    for folder in folders:
        folder.mkdir()
        indices.append(pydocs.write(folder, packages))
    assert indices[0] == indices[1]
    assert indices[0]["documents"] == {"train": 2, "validation": 2} and indices[0]["unreadable_modules"] == 4
    for name in ("train.jsonl", "validation.jsonl"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    train, held_out = (list(pydocs.read(folders[0] / f"{split}.jsonl")) for split in ("train", "validation"))
    assert [text.split("\n")[0] for text in train] == ["alpha", "alpha.one"]
    assert [text.split("\n")[0] for text in held_out] == ["alpha.two", "beta.copy"]
    assert not {part for text in train for part in text.split("\n\n")} & {p for t in held_out for p in t.split("\n\n")}


def test_about_the_right_share_is_held_out():
    held_out = [name for name in map(str, range(10_000)) if pydocs.is_held_out(name)]
    assert 240 < len(held_out) < 360
    assert held_out[:3] == ["3", "9", "16"]  # another hash would hold out what earlier runs were trained on


def test_installed_packages_are_found_without_importing_them(packages, monkeypatch):
    monkeypatch.syspath_prepend(packages["alpha"].parent)  # importing alpha would end the program
    folders = pydocs.package_folders(("alpha", "numpy", "no_such_package_at_all"))
    assert list(folders) == ["", "alpha", "numpy"]
    assert folders["alpha"] == packages["alpha"] and (folders[""] / "ast.py").exists()
    assert pydocs.package_version("numpy") == np.__version__


def test_the_small_corpus_is_a_part_of_the_large_one(packages, tmp_path, monkeypatch):
    """It has its own place in the cache, and documents of the standard library on the same side."""
    monkeypatch.setattr(pydocs, "language_topics", lambda: [])
    monkeypatch.setattr(pydocs, "SHORTEST", 100)
    monkeypatch.setattr(pydocs, "package_folders", lambda names: {
        "": packages["alpha"], **{name: packages["beta"] for name in names[:1]}
    })  # fmt: skip
    texts, places = {}, set()
    for name in pydocs.NAMES:
        split, facts = pydocs.open_pydocs(tmp_path / "cache", name)
        texts[name] = set(split.train.read()) | set(split.validation.read())
        places.add(split.train.identity[0])
        assert split.train.name == name and facts["modules"] == {"pydocs": 10, "pydocs-small": 8}[name]
    assert texts["pydocs-small"] < texts["pydocs"] and len(places) == len(list((tmp_path / "cache").glob("pydocs-*/")))


class Screen(io.StringIO):
    """What a terminal was shown."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("delay, found", [(0.0, "/10 ["), (3600.0, "")])
def test_a_bar_counts_modules_where_it_takes_long_and_somebody_looks(packages, tmp_path, monkeypatch, delay, found):
    monkeypatch.setattr(cache, "DELAY_S", delay)
    monkeypatch.setattr(pydocs, "language_topics", lambda: [])
    (tmp_path / "out").mkdir()
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    pydocs.write(tmp_path / "out", packages)
    first, *rest = screen.getvalue().splitlines()
    assert first == "reading the documentation in 10 installed modules"
    assert (found in "".join(rest) and "module" in "".join(rest)) if found else not "".join(rest).strip()


def test_without_a_terminal_one_line_is_said(packages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "DELAY_S", 0.0)
    (tmp_path / "out").mkdir()
    pydocs.write(tmp_path / "out", packages)
    assert capsys.readouterr().err == "reading the documentation in 10 installed modules\n"


def test_json_of_the_standard_library():
    folder = pydocs.package_folders(())[""]
    modules = pydocs.find_modules("json", folder / "json")
    assert [module.name for module in modules] == ["json", "json.decoder", "json.encoder", "json.scanner", "json.tool"]
    texts, _ = pydocs.assemble([
        (module.name, sections)
        for module, sections in zip(modules, pydocs.parse([module.path for module in modules]), strict=True)
        if sections
    ])  # fmt: skip
    assert "Serialize ``obj`` to a JSON formatted ``str``." in dict(texts)["json"]
    assert ">>>" not in dict(texts)["json"]
