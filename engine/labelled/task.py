"""What a task is: one YAML file each under ``tasks/``, checked when it is read.

A task says where its data are, how a row of them becomes an example, how it is answered, and which metric scores it.
Its name is its path: ``tasks/scrolls/qmsum.yaml`` is ``scrolls/qmsum``; ``scrolls`` are all of that folder.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import InputError

FOLDER = Path(__file__).parents[2] / "bench" / "downstream" / "tasks"
Form = Literal["pair", "scrolls", "longbench", "passage", "synthetic"]
Answer = Literal["similarity", "labels", "values", "choice", "span", "summary", "retrieval", "place", "written"]
Metric = Literal[
    "scrolls/rouge", "scrolls/f1", "scrolls/exact_match", "longbench/f1", "longbench/rouge", "longbench/classification",
    "longbench/retrieval", "longbench/count", "longbench/code_similarity", "accuracy", "accuracy_f1", "correlation",
    "relatedness", "paraphrase", "matthews", "ranking", "accuracy_by_place",
]  # fmt: skip


ON_REQUEST = ("glue/cola", "glue/sst2", "glue/qnli", "glue/rte", "glue/wnli")  # not meant by the name of their folder


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(Strict):
    """Where rows are: on the hub, or in a folder. ``{split}`` stands for the name of a split."""

    hub: str = ""  # the id of a data set's repository; empty: nowhere
    revision: str = "main"
    file: str = ""  # in it: Parquet, JSONL (also packed), or a zip of these
    member: str = ""  # of a zip
    local: str = ""  # under data=DIR: a folder of {split}.parquet, {split}.jsonl(.gz), or one file


class Splits(Strict):
    train: list[str] = []  # learned from; part of it is held out to choose by
    report: list[str]  # what is scored, never chosen by


class Task(Strict):
    name: str
    about: str
    licence: str
    source: Source = Source()
    form: Form
    columns: dict[str, str] = {}  # what this program calls a column -> what the file calls it
    answer: Answer
    metric: Metric
    labels: list[str] = []  # by number
    nothing: str = ""  # what is answered where the document says nothing to the question; empty: never
    words: int = 0  # of an answer or a summary that is taken from the document: about the mean of its references
    bounds: tuple[float, float] | None = None  # of values: unrelated, equal
    splits: Splits
    generator: str = ""  # of a synthetic task
    lengths: list[Annotated[int, Field(ge=64)]] = []  # words of its documents
    published_by: str = ""  # where the following is read
    published: dict[str, dict[str, Any]] = {}  # what others reported: name -> key of the metric -> figure

    @property
    def family(self) -> str:
        return self.name.partition("/")[0]

    @property
    def short(self) -> str:
        return self.name.rpartition("/")[2]


def known() -> list[str]:
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def expand(names: str) -> list[str]:
    """Names with commas between them, each a task or a folder of tasks (without those ON_REQUEST).

    Raises:
        InputError: there is no such task; the nearest is named.
    """
    every, wanted = known(), []
    for name in names.split(","):
        inside = [each for each in every if each == name.strip()
                  or (each.startswith(f"{name.strip()}/") and each not in ON_REQUEST)]  # fmt: skip
        if not inside:
            near = difflib.get_close_matches(name.strip(), every, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"task {name.strip()!r}: expected one of {', '.join(every)}{hint}")
        wanted += [each for each in inside if each not in wanted]
    return wanted


def load_task(name: str) -> Task:
    (name,) = expand(name) if name in known() else one_of(name)
    path = FOLDER / f"{name}.yaml"
    try:
        return Task(name=name, **yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {where}: {first['msg']}") from error


def one_of(name: str) -> list[str]:
    found = expand(name)
    if len(found) > 1:
        raise InputError(f"task {name!r}: expected one task, that is a folder of {len(found)}: {', '.join(found)}")
    return found
