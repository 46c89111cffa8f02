"""The types of a recipe's fields: ranges of `models.ranges` as pydantic reads them."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from ...models.ranges import (
    LARGEST_SEED,
    LEAST,
    PLACE,
    SWITCH,
    TEXT,
    Allowed,
    below,
    is_count,
    is_number,
    number,
    or_nothing,
    whole,
)  # fmt: skip


def kind(hint: Any, allowed: Allowed) -> Any:
    """The type ``hint``, of which only what is ``allowed`` is taken, as it was written: no text for a number."""

    def check(value: Any) -> Any:
        if not allowed.holds(value):
            raise PydanticCustomError("range", "expected {words}", {"words": allowed.words})
        return value

    return Annotated[hint, BeforeValidator(check)]


def is_name(value: Any) -> bool:
    """Of a folder that lies in the one for runs."""
    is_word = isinstance(value, str) and re.fullmatch(r"[\w.+-]*", value) is not None
    return is_word and value not in (".", "..") and len(value.encode()) <= 100


def digits(value: Any) -> Any:
    """A whole number is a name, too."""
    return str(value) if is_count(value, 0) else value


def ends(value: Any) -> Any:
    """10-12 is [10, 12]."""
    if isinstance(value, str) and SPAN.fullmatch(value):
        return [int(end) for end in value.split("-")]
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("range", "expected a first and a last step, such as 10-12")
    return value


SPAN = re.compile(r"\d{1,9}-\d{1,9}")
NAME = Allowed("a name of up to 100 letters, digits and ._+-", is_name)
ZERO_OR_POSITIVE = Allowed(f"0, or {number(LEAST).words}", lambda x: is_number(x, LEAST) or (is_number(x) and x == 0))
Count = kind(int, whole())
CountOrZero = kind(int, whole(0))
Seed = kind(int, whole(0, LARGEST_SEED))
Positive = kind(float, number(LEAST))
PositiveOrZero = kind(float, ZERO_OR_POSITIVE)
NotNegative = kind(float, number(0))
Share = kind(float, below(1))
Switch = kind(bool, SWITCH)
Text = kind(str, TEXT)
Name = Annotated[kind(str, NAME), BeforeValidator(digits)]
Path = kind(str, PLACE)
PathOrNothing = kind(str | None, or_nothing(PLACE))
Folder = Annotated[Path, BeforeValidator(digits)]
Span = Annotated[tuple[Count, Count], BeforeValidator(ends)]
NameOrNothing = kind(str | None, or_nothing(Allowed(NAME.words, lambda x: is_name(x) and x != "")))
TextOrNothing = kind(str | None, or_nothing(TEXT))
