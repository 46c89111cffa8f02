"""A command line read by the table, and what `--help` shows; errors are one line that says where help is."""

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from .ranges import Number, Whole, shown
from .table import COMMANDS, Command


class UsageError(Exception):
    """A command line that cannot be read; the message is one line."""


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line and say where help is."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        raise UsageError(f"{self.prog.removeprefix('conceptron ')}: {message} (more: {self.prog} --help)")


def parser_of(command: Command) -> Parser:
    parser = Parser(
        prog=f"conceptron {command.words}", description=f"{command.says[0].upper()}{command.says[1:]}.",
        epilog=f"example:\n  {command.example}", formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    groups = {
        name: parser.add_mutually_exclusive_group(required=True)
        for name in {option.either for option in command.options} - {None}
    }
    for option in command.options:
        group = groups.get(option.either, parser)
        if option.kind is None:
            group.add_argument(option.name, action="store_true", help=option.says)
            continue
        by_name = option.name.startswith("--")
        says = [option.kind.says()] if isinstance(option.kind, Whole | Number) else []
        says += [] if option.default in (None, (), "") else [f"default {worded(option.default)}"]
        group.add_argument(
            option.name, type=option.kind.read, metavar=option.shown or option.kind.letters(option.key, by_name),
            default=list(option.default) if isinstance(option.default, tuple) else option.default,
            help=f"{option.says} ({'; '.join(says)})" if says else option.says,
            **({} if option.count == "1" else {"nargs": option.count}),
            **({"required": True} if option.required else {}),
        )  # fmt: skip
    return parser


def parse(argv: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """The command of a command line and its options.

    A launcher may put `--local_rank=K` in front (the `deepspeed` launcher does); the environment says the same.

    Raises:
        UsageError: no such command, or an option is unknown, missing or out of its range.
    """
    argv = list(argv)
    while argv and argv[0].replace("-", "_").startswith("__local_rank"):
        argv = argv[1:] if "=" in argv[0] else argv[2:]
    known = {command.words: command for command in COMMANDS}
    words = " ".join(argv[:2]) if " ".join(argv[:2]) in known else "".join(argv[:1])
    if words not in known:
        given = " ".join(word for word in argv[:2] if not word.startswith("-")) or " ".join(argv[:1])
        near = difflib.get_close_matches(given, known, 1) or difflib.get_close_matches(argv[0], known, 1)
        hint = f"did you mean conceptron {near[0]}?" if near else "`conceptron` alone lists what there is"
        raise UsageError(f"there is no command {shown(given)}; {hint}")
    command, rest = known[words], argv[len(words.split()) :]
    parser = parser_of(command)
    if any(option.count in "*?" and not option.name.startswith("--") for option in command.options):
        options, unknown = parser.parse_known_intermixed_args(rest)
    else:
        options, unknown = parser.parse_known_args(rest)
    if unknown:
        names = [option.name for option in command.options if option.name.startswith("--")]
        near = difflib.get_close_matches(unknown[0].split("=")[0], names, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"unrecognized argument {shown(unknown[0])}{hint}")
    return command, options


def overview(group: str = "") -> str:
    """What one can do, a line and an example each; ``group``: only the commands that begin with this word."""
    lines = [] if group else [
        "conceptron: encoders that read long text through a bottleneck of learned concepts", "",
    ]  # fmt: skip
    for command in (command for command in COMMANDS if command.words.split()[0] == (group or command.words.split()[0])):
        lines += [f"  {command.words:<16} {command.says}", f"  {'':<16}   {command.example}"]
    return "\n".join([*lines, "", "conceptron COMMAND --help has every option; conceptron --version."])


def worded(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else f"{value}"
