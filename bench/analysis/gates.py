"""What measured figures say to the gates of a YAML file: PASS, FAIL or UNKNOWN, and what to do next.

The file that is used if no other is given, ``bench/gates.yaml``, says what its rows mean. Its section ``gates`` is
ours; ``seeds`` holds the thresholds of the planning documents, which are of different ages and do not all agree.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ...engine.errors import InputError
from .geometry.metrics import equicosine_rank

SHIPPED = Path(__file__).parent.parent / "gates.yaml"
SENSES = {"above": ">", "below": "<"}
OF_ROW = {"metric", "means", "above", "below", "source", "next", "thresholds", "void_below", "void"}
OF_THRESHOLD = {"above", "below", "source", "next"}
PASS, FAIL, UNKNOWN = "PASS", "FAIL", "UNKNOWN"
UNMEASURED = "not measured"


class Threshold(NamedTuple):
    """The figure must lie above (">") or below ("<") ``value``; ``per_concept``: times the number of concepts."""

    sense: str
    value: float
    per_concept: bool
    source: str
    next: str

    def at(self, num_concepts: int) -> float:
        return self.value * num_concepts if self.per_concept else self.value


class Gate(NamedTuple):
    """One metric with its thresholds, the easiest first as the file has them."""

    metric: str
    means: str
    thresholds: tuple[Threshold, ...]
    void_below: float
    void: str  # why a figure below void_below says nothing
    is_seed: bool


class Verdict(NamedTuple):
    gate: Gate
    value: float | None  # None: not measured
    limits: tuple[float, ...]  # of each threshold, at the model's number of concepts
    passed: tuple[bool, ...]  # of each threshold; empty where nothing is known
    verdict: str
    reason: str  # what to do next, of the first threshold that fails; or why nothing is known

    @property
    def wanted(self) -> str:
        """"> 8" or "> 8, > 10, > 16"."""
        pairs = zip(self.gate.thresholds, self.limits, strict=True)
        return ", ".join(f"{threshold.sense} {limit:g}" for threshold, limit in pairs)

    @property
    def source(self) -> str:
        """Of the threshold that decides: the first that fails, else the last."""
        failed = self.passed.index(False) if False in self.passed else -1
        return self.gate.thresholds[failed].source

    @property
    def in_short(self) -> str:
        """PASS, FAIL or UNKNOWN; of several thresholds also how many are passed."""
        some = f" {sum(self.passed)} of {len(self.passed)}" if len(self.passed) > 1 else ""
        return f"{self.verdict}{some}"


def read_gates(path: Path | None = None) -> list[Gate]:
    """The gates of a file, ours first.

    Raises:
        InputError: there is no such file, or a row of it cannot be understood.
    """
    path = SHIPPED if path is None else path
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    sections = content if isinstance(content, dict) else {}
    if not sections or set(sections) - {"gates", "seeds"} or not all(isinstance(s, list) for s in sections.values()):
        raise InputError(f"{path}: expected the sections gates and seeds, each a list of rows")
    found = []
    for name in ("gates", "seeds"):
        rows = sections.get(name, [])
        found += [gate_of(row, f"{path}: {name} row {i}", name == "seeds") for i, row in enumerate(rows, start=1)]
    return found


def gate_of(row: Any, where: str, is_seed: bool) -> Gate:
    if not isinstance(row, dict) or not isinstance(row.get("metric"), str):
        raise InputError(f"{where}: expected a metric with above or below, source and next")
    where = f"{where} ({row['metric']})"
    listed = row.get("thresholds", [{key: row[key] for key in OF_THRESHOLD if key in row}])
    if not isinstance(listed, list) or not listed or ("thresholds" in row and OF_THRESHOLD & set(row)):
        raise InputError(f"{where}: expected either thresholds, a list, or above or below with source and next")
    check_keys(row, OF_ROW, where)
    void_below = row.get("void_below", -math.inf)
    if not is_number(void_below, finite=False):
        raise InputError(f"{where}: void_below: expected a number, got {void_below!r}")
    thresholds = tuple(threshold_of(each, where) for each in listed)
    words = {key: row.get(key, "") for key in ("means", "void")}
    return Gate(row["metric"], str(words["means"]), thresholds, void_below, str(words["void"]), is_seed)


def threshold_of(entry: Any, where: str) -> Threshold:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected above or below with source and next, got {entry!r}")
    check_keys(entry, OF_THRESHOLD, where)
    senses = [key for key in SENSES if key in entry]
    if len(senses) != 1:
        raise InputError(f"{where}: expected either above or below, got {' and '.join(senses) or 'neither'}")
    value = entry[senses[0]]
    per_concept = isinstance(value, dict) and set(value) == {"share"}
    value = value["share"] if per_concept else value
    if not is_number(value):
        raise InputError(f"{where}: {senses[0]}: expected a number or {{share: number}} of the concepts, got {value!r}")
    for key in ("source", "next"):
        if not isinstance(entry.get(key), str):
            raise InputError(f"{where}: {key}: expected text, got {entry.get(key)!r}")
    return Threshold(SENSES[senses[0]], float(value), per_concept, entry["source"], entry["next"])


def check_keys(entry: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(map(str, entry)) - known)
    if unknown:
        raise InputError(f"{where}: {unknown[0]}: unknown; expected {', '.join(sorted(known))}")


def is_number(value: Any, finite: bool = True) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and (math.isfinite(value) if finite else not math.isnan(value))


def judge(figures: Mapping[str, float | None], num_concepts: int, gates: Sequence[Gate]) -> list[Verdict]:
    """A verdict a gate. A figure that is absent, None or NaN is not measured."""
    return [judge_one(gate, figures.get(gate.metric), num_concepts) for gate in gates]


def judge_one(gate: Gate, value: float | None, num_concepts: int) -> Verdict:
    limits = tuple(threshold.at(num_concepts) for threshold in gate.thresholds)
    if value is None or math.isnan(value):
        return Verdict(gate, None, limits, (), UNKNOWN, UNMEASURED)
    if value < gate.void_below:
        return Verdict(gate, float(value), limits, (), UNKNOWN, gate.void)
    passed = tuple(
        value > limit if threshold.sense == ">" else value < limit
        for threshold, limit in zip(gate.thresholds, limits, strict=True)
    )
    verdict = PASS if all(passed) else FAIL
    reason = "" if verdict == PASS else gate.thresholds[passed.index(False)].next
    return Verdict(gate, float(value), limits, passed, verdict, reason)


def contradictions(num_concepts: int) -> list[str]:
    """Gates of the planning documents that cannot both be meant, with the figures that show it for C concepts."""
    allowed = equicosine_rank(0.3, num_concepts)
    wanted = num_concepts / 2
    needed = cosine_for_rank(wanted, num_concepts)
    return [
        f"A mean similarity below 0.3 and an effective rank above C/2 = {wanted:g} cannot both be meant: "
        f"{num_concepts} prototypes of one common cosine 0.3 have rank {allowed:.1f}; rank {wanted:g} needs one below "
        f"{needed:.4f}.",
        "An effective rank of the mean concepts says nothing about content: frozen orthogonal prototypes reach C. Read "
        "it with the static fraction and the rank of the input-dependent part.",
    ]


def cosine_for_rank(rank: float, num_concepts: int) -> float:
    """The cosine at which ``equicosine_rank`` is ``rank``: (1 - q) / (1 - q + q C), q = ((rank - 1) / (C - 1))^2."""
    q = ((rank - 1) / (num_concepts - 1)) ** 2
    return (1 - q) / (1 - q + q * num_concepts)
