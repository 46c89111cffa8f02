"""Reads the docstrings of Python source files without importing or running them.

A program of its own, so that a source file that breaks the parser breaks nothing else, and two can run at once:
paths come in on standard input, one a line; for each, in the same order, its pickled sections or None (the file cannot
be read) go out on standard output. Needs nothing but the standard library.

Docstrings stand in what Python compiles a file to, which an installer has left beside most files: to load that takes a
tenth of the time of parsing the source. A file that is not there compiled is compiled here, so that the result is the
same. Sources are parsed only of the few that give docstrings to what is written in C.
"""

import ast
import gc
import inspect
import opcode
import pickle
import re
import sys
import warnings
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from types import CellType, CodeType, FunctionType

SETTERS = ("add_docstr", "add_newdoc")  # calls that give a docstring to what is written in C, in torch and numpy
ROLE = re.compile(r":(?:[a-zA-Z]+:)+`[~!.]*([^`<]*?)\s*(?:<[^`]*>)?`")  # :class:`~torch.Tensor` -> torch.Tensor
RULE = re.compile(r"^\s*([-=~^*#\"'`.+_])\1{2,}\s*$", re.MULTILINE)  # the line under a heading
COMMENT = re.compile(r"^\.\. (?:_|image|figure|plot|math|versionadded|seealso).*$", re.MULTILINE)
PROSE = 0.6  # a paragraph of fewer letters and spaces than this is a table, a formula or the output of an example

LOAD, STORE = opcode.opmap["LOAD_CONST"], opcode.opmap["STORE_NAME"]
OPENING = 64  # bytes of a body in which it stores its docstring

Section = tuple[str, list[str]]  # (name of what is documented, its paragraphs)


def sections(path: str) -> list[Section]:
    """The docstrings of a module, its classes and functions, in the order of the file.

    Raises:
        OSError, SyntaxError, ValueError, RecursionError, MemoryError: the file cannot be read, or is not Python.
    """
    found: list[Section] = []
    code = compiled(path)
    if any(mentions_setter(part) for part in all_of(code)):
        with open(path, "rb") as file:
            visit(ast.parse(file.read()), "", found)
    else:
        visit_code(code, "", found)
    return found


# --- of what is compiled


def compiled(path: str) -> CodeType:
    try:
        return SourceFileLoader("module", path).get_code("module")  # what lies in __pycache__, if it is of this source
    except (EOFError, TypeError, ValueError):  # that, or the source, is damaged
        with open(path, "rb") as file:
            return compile(file.read(), path, "exec", dont_inherit=True)


def visit_code(code: CodeType, name: str, found: list[Section]) -> None:
    """Collects the docstring of what ``code`` is the body of, whose dotted name is ``name``, and those inside it."""
    collect(name, docstring(code), found)
    for child in sorted(inner(code), key=lambda child: child.co_firstlineno):
        visit_code(child, f"{name}.{child.co_name}" if name else child.co_name, found)


def inner(code: CodeType) -> Iterator[CodeType]:
    """The bodies of the classes and functions in a body, each once."""
    seen = set()  # what stands in a finally clause is compiled twice
    for part in code.co_consts:
        if not isinstance(part, CodeType) or (part.co_name, part.co_firstlineno) in seen:
            continue
        seen.add((part.co_name, part.co_firstlineno))
        if part.co_name.startswith("<generic parameters"):  # around what they are of
            yield from inner(part)
        elif not part.co_name.startswith("<"):  # <lambda>, <genexpr>
            yield part


def docstring(code: CodeType) -> str | None:
    if code.co_flags & inspect.CO_OPTIMIZED:  # a function; where it keeps its docstring differs from Python to Python
        return FunctionType(code, {}, closure=tuple(CellType() for _ in code.co_freevars)).__doc__
    if "__doc__" not in code.co_names:
        return None
    value, number = None, code.co_names.index("__doc__")
    for operation, argument in zip(code.co_code[:OPENING:2], code.co_code[1:OPENING:2], strict=True):
        if operation == STORE and argument == number:  # a module or a class does so first of all
            return value if isinstance(value, str) else None
        value = code.co_consts[argument] if operation == LOAD and argument < len(code.co_consts) else None
    return None


def all_of(code: CodeType) -> Iterator[CodeType]:
    yield code
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from all_of(part)


def mentions_setter(code: CodeType) -> bool:
    return any(name in code.co_names for name in SETTERS)


# --- of what is parsed


def visit(node: ast.AST, name: str, found: list[Section]) -> None:
    """Collects the docstring of ``node``, whose dotted name is ``name``, and those inside it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        collect(name, ast.get_docstring(node, clean=False), found)
    for child in children(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            visit(child, f"{name}.{child.name}" if name else child.name, found)
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            collect(*setter(child.value), found)
        else:
            visit(child, name, found)


def children(node: ast.AST) -> Iterator[ast.AST]:
    """The statements in all blocks of a statement."""
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
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
    sys.dont_write_bytecode = True
    gc.disable()  # it would search all that is read for cycles, and there are none
    for line in sys.stdin:
        try:
            found = sections(line.rstrip("\n"))
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            found = None
        pickle.dump(found, sys.stdout.buffer)


if __name__ == "__main__":
    main()
