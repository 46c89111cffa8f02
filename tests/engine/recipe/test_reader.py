"""YAML as recipes mean it, and every file that is none: one line each."""

import os
from itertools import pairwise
from pathlib import Path

import pytest

from conceptron.engine.errors import InputError
from conceptron.engine.recipe.load import load_recipe
from conceptron.engine.recipe.reader import LARGEST_FILE, dump, parse, read_yaml

LAUGHS = "\n".join(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]" for before, name in pairwise("abcdefg"))


@pytest.mark.parametrize("text, value", [
    ("1e-3", 1e-3), ("1E3", 1000.0), ("-1.5e+2", -150.0), (".5", 0.5), ("1_000", 1000), ("0x10", 16), ("-7", -7),
    ("'1e-3'", "1e-3"), ("010", "010"), ("12:30", "12:30"), ("2026-11-29", "2026-11-29"), ("1.2.3", "1.2.3"),
    ("true", True), ("off", False), ("null", None), ("", None), ("~", None), ("e3", "e3"), ("=", "="),
])  # fmt: skip
def test_scalars(text, value):
    found = parse(text, "here")
    assert found == value and type(found) is type(value)


def test_what_is_written_reads_back():
    tree = {"a": ["1e-3", "010", "12:30", "on", "", "=", "2026-11-29", "null", "~", "0x1", "text", "\u00e9 \u4e2d"],
            "b": [1e-3, 10, True, None, 1e30, -0.5], "c": {"d": {}}}  # fmt: skip
    assert parse(dump(tree), "here") == tree


@pytest.mark.parametrize("text, found", [
    ("a: &x [*x]", "sections or lists within each other, deeper than 20; write it flat"),
    ("a: &x {b: *x}", "sections or lists within each other, deeper than 20"),
    ("[" * 500, "within each other"),
    ("[" * 500 + "]" * 500, "within each other"),
    ("{a: " * 10_000 + "1" + "}" * 10_000, "within each other"),
    (f"a: &a [1]\n{LAUGHS}", "more than 10000 values; names (&a, *a) repeat too much"),
    ("train: {steps: 1}\ntrain: {steps: 2}", "found 'train' twice in one section"),
    ("train: {steps: 1, 'steps': 2}", "found 'steps' twice in one section"),
    ("? [a]\n: 1", "unhashable key"),
    ("a: !!python/name:os.system", "could not determine a constructor"),
    ("a: 1\n b: 2", "mapping values are not allowed here"),
    ("a: \x00", "unacceptable character"),
    ("a: *b", "undefined alias"),
    ("a: " + "9" * 5000, "digits"),
    ("a: 0x" + "f" * 5000, "a number of more than 100 digits"),
], ids=range(15))  # fmt: skip
def test_what_is_no_tree(text, found):
    with pytest.raises(InputError) as caught:
        parse(text, "here")
    assert str(caught.value).startswith("here: ") and found in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_names_may_be_used_again():
    tree = {"a": {"b": 1}, "c": {"b": 1, "d": 2}, "e": {"b": 1}}
    assert parse("a: &x {b: 1}\nc: {<<: *x, d: 2}\ne: *x", "here") == tree


def test_files(tmp_path):
    def refusal(path) -> str:
        with pytest.raises(InputError) as caught:
            load_recipe(path)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: 1\n")  # with a byte order mark
    assert read_yaml(file) == {"a": 1}
    file.write_bytes("a: 1".encode("utf-16"))
    assert "expected UTF-8 text, got byte 0xff at 0" in refusal(file)
    file.write_text("#" * (LARGEST_FILE + 1))
    assert "this is no recipe" in refusal(file)
    assert "expected a recipe file, got a folder" in refusal(tmp_path)
    assert "cannot be read (File name too long)" in refusal("a" * 300)
    assert "no such recipe" in refusal("\udcff.yaml") and "cannot be read" in refusal("a\0b")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "nowhere")
    assert f"leads to nothing ({tmp_path}/nowhere); give the path" in refusal(tmp_path / "link.yaml")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    assert "cannot be read (Too many levels of symbolic links)" in refusal(tmp_path / "loop.yaml")
    assert "this is no recipe" in refusal("/dev/zero")


def test_a_pipe_is_a_file():
    end, other = os.pipe()
    os.write(other, b"a: 1\n")
    os.close(other)
    assert read_yaml(Path(f"/dev/fd/{end}")) == {"a": 1}
    os.close(end)


@pytest.mark.parametrize("text, found", [
    ("1: 2", "1: "), ("on: {}", "True"), ("model: {1: 2}", "model"), ("objective: {name: mlm, 1: 2}", "objective"),
    ("run: {name: 'my run'}", "run.name: expected a name of up to 100 letters"), ("run: {name: ..}", "run.name"),
    ("run: {name: 1.10}", "run.name: expected a name"), ("run: {folder: 1.5}", "run.folder: expected a path"),
    (f"run: {{name: {'x' * 101}}}", "run.name"),
    ('run: {folder: "a\\0b"}', "run.folder: expected a path or name without control"),
    ('run: {folder: "a\\nb"}', "run.folder: expected a path or name without control"),
])  # fmt: skip
def test_keys_and_names(text, found, tmp_path):
    sections = {"data": "{}", "objective": "{name: mlm}", "train": "{steps: 3}"}
    sections.pop(text.partition(":")[0], None)
    lines = [text, *(f"{name}: {section}" for name, section in sections.items())]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    with pytest.raises(InputError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert found in str(caught.value) and len(str(caught.value).splitlines()) == 1
