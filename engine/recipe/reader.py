"""YAML as a recipe means it: text in, plain values out, and one line for whatever is not that.

Beside PyYAML's rules, which are those of YAML 1.1: 1e-3 is a number, 12:30, 010 and 2026-11-29 are text, and a key
stands once in a section.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ..errors import InputError

LARGEST_FILE = 1 << 20  # characters; a longer file is no recipe
LARGEST_TREE = 10_000  # values; more come from names (`&a`, `*a`) that repeat each other
LARGEST_NUMBER = 10**100
DEEPEST = 20  # sections within sections; deeper ones hold themselves
TOO_DEEP = f"sections or lists within each other, deeper than {DEEPEST}; write it flat"
SCALARS = {
    "bool": ("yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": ("<<", "<"),
}


class Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and seen.setdefault(key.value, key) is not key:
                found = f"found {key.value!r} twice in one section"
                raise yaml.composer.ComposerError(None, None, found, key.start_mark)
        return node


class Dumper(yaml.SafeDumper):
    """Quotes what `Loader` would take for something else than text."""

    yaml_implicit_resolvers: ClassVar = {}


for name, (pattern, first) in SCALARS.items():
    for each in (Loader, Dumper):
        each.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"(?:{pattern})$"), list(first))


def dump(tree: Any) -> str:
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def parse(text: str, where: str) -> Any:
    """The value that a text holds. ``where``: begins the line of an error.

    Raises:
        InputError: it is no YAML, or no tree of plain values.
    """
    try:
        tree = yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of a number with thousands of digits
        raise InputError(f"{where}: {one_line(error)}") from error
    except RecursionError as error:
        raise InputError(f"{where}: {TOO_DEEP}") from error
    check_size(tree, where)
    return tree


def check_size(tree: Any, where: str) -> None:
    """Refuses what is deeper, or holds more, than anybody writes: names that refer to themselves, or to each other."""
    for number, (depth, value) in enumerate(inside(tree, 1)):
        if depth > DEEPEST:
            raise InputError(f"{where}: {TOO_DEEP}")
        if number > LARGEST_TREE:
            raise InputError(f"{where}: more than {LARGEST_TREE} values; names (&a, *a) repeat too much")
        if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
            raise InputError(f"{where}: a number of more than 100 digits; no field takes it")


def inside(tree: Any, depth: int) -> Iterator[tuple[int, Any]]:
    """Every value, and how deep it lies; one that is too deep is not looked into."""
    yield depth, tree
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple | set) else ()
    for part in parts if depth <= DEEPEST else ():
        yield from inside(part, depth + 1)


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a file.

    Raises:
        InputError: there is no such file, it cannot be read, or holds something else.
    """
    try:
        if path.is_dir():
            raise InputError(f"{path}: expected a recipe file, got a folder")
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(LARGEST_FILE + 1)
    except FileNotFoundError as error:
        problem = f"leads to nothing ({path.readlink()})" if path.is_symlink() else "no such recipe"
        hint = "give the path of a YAML file or the name of a shipped recipe"
        raise InputError(f"{path}: {problem}; {hint}") from error
    except UnicodeDecodeError as error:
        byte = f"{error.object[error.start]:#04x} at {error.start}"
        raise InputError(f"{path}: expected UTF-8 text, got byte {byte}") from error
    except (OSError, ValueError) as error:  # ValueError: a name that holds a NUL
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if len(text) > LARGEST_FILE:
        raise InputError(f"{path}: more than {LARGEST_FILE} characters; this is no recipe")
    tree = parse(text, str(path))
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected sections such as `run:` and `model:`, got {describe(tree)}")
    return tree


KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", list: "a list", dict: "a section"}


def describe(value: Any) -> str:
    """A value and its kind in the words of YAML."""
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return "nothing" if value is None else f"{text} ({KINDS.get(type(value), type(value).__name__)})"


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
