"""The recipes that the package carries, and what each is, in its own first words."""

import argparse
import textwrap
from pathlib import Path

SHIPPED = Path(__file__).parents[2] / "recipes"
PARTS = ("tiny.yaml",)  # laid over others, no recipe by itself
LINE = 140  # characters
TABLES = ("ablation/defaults.yaml",)  # of one recipe, changed row by row


def shipped() -> dict[str, str]:
    """name, as `conceptron train` takes it -> the first sentence of the comment that opens the file."""
    files = sorted(SHIPPED.rglob("*.yaml"), key=lambda file: (len(file.parts), file))
    return {str(file.relative_to(SHIPPED)): opening(file) for file in files if file.name not in PARTS}


def opening(file: Path) -> str:
    lines: list[str] = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines).split(". ")[0].rstrip(".")


def main(options: argparse.Namespace) -> None:
    """The command line."""
    table = shipped()
    width = max(map(len, table))
    for name, words in table.items():
        print(f"{name:<{width}}  {textwrap.shorten(words, LINE - width - 2, placeholder=' ...')}")
    print("\nconceptron train NAME; conceptron describe NAME; with size=tiny any of them ends in a minute on a CPU.")
    print(f"{', '.join(TABLES)}: a table of many, for conceptron bench ablation.")
