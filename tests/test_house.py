"""The house stands as docs/house.md draws it: who imports whom, which folders ship, how large a file may grow."""

import ast
import re
import sys
from pathlib import Path

import pytest

from conceptron.commands.table import COMMANDS

ROOT = Path(__file__).parent.parent
FLOORS = ["kernels", "models", "engine", "bench"]  # each may import those before it
OUTSIDE = {  # third-party packages a floor may import; what is not listed is open to every floor
    "triton": {"kernels", "bench"},
    "transformers": {"models", "engine", "bench"},
    "deepspeed": {"engine", "bench"},
    "datasets": {"engine", "bench"},
    "matplotlib": {"bench"},
}
MAX_LINES = 500
GUESSES = {"train": "the trainer", "recipes": "the shipped ones"}  # command -> what its file is named after instead


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> list[tuple[int, str]]:
    """(relative level, dotted name) of every import in a file, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found += [(node.level, f"{module}.{alias.name}".strip(".")) for alias in node.names]
    return found


def inside(path: Path, level: int, name: str) -> str:
    """The path from the root, as a dotted name, that a relative import in ``path`` points to."""
    base = list(path.relative_to(ROOT).parent.parts)
    return ".".join(base[: len(base) - (level - 1)] + name.split("."))


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_down(floor):
    allowed = FLOORS[: FLOORS.index(floor) + 1]
    for path in sources(floor):
        for level, name in imports(path):
            if level == 0:
                package = name.split(".")[0]
                assert floor in OUTSIDE.get(package, {floor}), f"{path}: {floor} must not import {package}"
                assert package not in ("conceptron", *FLOORS), f"{path}: import the house relatively, not {name}"
            else:
                target = inside(path, level, name).split(".")[0]
                assert target in allowed or target == "__version__", f"{path}: {floor} must not import {target}"


def test_the_table_of_commands_needs_nothing():
    for path in sources("commands"):
        for level, name in imports(path):
            if level:
                assert inside(path, level, name).startswith("commands."), f"{path}: {name}"
            else:
                assert name.split(".")[0] in sys.stdlib_module_names, f"{path}: {name} would be loaded by every --help"


def test_inside_an_operator():
    for path in sources("kernels"):
        names = [inside(path, level, name) if level else name for level, name in imports(path)]
        if path.name == "reference.py":
            assert not any(name.split(".")[0] == "triton" for name in names), f"{path}: an oracle must not need triton"
        elif path.parent.name != "kernels" and path.name not in ("op.py", "__init__.py"):
            assert not any(".reference" in name for name in names), f"{path}: only the door knows the oracle"


@pytest.mark.parametrize("folder", ["commands", *FLOORS, "recipes"])
def test_top_folders_have_no_init(folder):
    # with one, `import kernels` inside a checkout finds ours, not the Hugging Face package that transformers asks for
    assert not (ROOT / folder / "__init__.py").exists()


def test_wheel_names_every_folder():
    text = (ROOT / "setup.py").read_text()
    scope: dict = {}
    exec(text.split("setup(")[0].replace("from setuptools import setup", ""), scope)
    named = {folder.replace(".", "/") for folder in scope["FOLDERS"]}
    kept = {
        str(path.parent.relative_to(ROOT))
        for top in ["commands", *FLOORS, "recipes"]
        for suffix in ("*.py", "*.yaml")
        for path in (ROOT / top).rglob(suffix)
    }
    assert named == kept


def test_files_stay_small_and_named_after_things():
    for floor in [*FLOORS, "tests"]:
        for path in sources(floor):
            lines = len(path.read_text().splitlines())
            assert lines <= MAX_LINES, f"{path}: {lines} lines, more than {MAX_LINES}"
            assert path.name not in ("utils.py", "common.py", "helpers.py"), path


def test_no_silent_excepts():
    for floor in FLOORS:
        for path in sources(floor):
            assert not re.search(r"except( Exception)?:\s*\n\s*pass", path.read_text()), path


def test_every_recipe_says_how_to_run_it():
    for path in (ROOT / "recipes").rglob("*.yaml"):
        head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
        for word in ("conceptron train", "Hardware", "Time", "Result"):
            assert word in head, f"{path}: its opening comment lacks {word!r}"


def test_no_circle_of_imports():
    """Of what modules import when they are loaded; a function may import what it alone needs."""
    paths = [path for floor in FLOORS for path in sources(floor)]
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    names = {name.removesuffix(".__init__"): name for name in files}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom) and node.level]
        found = {inside(path, node.level, part) for node in top
                 for part in (node.module or "", *(f"{node.module or ''}.{a.name}".strip(".") for a in node.names))
                 if part}  # fmt: skip
        graph[name] = {names[target] for target in found if target in names} - {name}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_bench_shows_itself():
    """The files at the top of bench/ are the words of its command line; everything else has a room."""
    at_top = {path.stem for path in (ROOT / "bench").glob("*.py")} | {"kernels"}
    assert at_top == {command.words.split()[-1] for command in COMMANDS if command.runs.startswith("bench.")}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.words)
def test_the_file_behind_a_command_is_found_at_the_first_guess(command):
    *path, file = command.runs.split(":")[0].split(".")
    last = command.words.split()[-1]
    assert last in (file, *path) or command.words in GUESSES, f"{command.words} is run by {command.runs}"
