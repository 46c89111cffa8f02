"""What a field of options may hold: its words and its test, once, beside the field's default.

A truth value is no number. A whole number is below 2^31, a seed below 2^63. Any other number is finite, and where
something is divided or multiplied by it, neither so small nor so large that float32 would make 0 or infinity of it.
"""

import re
from collections.abc import Callable
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NamedTuple

LARGEST, LARGEST_SEED = 2**31 - 1, 2**63 - 1
LEAST, MOST = 1e-30, 1e30  # of numbers that must act as more than 0, and as less than infinity
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # no path holds them, or no line of a message


class Allowed(NamedTuple):
    """The values of one field, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def is_count(x: object, least: int = 1, most: int = LARGEST) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and least <= x <= most


def is_number(x: object, least: float = -MOST, most: float = MOST) -> bool:
    """Not true of NaN, which is in no interval."""
    return isinstance(x, int | float) and not isinstance(x, bool) and least <= x <= most


def is_text(x: object) -> bool:
    return isinstance(x, str) and x != "" and not UNSAFE.search(x)


def is_place(x: object) -> bool:
    """A file, a folder, or a name of the hub; it need not be there."""
    try:
        return is_text(x) and bool(Path(x).expanduser())
    except RuntimeError:  # ~name of nobody
        return False


def whole(least: int = 1, most: int = LARGEST) -> Allowed:
    end = {LARGEST: "", LARGEST_SEED: " to 2^63 - 1"}.get(most, f" to {most}")
    return Allowed(f"a whole number from {least}{end}", lambda x: is_count(x, least, most))


def number(least: float = -MOST, most: float = MOST) -> Allowed:
    return Allowed(f"a number in [{least:g}, {most:g}]", lambda x: is_number(x, least, most))


def below(most: float, least: float = 0) -> Allowed:
    return Allowed(f"a number in [{least:g}, {most:g})", lambda x: is_number(x, least, most) and x < most)


def choice(*names: str) -> Allowed:
    return Allowed(f"one of {', '.join(names)}", lambda x: isinstance(x, str) and x in names, names)


def or_nothing(allowed: Allowed) -> Allowed:
    return Allowed(f"{allowed.words}, or nothing", lambda x: x is None or allowed.holds(x), allowed.choices)


SWITCH = Allowed("true or false", lambda x: isinstance(x, bool))
TEXT = Allowed("text without control or broken characters", lambda x: is_text(x))
PLACE = Allowed("a path or name without control or broken characters, with a home for its ~", lambda x: is_place(x))


# --- fields of dataclasses


def metadata(allowed: Allowed) -> dict[str, Allowed]:
    return {"allowed": allowed}


def given(default: Any, allowed: Allowed) -> Any:
    return field(default=default, metadata=metadata(allowed))


def count(default: int, least: int = 1) -> Any:
    return given(default, whole(least))


def count_or_none() -> Any:
    return given(None, or_nothing(whole()))


def one_of(*choices: str, default: str | None = None) -> Any:
    """The first is the default, unless another is named."""
    return given(choices[0] if default is None else default, choice(*choices))


def switch(default: bool = False) -> Any:
    return given(default, SWITCH)


def positive(default: float) -> Any:
    return given(default, number(LEAST))


def at_least(least: float, default: float) -> Any:
    return given(default, number(least))


def share(default: float) -> Any:
    """[0, 1)"""
    return given(default, below(1))


def portion(default: float) -> Any:
    """More than 0, up to 1."""
    return given(default, number(LEAST, 1))


def within(default: float) -> Any:
    """More than 0, less than 1."""
    return given(default, below(1, LEAST))


def ranges(options: Any) -> dict[str, Allowed]:
    """Of every field of a dataclass that names one."""
    return {each.name: each.metadata["allowed"] for each in fields(options) if each.metadata}


def check(options: Any) -> None:
    """Raises ValueError for the first field of a dataclass that holds what it may not."""
    for name, allowed in ranges(options).items():
        value = getattr(options, name)
        if not allowed.holds(value):
            raise ValueError(f"{name}: expected {allowed.words}, got {value!r}")
