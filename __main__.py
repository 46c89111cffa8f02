"""The command line: `commands/table.py` says what there is, each command's own module does it.

Bad input ends with one line on standard error and exit code 2, Ctrl-C with one line and 130.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from .commands.reading import UsageError, overview, parse
from .commands.table import COMMANDS, Command


def function_of(command: Command) -> Callable[[Any], int | None]:
    module, name = command.runs.split(":")
    return getattr(import_module(f".{module}", __package__), name)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv in (["--help"], ["-h"], ["help"]):
        print(overview())
        return 0
    if argv == ["--version"]:
        from . import __version__

        print(f"conceptron {__version__}")
        return 0
    groups = {command.words.split()[0] for command in COMMANDS if " " in command.words}
    if argv[0] in groups and (argv[1:] or ["--help"]) in (["--help"], ["-h"]):
        print(overview(argv[0]))
        return 0
    # Threads that spin while they wait would crawl beside another program; it is read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what goes wrong is an error of ours, too
    from .engine.errors import InputError, LaunchError
    from .engine.launching.place import is_first

    try:
        return perform(argv)
    except (UsageError, InputError) as error:
        of_all = isinstance(error, InputError) and error.of_all  # ranks that met, and met the fault together
        if isinstance(error, LaunchError) or is_first(os.environ, on_its_machine=not of_all):
            print(f"conceptron: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_first(os.environ):
            print("conceptron: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def perform(argv: Sequence[str]) -> int:
    """One command as typed; its exit code.

    Raises:
        UsageError: the line cannot be read.
        InputError: what it names cannot be used.
    """
    command, options = parse(argv)
    return function_of(command)(options) or 0


if __name__ == "__main__":
    sys.exit(main())
