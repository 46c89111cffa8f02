"""Measured numbers into documents.

A document holds its tables between two markers,

    <!-- numbers: bench/results/cpu/scaling/exponents.json encoder phase of exponent -->
    ...
    <!-- end -->

where the first names a result file (from the checkout's root) and, if wanted, the columns. What stands between them is
written from the file, or "Not measured." when there is none; ``tests/bench/test_report.py`` fails when the two differ.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..measure.results import markdown_table, read_results

BLOCK = re.compile(r"(<!-- numbers: (?P<path>\S+)(?P<columns>[^>]*?) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
STAMP = ("gpu", "cpu", "torch", "triton", "date", "commit", "command")  # said under a table


def render(rows: Sequence[dict], environment: dict[str, Any], columns: Sequence[str]) -> str:
    """The Markdown between two markers: the table, and on one line where and how it was measured."""
    where = "; ".join(f"{name} {environment[name]}" for name in STAMP if environment.get(name))
    return f"\n{markdown_table(rows, columns or list(rows[0]))}\n{where}\n\n"


def fill(text: str, root: Path) -> str:
    """``text`` with every marked table written anew from its result file.

    Raises:
        ValueError: a marker names a column that the file does not have.
    """

    def table(match: re.Match) -> str:
        if not (root / match["path"]).exists():
            return f"{match[1]}\nNot measured.\n\n{match[5]}"
        rows, environment = read_results(root / match["path"])
        columns = match["columns"].split()
        known = {column.replace(" ", "_"): column for row in rows for column in row}
        missing = [column for column in columns if column not in known]
        if missing:
            raise ValueError(f"{match['path']}: no column {missing[0]!r}; it has {', '.join(sorted(known))}")
        return match[1] + render(rows, environment, [known[column] for column in columns]) + match[5]

    return BLOCK.sub(table, text)
