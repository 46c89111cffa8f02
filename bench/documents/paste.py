"""Measured numbers into documents.

A document holds its tables between two markers,

    <!-- numbers: bench/results/cpu/scaling/exponents.json encoder phase of exponent -->
    ...
    <!-- end -->

where the first names a result file (from the checkout's root) and, if wanted, the columns. What stands between them is
written from the file, or "Not measured." when there is none. What a sentence says about measured rows stands inside it
between

    <!-- words: bench/results/cpu/long/scaling.json lengths -->16K to 256K tokens<!-- end -->

where the last word is one of ``WORDS``. ``tests/bench/test_report.py`` fails when a document and its files differ.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..measure.exponents import QUANTITIES, Rows, encoders_of, in_tokens
from ..measure.results import MEASURED, markdown_table, read_results

BLOCK = re.compile(r"(<!-- numbers: (?P<path>\S+)(?P<columns>[^>]*?) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
SENTENCE = re.compile(r"(<!-- words: (?P<path>\S+) (?P<what>\S+) -->)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
STAMP = ("gpu", "cpu", "torch", "triton", "date", "commit", "command")  # said under a table


def render(rows: Sequence[dict], environment: dict[str, Any], columns: Sequence[str]) -> str:
    """The Markdown between two markers: the table, and on one line where and how it was measured."""
    where = "; ".join(f"{name} {environment[name]}" for name in STAMP if environment.get(name))
    return f"\n{markdown_table(rows, columns or list(rows[0]))}\n{where}\n\n"


def fill(text: str, root: Path) -> str:
    """``text`` with every marked table and every marked phrase written anew from its result file.

    Raises:
        ValueError: a marker names a column that the file does not have, or words that are not in ``WORDS``.
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

    def words(match: re.Match) -> str:
        if match["what"] not in WORDS:
            raise ValueError(f"{match['path']}: expected words of {', '.join(WORDS)}, got {match['what']!r}")
        path = root / match["path"]
        return match[1] + (WORDS[match["what"]](read_results(path)[0]) if path.exists() else "not measured") + match[5]

    return SENTENCE.sub(words, BLOCK.sub(table, text))


def lengths(rows: Rows) -> str:
    """From which N to which something ran, of the rows of scaling.json."""
    ran = [row["N"] for row in rows if row["status"] == MEASURED]
    return f"{in_tokens(min(ran))} to {in_tokens(max(ran))} tokens" if ran else "not measured"


def exponents(rows: Rows) -> str:
    """How each encoder grows over its three longest N, of the rows of exponents.json: forward, then training."""
    parts = []
    for name in encoders_of(rows):
        mine = [row for row in rows if row["encoder"] == name]
        of = {each: [f"N^{row['exponent at large N']:.2f}" for row in mine if row["of"] == each]
              for each in QUANTITIES.values()}  # fmt: skip
        grown = ", ".join(f"{each} {' and '.join(found)}" for each, found in of.items() if found)
        parts.append(f"{name} (up to {in_tokens(max(row['up to N'] for row in mine))}) {grown}")
    return "; ".join(parts)


WORDS = {"lengths": lengths, "exponents": exponents}
