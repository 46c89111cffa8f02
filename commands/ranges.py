"""What one value on the command line may be: numbers, words, texts and places, each with its range."""

import argparse
import difflib
import math
from dataclasses import dataclass
from pathlib import Path

MOST = 2**31 - 1  # of anything that is counted


@dataclass(frozen=True)
class Whole:
    """A whole number, both ends included."""

    low: int = 0
    high: int = MOST

    def read(self, text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not self.low <= value <= self.high:
            raise argparse.ArgumentTypeError(f"expected {self.says()}, got {shown(text)}")
        return value

    def says(self) -> str:
        end = "" if self.high == MOST else f" to {self.high if self.high < MOST else '2^63 - 1'}"
        return f"a whole number from {self.low}{end}"

    def letters(self, key: str, by_name: bool) -> str:
        return "N"


@dataclass(frozen=True)
class Number:
    """A finite number, both ends included; ``above``: the lower one is not."""

    low: float = 0.0
    high: float = 1e9
    above: bool = False

    def read(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = self.low < value <= self.high if self.above else self.low <= value <= self.high
        if not inside or 0 < abs(value) < 1e-30:  # what float32 makes zero of, and what divides by it infinite
            raise argparse.ArgumentTypeError(f"expected {self.says()}, got {shown(text)}")
        return value

    def says(self) -> str:
        return f"a number {'above' if self.above else 'from'} {self.low:g} to {self.high:g}"

    def letters(self, key: str, by_name: bool) -> str:
        return "X"


@dataclass(frozen=True)
class Text:
    """Any text that can be written as UTF-8."""

    what: str = "text"

    def read(self, text: str) -> str:
        if not writable(text) or "\0" in text:
            raise argparse.ArgumentTypeError(f"expected {self.what} in UTF-8 without a NUL, got {shown(text)}")
        return text

    def says(self) -> str:
        return self.what

    def letters(self, key: str, by_name: bool) -> str:
        return key.upper() if by_name else key


@dataclass(frozen=True)
class Place:
    """A path. ``holds``: "file" and "folder" must be there already; "new file" and "new folder" are written."""

    holds: str

    def read(self, text: str) -> Path:
        if not text or "\0" in text or not writable(text):
            raise argparse.ArgumentTypeError(f"expected the path of {self.says()}, got {shown(text)}")
        path = Path(text).expanduser()
        wrong = {
            "file": not path.is_file(), "folder": not path.is_dir(), "any": not path.exists(),
            "new file": path.is_dir(), "new folder": (path.exists() or path.is_symlink()) and not path.is_dir(),
        }[self.holds]  # fmt: skip
        if wrong:
            there = "a folder" if path.is_dir() else "a file" if path.is_file() else "a link to nothing" if (
                path.is_symlink()) else "nothing"  # fmt: skip
            raise argparse.ArgumentTypeError(f"expected {self.says()}, found {there} at {text}")
        return path

    def says(self) -> str:
        return {"file": "a file", "folder": "a folder", "any": "a file or folder", "new file": "a file to write",
                "new folder": "a folder to write to"}[self.holds]  # fmt: skip

    def letters(self, key: str, by_name: bool) -> str:
        return ("DIR" if "folder" in self.holds else "FILE") if by_name else key


@dataclass(frozen=True)
class Word:
    """One of a few words."""

    words: tuple[str, ...]

    def read(self, text: str) -> str:
        if text not in self.words:
            near = difflib.get_close_matches(text, self.words, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(self.words)}, got {shown(text)}{hint}")
        return text

    def says(self) -> str:
        return f"one of {', '.join(self.words)}"

    def letters(self, key: str, by_name: bool) -> str:
        return "{" + ",".join(self.words) + "}" if by_name else key


@dataclass(frozen=True)
class Words:
    """Several of a few words, with commas between."""

    words: tuple[str, ...]

    def read(self, text: str) -> list[str]:
        return [Word(self.words).read(part) for part in text.split(",")]

    def says(self) -> str:
        return f"of {', '.join(self.words)}, with commas between"

    def letters(self, key: str, by_name: bool) -> str:
        return f"{self.words[0]},..."


Kind = Whole | Number | Text | Place | Word | Words


def writable(text: str) -> bool:
    """Whether the text is UTF-8; bytes of a command line that are not come in as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(text: str) -> str:
    """A value as an error shows it: short, one line, printable."""
    return ascii(text if len(text) <= 60 else f"{text[:57]}...") if not writable(text) else repr(
        text if len(text) <= 60 else f"{text[:57]}..."
    )  # fmt: skip
