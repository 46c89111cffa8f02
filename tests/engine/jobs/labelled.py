"""Data of three tasks in which a word decides."""

import json
from collections.abc import Callable
from pathlib import Path

COLOURS, THINGS = ("red", "blue", "green"), ("door", "boat", "hat", "lamp", "roof", "cart")


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_tasks(
    folder: Path, text_of: Callable[[int, list[str]], str], is_right: Callable[[str, str], bool]
) -> list[str]:  # fmt: skip
    """Writes the training splits of 12 documents, each with six things of three colours, and returns their texts.

    Args:
        text_of: the document of a number and the sentences that it is made of.
        is_right: whether a statement holds, of the colour that it gives a thing and the one that the thing has.
    """
    contracts, stories, pairs = [], [], []
    for i in range(12):
        colours = {thing: COLOURS[(i + j) % 3] for j, thing in enumerate(THINGS)}
        text = text_of(i, [f"The {thing} is {colour}." for thing, colour in colours.items()])
        for j, (thing, colour) in enumerate(colours.items()):
            asked, name = COLOURS[(i + j * 2) % 3], f"{i}-{thing}"
            answer = "Entailment" if is_right(asked, colour) else "Contradiction"
            contracts.append({"id": name, "input": f"The {thing} is {asked}.\n\n{text}", "output": answer})
            listed = "".join(f" ({letter}) {each}\n" for letter, each in zip("ABC", COLOURS, strict=True))
            stories.append({"id": name, "input": f"Which is the {thing}?\n\n{listed}\n{text}", "output": "red"})
            pairs.append({"sentence1": f"The {thing} is {asked}", "sentence2": f"A {colour} {thing}",
                          "label": 4.0 if is_right(asked, colour) else 1.0})  # fmt: skip
    for place, rows in (("scrolls/contract_nli", contracts), ("scrolls/quality", stories), ("glue/stsb", pairs)):
        (folder / place).mkdir(parents=True)
        (folder / place / "train.jsonl").write_text(lines(rows))
    return [row["input"] for row in contracts + stories] + [row["sentence2"] for row in pairs]
