"""Reads the docstrings of Python source files without importing or running them.

A program of its own, so that a source file that breaks the parser breaks nothing else, and two can run at once:
paths come in on standard input, one a line; for each, in the same order, its pickled sections or None (the file cannot
be read) go out on standard output. Needs nothing but the standard library.
"""

import ast
import gc
import inspect
import pickle
import re
import sys
import warnings
from collections.abc import Iterator

SETTERS = ("add_docstr", "add_newdoc")  # calls that give a docstring to what is written in C, in torch and numpy
ROLE = re.compile(r":(?:[a-zA-Z]+:)+`[~!.]*([^`<]*?)\s*(?:<[^`]*>)?`")  # :class:`~torch.Tensor` -> torch.Tensor
RULE = re.compile(r"^\s*([-=~^*#\"'`.+_])\1{2,}\s*$", re.MULTILINE)  # the line under a heading
COMMENT = re.compile(r"^\.\. (?:_|image|figure|plot|math|versionadded|seealso).*$", re.MULTILINE)
PROSE = 0.6  # a paragraph of fewer letters and spaces than this is a table, a formula or the output of an example

Section = tuple[str, list[str]]  # (name of what is documented, its paragraphs)


def sections(source: bytes) -> list[Section]:
    """The docstrings of a module, its classes and functions, in the order of the file.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: what `ast.parse` raises on a file that is not Python.
    """
    found: list[Section] = []
    visit(ast.parse(source), "", found)
    return found


def visit(node: ast.AST, name: str, found: list[Section]) -> None:
    """Collects the docstring of ``node``, whose dotted name is ``name``, and those inside it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        collect(name, ast.get_docstring(node, clean=False), found)
    for child in children(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            visit(child, f"{name}.{child.name}" if name else child.name, found)
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            collect(*setter(child.value), found)
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            visit(child, name, found)


def children(node: ast.AST) -> Iterator[ast.AST]:
    """The statements in all blocks of a statement."""
    for block in ("body", "handlers", "orelse", "finalbody"):
        yield from getattr(node, block, [])


def setter(call: ast.Call) -> tuple[str, str | None]:
    """(name, docstring) of ``add_docstr(torch.abs, "...")`` and the like, ("", None) of any other call."""
    called = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if called not in SETTERS or len(call.args) < 2:
        return "", None
    texts = [part.value for part in ast.walk(call) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return target(called, call.args), max(texts, key=len, default=None)


def target(called: str, args: list[ast.expr]) -> str:
    """What a call documents: add_docstr(object, text), add_newdoc(module, name, text or (attribute, text))."""
    if called == "add_docstr":
        return ast.unparse(args[0])
    attribute = args[2].elts[:1] if len(args) > 2 and isinstance(args[2], ast.Tuple) else []
    return ".".join(str(part.value) for part in [args[1], *attribute] if isinstance(part, ast.Constant))


def collect(name: str, docstring: str | None, found: list[Section]) -> None:
    parts = paragraphs(docstring) if docstring else []
    if parts:
        found.append((name, parts))


def paragraphs(docstring: str) -> list[str]:
    """A docstring without examples, rules under headings and markup of references, cut at its empty lines."""
    text = COMMENT.sub("", RULE.sub("", ROLE.sub(r"\1", inspect.cleandoc(docstring))))
    parts = (part.rstrip().strip("\n") for part in re.split(r"\n\s*\n", text))
    return [part for part in parts if part and ">>>" not in part and is_prose(part)]


def is_prose(text: str) -> bool:
    letters = sum(map(str.isalpha, text)) + text.count(" ")
    return letters >= PROSE * len(text)


def main() -> None:
    warnings.simplefilter("ignore")  # of invalid escapes in the sources
    gc.disable()  # it would search every syntax tree for cycles, and there are none
    for line in sys.stdin:
        try:
            with open(line.rstrip("\n"), "rb") as file:
                found = sections(file.read())
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            found = None
        pickle.dump(found, sys.stdout.buffer)


if __name__ == "__main__":
    main()
