"""What pydantic finds, in one line: where, which field, what is wrong, what to do."""

import difflib
import functools
import typing
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model

from ...models.decisions import ALLOWED, DECISIONS
from ...models.objectives import OBJECTIVES, NoTask
from ...models.ranges import ranges
from ..errors import InputError
from .kinds import PathOrNothing, Positive, Switch, kind
from .reader import describe, one_line

FROM_TOKENIZER = ("vocab_size", "mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id", "special_token_ids")
NAMES = (*OBJECTIVES, "mixed", "none")


class Checker:
    def __init__(self, source: str, overridden: dict[str, str]) -> None:
        self.source, self.overridden = source, overridden

    def check(self, schema: type, tree: Any, prefix: str = "") -> Any:
        try:
            return TypeAdapter(schema).validate_python(tree)
        except ValidationError as error:
            problems = error.errors(include_url=False)
            # an unknown key explains a missing one, so it comes first
            problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
            line = self.explain(schema, problems[0], prefix)
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise InputError(line + more) from None

    def explain(self, schema: type, problem: dict[str, Any], prefix: str) -> str:
        keys = [str(key) for key in problem["loc"]]
        field = ".".join([*([prefix] if prefix else []), *keys])
        if problem["type"] == "extra_forbidden":
            return self.line(field, unknown(field, valid_names(schema, keys[:-1])))
        if problem["type"] == "missing":
            return self.line(field, "is missing, and there is no default")
        return self.line(field, f"{expected(problem)}, got {describe(problem['input'])}")

    def line(self, field: str, problem: str) -> str:
        for name, text in self.overridden.items():
            if field == name or field.startswith(name + ".") or name.startswith(field + "."):
                return f"override {text!r}: {field}: {problem}"
        return f"{self.source}: {field}: {problem}"

    def check_objective(self, section: dict[str, Any], field: str = "objective") -> dict[str, Any]:
        is_part = field != "objective"
        names = tuple(OBJECTIVES) if is_part else NAMES
        name = section.get("name")
        if "name" not in section:
            raise InputError(self.line(f"{field}.name", f"is missing; one of {', '.join(names)}"))
        if name not in names:
            problem = f"expected one of {', '.join(names)}{nearest(str(name), names)}, got {describe(name)}"
            raise InputError(self.line(f"{field}.name", problem))
        options = {key: value for key, value in section.items() if key != "name"}
        if name == "mixed":
            parts = self.check(strict_schema("Mixed", {"parts": (list[dict[str, Any]], ...)}), options, field).parts
            if len(parts) < 2:
                raise InputError(self.line(f"{field}.parts", f"expected at least two sections, got {len(parts)}"))
            checked = [self.check_objective(part, f"{field}.parts.{i}") for i, part in enumerate(parts)]
            return {"name": name, "parts": checked}
        weight = {}
        if is_part:
            given = {"weight": options.pop("weight", 1.0)}
            weight = self.check(strict_schema("Part", {"weight": (Positive, 1.0)}), given, field).model_dump()
        return {**weight, "name": name, **self.check_options(OBJECTIVES.get(name, NoTask), options, field)}

    def check_options(self, options: type, section: dict[str, Any], field: str) -> dict[str, Any]:
        """The options of a dataclass with their defaults, as plain values."""
        checked = self.check(options_schema(options), section, field).model_dump(mode="json")
        is_counted = checked.get("masking") == "pmi" and checked["phrases"] is None  # in the text, when training begins
        try:
            options(**(checked | {"masking": "whole_word"} if is_counted else checked))
        except ValueError as error:  # it begins with the option's name
            option = str(error).partition(":")[0]
            raise InputError(self.line(f"{field}.{option}", one_line(error).removeprefix(f"{option}: "))) from None
        return checked

    def check_model(self, section: dict[str, Any]) -> dict[str, Any]:
        for name in FROM_TOKENIZER:
            if name in section:
                raise InputError(self.line(f"model.{name}", "comes from the tokenizer; remove this line"))
        checked = self.check(model_section(), section, prefix="model")
        return checked.model_dump(exclude_unset=True)


EXPECTED = {
    "int": "an integer", "float": "a number", "string": "text", "bool": "true or false", "list": "a list",
    "tuple": "a list", "model": "a section", "dict": "a section", "dataclass": "a section",
}  # fmt: skip


@functools.cache
def model_section() -> type[BaseModel]:
    """A schema with the fields of `ConceptConfig` that a recipe may set."""
    hints = {name: hint for group in DECISIONS.values() for name, hint in typing.get_type_hints(group).items()}
    types = {name: kind(hints[name], ALLOWED[name]) for name in hints if name not in FROM_TOKENIZER}
    types |= {"backbone": PathOrNothing, "tie_word_embeddings": Switch}  # a folder or hub id, which the job opens
    return strict_schema("Model", {name: (each, None) for name, each in types.items()})


@functools.cache
def options_schema(options: type) -> type[BaseModel]:
    """A schema with the fields of a dataclass."""
    hints, allowed = typing.get_type_hints(options), ranges(options)
    types = {each.name: (kind(hints[each.name], allowed[each.name]), each.default) for each in fields(options)}
    return strict_schema("Options", types)


def strict_schema(name: str, types: dict[str, tuple[Any, Any]]) -> type[BaseModel]:
    return create_model(name, __config__=ConfigDict(extra="forbid", protected_namespaces=()), **types)


def valid_names(schema: Any, keys: Sequence[str]) -> list[str]:
    """The field names of the (nested) schema that `keys` lead to."""
    for key in keys:
        fields = getattr(schema, "model_fields", {})
        schema = fields[key].annotation if key in fields else element(schema)
    return [field.alias or name for name, field in getattr(element(schema), "model_fields", {}).items()]


def element(schema: Any) -> Any:
    """The first pydantic model named inside `list[...]`, `... | None` and the like."""
    inside = [schema, *typing.get_args(schema)]
    inside += [deeper for part in inside for deeper in typing.get_args(part)]
    return next((part for part in inside if hasattr(part, "model_fields")), None)


def unknown(field: str, names: Sequence[str]) -> str:
    section, _, key = field.rpartition(".")
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if close:
        return f"unknown key; did you mean {f'{section}.{close[0]}' if section else close[0]}?"
    return f"unknown key; valid here: {', '.join(names)}" if names else "unknown key"


def nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def expected(problem: dict[str, Any]) -> str:
    kind = problem["type"].partition("_")[0]
    if problem["type"].endswith(("_type", "_parsing")) and kind in EXPECTED:
        return f"expected {EXPECTED[kind]}"
    if problem["type"] == "too_short":
        return f"expected a list of at least {problem['ctx']['min_length']}"
    message = problem["msg"].replace("Input should be", "expected")
    return message[:1].lower() + message[1:]
