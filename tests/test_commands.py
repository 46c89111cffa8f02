"""Every option of every command, walked by its table: what is out of range is one line, before anything is loaded."""

import inspect
import math
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib import import_module

import pytest

from conceptron import __main__ as face
from conceptron.bench import meaning
from conceptron.bench.kernels.cases import OPERATORS
from conceptron.bench.kernels.matrix import MATRICES
from conceptron.bench.kernels.providers import PROVIDERS
from conceptron.commands import table
from conceptron.commands.ranges import Number, Place, Text, Whole, Word, Words
from conceptron.commands.reading import UsageError, parse, parser_of
from conceptron.commands.table import COMMANDS, Command, Option
from conceptron.engine.errors import InputError
from conceptron.engine.generate import MODES
from conceptron.engine.recipe.load import find_recipe
from conceptron.kernels.compile import SHARED_KB
from conceptron.models.generation.sampling import SCHEDULES, STRATEGIES, Sampling

EVERY = [(command, option) for command in COMMANDS for option in command.options if option.kind is not None]
NAMES = [f"{command.words} {option.name}" for command, option in EVERY]
BAD = {
    Whole: ["", "x", "1.5", "true", "nan", "inf", "1e3", str(2**64), str(-(2**64))],
    Number: ["", "x", "nan", "inf", "1e400", "1e-320", "True", "1e300"],
    Text: ["\udcff", "a\0b"],
    Place: ["", "\udcff", "a\0b"],
    Word: ["", "nothing of the kind", "\udcff"],
    Words: ["", "nothing of the kind", "sm_80,"],
}


def line(command: Command, option: Option, value: str, tmp_path) -> list[str]:
    """A command line in which all that must be given is given, and ``option`` has ``value``."""
    argv, taken = command.words.split(), set()
    for i, other in enumerate(command.options):
        stands_before = not option.name.startswith("--") and i < command.options.index(option)
        may_go = other.count in "?*" and not stands_before
        if other is option and not option.name.startswith("--"):
            argv.append(value)
        if other is option or (not other.required and other.name.startswith("--")) or may_go:
            continue
        argv += given(other, tmp_path)
    for other in command.options:
        if other.either and other.either not in taken and option.either != other.either:
            argv += given(other, tmp_path)
            taken.add(other.either)
    return [*argv, f"{option.name}={value}"] if option.name.startswith("--") else argv


def given(option: Option, tmp_path) -> list[str]:
    if isinstance(option.kind, Place):
        place = tmp_path / {"file": "given", "new file": "new.txt"}.get(option.kind.holds, "")
        if option.kind.holds == "file":
            place.touch()
        value = str(place)
    else:
        value = option.kind.words[0] if isinstance(option.kind, Word) else "1"
    return [option.name, value] if option.name.startswith("--") else [value]


@pytest.mark.parametrize(("command", "option"), EVERY, ids=NAMES)
def test_what_is_out_of_range_is_one_line_that_names_the_option(command, option, tmp_path):
    below = [str(option.kind.low - 1)] if isinstance(option.kind, Whole | Number) else []
    above = [str(option.kind.high + 1)] if isinstance(option.kind, Whole) else []
    if isinstance(option.kind, Number) and option.kind.above:
        below.append(str(option.kind.low))
    for value in [*BAD[type(option.kind)], *below, *above]:
        with pytest.raises(UsageError) as told:
            parse(line(command, option, value, tmp_path))
        message = str(told.value)
        assert "\n" not in message and "expected" in message, (value, message)
        assert any(name in message for name in (option.name, option.key, option.shown or option.name)), message
        message.encode()  # can be printed


@pytest.mark.parametrize(("command", "option"), EVERY, ids=NAMES)
def test_the_ends_of_a_range_and_its_default_are_inside(command, option, tmp_path):
    kind = option.kind
    if isinstance(kind, Whole | Number):
        ends = [kind.high] if isinstance(kind, Number) and kind.above else [kind.low, kind.high]
        for end in ends:
            read = getattr(parse(line(command, option, repr(end), tmp_path))[1], option.key)
            assert read == end or read == [end]
    values = option.default if isinstance(option.default, tuple) else [option.default]
    for value in values:
        if value is not None and not isinstance(kind, Place) and value != "":
            assert kind.read(str(value)) == value or isinstance(kind, Words)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.words)
def test_each_command_is_there_shows_an_example_that_parses_and_reads_its_options(command, monkeypatch):
    monkeypatch.setattr(Place, "read", lambda self, text: text)  # the files of an example need not be there
    module, name = command.runs.split(":")
    source = import_module(f"conceptron.{module}")
    assert list(inspect.signature(getattr(source, name)).parameters) == ["options"]
    first, *words = shlex.split(command.example)
    assert first == "conceptron" and parse(words)[0] is command
    help_text = parser_of(command).format_help()
    assert command.example in help_text
    text = inspect.getsource(source)
    passed_on = {field.name for field in fields(Sampling)} | {"width", "layers", "heads"}  # as a whole
    for option in command.options:
        assert (option.name if option.shown is None else option.shown) in help_text
        assert f"options.{option.key}" in text or option.key in passed_on, f"{command.words} never reads {option.name}"


def test_the_words_are_those_of_the_modules():
    assert set(table.OPERATORS) == set(OPERATORS) and set(table.PROVIDERS) == set(PROVIDERS)
    assert set(table.ARCHITECTURES) == set(SHARED_KB)
    options = {(command.words, option.name): option.kind for command, option in EVERY}
    assert set(options["generate", "--mode"].words) == set(MODES)
    assert set(options["generate", "--schedule"].words) == set(SCHEDULES)
    assert set(options["generate", "--unmask"].words) == set(STRATEGIES)
    assert set(options["bench kernels", "--matrix"].words) == set(MATRICES)
    assert set(options["bench meaning", "--skip"].words) == set(meaning.PARTS)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "did you mean conceptron train"),
        (["bench", "scalng"], "did you mean conceptron bench scaling"),
        (["\udcff"], "there is no command"),
        (["--nonsense"], "there is no command '--nonsense'"),
        (["bench", "step", "demo.yaml", "--stepz", "3"], "did you mean --steps?"),
        (["generate", "x"], "one of the arguments --text --file is required"),
        (["generate", "x", "--text", "a", "--file", "b"], "--file"),
        (["train"], "required: recipe"),
        (["describe", "demo.yaml", "--max-tokens"], "--max-tokens: expected one argument"),
        (["bench", "compare", "/", "no/such"], "expected a folder, found nothing at no/such"),
    ],
)
def test_a_line_that_cannot_be_read(argv, said, capsys):
    assert face.main(argv) == 2
    out, told = capsys.readouterr()
    assert said in told and told.count("\n") == 1 and told.startswith("conceptron: error: ") and not out


def test_a_place_that_is_of_the_wrong_kind(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    for argv in (["--out", str(tmp_path / "file")], ["--out", str(tmp_path / "lost")]):
        with pytest.raises(UsageError, match="expected a folder to write to, found a"):
            parse(["bench", "scaling", *argv])
    with pytest.raises(UsageError, match="expected a file, found a folder"):
        parse(["generate", "x", "--file", str(tmp_path)])


def test_options_may_stand_between_what_is_given_by_its_place():
    _, options = parse(["bench", "step", "demo.yaml", "--steps", "2", "train.steps=3", "model.num_concepts=4"])
    assert options.overrides == ["train.steps=3", "model.num_concepts=4"] and options.steps == 2


def test_a_launcher_speaks_first():
    for front in (["--local_rank=1"], ["--local-rank", "1"]):
        assert parse([*front, "train", "demo.yaml"])[1].recipe == "demo.yaml"


def test_help_version_and_wrong_lines_load_nothing_heavy():
    lines = [[], ["--help"], ["--version"], ["bench"], ["kernels", "--help"], ["recipes"], ["trian"],
             ["bench", "scaling", "--width", "x"], *([*command.words.split(), "--help"] for command in COMMANDS)]
    code = f"""
import sys
from conceptron.__main__ import main
for argv in {lines}:
    try:
        main(argv)
    except SystemExit:
        pass
print([name for name in ("torch", "transformers", "numpy", "yaml", "pydantic") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
    assert all(command.example in done.stdout for command in COMMANDS)


def test_the_shipped_recipes_are_listed(capsys):
    assert face.main(["recipes"]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if ".yaml  " in line]
    assert "pretrain/mlm.yaml" in lines and "tiny.yaml" not in lines
    assert all(find_recipe(name).is_file() for name in lines)


@pytest.mark.parametrize(("raised", "code", "said"), [
    (KeyboardInterrupt(), 130, "conceptron: stopped\n"), (InputError("no such thing"), 2, "error: no such thing\n"),
])  # fmt: skip
def test_what_ends_a_command_is_one_line(raised, code, said, monkeypatch, capsys):
    def end(argv):
        raise raised

    monkeypatch.setattr(face, "perform", end)
    assert face.main(["recipes"]) == code and capsys.readouterr().err.endswith(said)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    assert face.main(["recipes"]) == code and not capsys.readouterr().err


def test_numbers_are_finite():
    assert math.isclose(Number(0, 1).read("0.5"), 0.5) and Number(0, 1).read("0") == 0
