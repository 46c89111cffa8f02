"""Recipes: one YAML file describes a run; a typed schema checks it; `section.field=value` changes it.

A mistake ends in one `InputError` that names the file (or the override), the dotted field, what is wrong and, for an
unknown key, the nearest valid one.
"""

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    StrictBool,
    StrictInt,
    TypeAdapter,
    ValidationError,
    create_model,
)

from ..models.config import ConceptConfig
from ..models.objectives import OBJECTIVES
from .data.recipe import DataRecipe
from .errors import InputError

# Strict, because pydantic would otherwise read `true` as the number 1.
Count = Annotated[int, Strict(), Field(ge=1)]
CountOrZero = Annotated[int, Strict(), Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

FROM_TOKENIZER = ("vocab_size", "mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id", "special_token_ids")
# What may change between an interruption and its resumption: it moves no data and no weight, or only by rounding.
FREE = (
    "run.name", "run.folder", "run.timeout_s", "resume", "eval.", "checkpoint.", "zero.", "batch.micro_tokens",
    "data.cache",
)  # fmt: skip


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Run(Section):
    """Where the run lives, and the seed of everything random in it."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    name: str = Field("", pattern=r"^[\w.+-]*$")  # the folder's name; empty: the recipe file's name
    folder: str = "runs"
    seed: CountOrZero = 0
    timeout_s: Annotated[float, Field(gt=0)] = 1800.0  # how long a rank waits for the others before it gives up


class Optim(Section):
    """AdamW, a linear warm-up, then a cosine down to `min_lr_ratio * lr` at the last step."""

    lr: Annotated[float, Field(gt=0)] = 3e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(ge=0)] = 1.0  # largest norm of the whole gradient; 0: no clipping
    warmup_steps: CountOrZero = 0
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1


class Batch(Section):
    """Sizes in tokens. A step's batch does not depend on the number of ranks or on `micro_tokens`."""

    tokens: Count = 65536  # of one optimizer step, all ranks together
    micro_tokens: Count = 16384  # of one forward and backward pass on one rank


class Train(Section):
    steps: Count
    precision: Literal["fp32", "bf16"] = "bf16"  # bf16: autocast; weights, gradients and moments stay float32
    label_smoothing: Fraction = 0.0
    max_bad_steps: Count = 5  # consecutive steps with a non-finite gradient after which the run stops


class Zero(Section):
    stage: Literal[1, 2, 3] = 1  # 0 is not offered: DeepSpeed would not skip a NaN gradient there


class Eval(Section):
    every: CountOrZero = 500  # steps; 0: only after the last step
    tokens: Count = 65536  # held-out tokens of one evaluation


class Checkpoint(Section):
    every: CountOrZero = 500  # steps; 0: only after the last step
    keep: Count = 2


class Recipe(Section):
    """One run. `model` and `objective` are checked against `ConceptConfig` and the options of the objective."""

    run: Run = Run()
    model: dict[str, Any] = {}
    data: DataRecipe
    objective: dict[str, Any]
    optim: Optim = Optim()
    batch: Batch = Batch()
    train: Train
    zero: Zero = Zero()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    resume: Literal["never", "auto"] = "never"

    @property
    def path(self) -> Path:
        """The run's folder."""
        return Path(self.run.folder) / self.run.name

    def build_objective(self) -> Any:
        """The objective: one of the frozen dataclasses in `OBJECTIVES`."""
        options = {key: value for key, value in self.objective.items() if key != "name"}
        return OBJECTIVES[self.objective["name"]](**options)

    def build_config(self, **from_tokenizer: Any) -> ConceptConfig:
        """The model's config; vocabulary size and special ids come from the tokenizer.

        `hidden_tokens` follows `objective.hidden`, so that the finished model hides tokens as it was taught.

        Raises:
            InputError: the fields do not fit together.
        """
        hidden = self.objective.get("hidden", self.model.get("hidden_tokens", "drop"))
        if self.model.get("hidden_tokens", hidden) != hidden:
            raise InputError(
                f"model.hidden_tokens: {self.model['hidden_tokens']!r} does not fit objective.hidden, which is "
                f"{hidden!r}; leave it out, and it follows"
            )
        try:
            config = ConceptConfig(**{**self.model, "hidden_tokens": hidden}, **from_tokenizer)
        except (ValueError, TypeError) as error:
            raise InputError(f"model: {one_line(error)}") from error
        mixes = config.decoder_mixing != "none"
        if self.objective.get("context", mixes) != mixes:
            why = "what is known must take part in training as it does in use" if mixes else "no row would see it"
            raise InputError(
                f"objective.context: expected {str(mixes).lower()} with model.decoder_mixing = "
                f"{config.decoder_mixing}: {why}"
            )
        return config

    def resolved(self) -> dict[str, Any]:
        """Every field with its value, as plain YAML types."""
        return self.model_dump(mode="json")

    def trajectory(self) -> dict[str, Any]:
        """Dotted field -> value, of the fields that decide the loss sequence."""
        flat = flatten(self.resolved())
        return {key: value for key, value in flat.items() if not key.startswith(FREE)}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: the YAML file, or the name of a shipped one such as `pretrain/mlm.yaml`.
        overrides: `section.field=value`, each value parsed as YAML; later ones win.

    Raises:
        InputError: the file cannot be read, or a field is unknown or has a wrong value.
    """
    path = find_recipe(path)
    tree = read_yaml(path)
    overridden = {}
    for text in overrides:
        field = apply_override(tree, text)
        overridden[field] = text
    tree.setdefault("run", {})
    if isinstance(tree["run"], dict) and not tree["run"].get("name"):
        tree["run"]["name"] = Path(path).stem
    checker = Checker(str(path), overridden)
    recipe = checker.check(Recipe, tree)
    objective = checker.check_objective(recipe.objective)
    model = checker.check_model(recipe.model)
    return recipe.model_copy(update={"objective": objective, "model": model})


def find_recipe(path: str | Path) -> Path:
    """The file itself; a relative path that does not exist is looked up among the recipes that the package ships."""
    path = Path(path)
    if path.exists() or path.is_absolute():
        return path
    shipped = Path(__file__).parent.parent / "recipes"
    inside = shipped / (path.relative_to("recipes") if path.parts[:1] == ("recipes",) else path)
    return inside if inside.exists() else path


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the resolved recipe, and reads it back to make sure that the file says the same.

    Raises:
        RuntimeError: it does not (a fault of the schema, not of the user).
    """
    text = yaml.safe_dump(recipe.resolved(), sort_keys=False)
    path.write_text("# the recipe of this run with every default filled in\n" + text, encoding="utf-8")
    if load_recipe(path) != recipe:
        raise RuntimeError(f"{path}: the saved recipe does not read back as the one that was saved")


def read_yaml(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"{path}: no such recipe; give the path of a YAML file or the name of a shipped recipe")
    if path.is_dir():
        raise InputError(f"{path}: expected a recipe file, got a folder")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        byte = f"{error.object[error.start]:#04x} at {error.start}"
        raise InputError(f"{path}: expected UTF-8 text, got byte {byte}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected sections such as `run:` and `model:`, got {describe(tree)}")
    return tree


def apply_override(tree: dict[str, Any], text: str) -> str:
    """Writes one `section.field=value` into the tree and returns the dotted field."""
    field, separator, value = text.partition("=")
    keys = field.strip().split(".")
    if not separator or not all(keys):
        raise InputError(f"override {text!r}: expected section.field=value, such as optim.lr=1e-3")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"override {text!r}: {one_line(error)}") from error
    for key in keys[:-1]:
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise InputError(f"override {text!r}: {key} holds {describe(tree)}, which has no field inside")
    tree[keys[-1]] = parsed
    return ".".join(keys)


class Checker:
    """Turns what pydantic finds into one line: where, which field, what is wrong, what to do."""

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

    def check_objective(self, section: dict[str, Any]) -> dict[str, Any]:
        name = section.get("name")
        if "name" not in section:
            raise InputError(self.line("objective.name", f"is missing; one of {', '.join(OBJECTIVES)}"))
        if name not in OBJECTIVES:
            problem = f"expected one of {', '.join(OBJECTIVES)}{nearest(str(name), OBJECTIVES)}, got {describe(name)}"
            raise InputError(self.line("objective.name", problem))
        options = {key: value for key, value in section.items() if key != "name"}
        checked = self.check(options_schema(OBJECTIVES[name]), options, prefix="objective").model_dump()
        try:
            OBJECTIVES[name](**checked)
        except ValueError as error:  # it begins with the option's name
            option = str(error).partition(":")[0]
            raise InputError(self.line(f"objective.{option}", one_line(error).removeprefix(f"{option}: "))) from None
        return {"name": name, **checked}

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
KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", list: "a list", dict: "a section"}


def model_section() -> type[BaseModel]:
    """A schema with the fields of `ConceptConfig` that a recipe may set."""
    hints = typing.get_type_hints(ConceptConfig.__init__)
    names = [name for name in inspect.signature(ConceptConfig).parameters if name not in (*FROM_TOKENIZER, "kwargs")]
    return strict_schema("Model", {name: (hints[name], None) for name in names})


def options_schema(objective: type) -> type[BaseModel]:
    """A schema with the options of an objective, a dataclass."""
    hints = typing.get_type_hints(objective)
    return strict_schema("Objective", {f.name: (hints[f.name], f.default) for f in dataclasses.fields(objective)})


def strict_schema(name: str, fields: dict[str, tuple[Any, Any]]) -> type[BaseModel]:
    strict = {int: StrictInt, int | None: StrictInt | None, bool: StrictBool}
    fields = {key: (strict.get(hint, hint), default) for key, (hint, default) in fields.items()}
    return create_model(name, __config__=ConfigDict(extra="forbid", protected_namespaces=()), **fields)


def valid_names(schema: Any, keys: Sequence[str]) -> list[str]:
    """The field names of the (nested) schema that `keys` lead to."""
    for key in keys:
        fields = getattr(schema, "model_fields", {})
        schema = fields[key].annotation if key in fields else element(schema)
    return list(getattr(element(schema), "model_fields", {}))


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
    message = problem["msg"].replace("Input should be", "expected")
    return message[:1].lower() + message[1:]


def describe(value: Any) -> str:
    """A value and its kind in the words of YAML."""
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return "nothing" if value is None else f"{text} ({KINDS.get(type(value), type(value).__name__)})"


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
