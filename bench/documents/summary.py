"""summary.json: what scripts want of a report, and the schema that lies beside it."""

from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..analysis.findings import Findings, num_parameters, objective_name, run_environment

Number = int | float | None  # None: not measured, or no finite number
Figures = dict[str, int | float | list[str] | None]  # the list: not_finite, see engine/files.py


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    not_finite: list[str] = Field([], description="which of these figures are null because they are not finite")


class GateSummary(Part):
    metric: str
    of_seeds: bool = Field(description="a threshold of the planning documents")
    value: Number
    wanted: str
    verdict: str = Field(description="PASS, FAIL or UNKNOWN")
    passed: list[bool] = Field(description="each threshold, in order; empty where nothing is known")
    source: str
    reason: str = Field(description="what to do next, or why nothing is known")


class InformationSummary(Part):
    bits: float
    floor: float = Field(description="the same after the tokens of each text have been shuffled")
    most: float


class SlotReads(Part):
    centre: float = Field(description="share of the text")
    width: float = Field(description="share of the text")
    entropy: float = Field(description="of its weights; 1: all tokens alike")
    usage: float = Field(description="share of the tokens that it reads most")
    words: list[str]


class ReadsSummary(Part):
    num_texts: int
    num_tokens: int
    figures: Figures
    layers: list[Figures]
    information: dict[str, InformationSummary] = Field(description="bits about token, class, position")
    slots: list[SlotReads]


class SlotDoes(Part):
    increase: Number = Field(description="nats per token without this concept")
    error: Number


class DoesSummary(Part):
    view: str
    num_targets: int
    num_texts: int
    nll: Figures = Field(description="with own, other, mean and zero concepts")
    half_swapped: Figures
    slots: list[SlotDoes]
    kept: list[Figures] = Field(description="NLL by concepts kept, in several orders")
    ratios: list[Figures] = Field(description="NLL by tokens a concept")
    is_nested: bool
    figures: Figures


class ProbeSummary(Part):
    name: str
    asks: str
    score: float
    untrained: Number
    shuffled: float


class Summary(Part):
    """The findings of one report. NLLs and entropies in nats per token; null is "not measured"."""

    name: str
    objective: str
    num_parameters: int
    text: str
    heldout_nll: Number
    unigram_entropy: Number
    effective_rank: Number
    train_seconds: Number
    losses: dict[str, Any] | None
    training: Figures | None
    geometry: Figures
    reads: ReadsSummary | None
    does: DoesSummary | None
    probes: list[ProbeSummary]
    figures: Figures = Field(description="all figures by the names of the gates")
    gates: list[GateSummary]
    samples: list[dict[str, Any]]
    trained_in: dict[str, Any] | None
    environment: dict[str, Any]


def schema() -> dict[str, Any]:
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Summary.model_json_schema()}


def summary(findings: Findings) -> dict[str, Any]:
    """What ``Summary`` describes; NaN where JSON will have null."""
    subject, losses, training = findings.subject, findings.losses, findings.training
    read, done = findings.reads, findings.does
    return {
        "name": subject.name,
        "objective": objective_name(subject),
        "num_parameters": num_parameters(subject),
        "text": subject.text,
        "heldout_nll": losses.heldout_nll if losses else None,
        "unigram_entropy": losses.unigram_entropy if losses else None,
        "effective_rank": findings.geometry["effective_rank"],
        "train_seconds": training.train_seconds if training else None,
        "losses": asdict(losses) if losses else None,
        "training": training._asdict() if training else None,
        "geometry": findings.geometry,
        "reads": None if read is None else {
            "num_texts": read.num_texts, "num_tokens": read.num_tokens, "figures": read.figures, "layers": read.layers,
            "information": {name: each._asdict() for name, each in read.information.items()},
            "slots": [slot._asdict() for slot in read.slots],
        },
        "does": None if done is None else {
            **done._asdict(), "slots": [slot._asdict() for slot in done.slots], "figures": done.figures,
        },
        "probes": [probe._asdict() for probe in findings.probes],
        "figures": findings.figures,
        "gates": [
            {
                "metric": verdict.gate.metric, "of_seeds": verdict.gate.is_seed, "value": verdict.value,
                "wanted": verdict.wanted, "verdict": verdict.verdict, "passed": list(verdict.passed),
                "source": verdict.source, "reason": verdict.reason,
            }
            for verdict in findings.verdicts
        ],
        "samples": [sample._asdict() for sample in findings.samples],
        "trained_in": run_environment(subject.folder) or None,
        "environment": findings.environment,
    }  # fmt: skip
