"""``conceptron bench compute MODEL``: what more or less computation at test time buys.

K iterations of a recursive model (tied layers, of slots too), C concepts of a nested one, on the same held-out targets:
quality, whether the concepts still move, and time.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..engine.errors import InputError
from ..models.encoder import ConceptEncoderOutput
from ..models.masked_lm import ConceptForMaskedLM
from .analysis import does
from .analysis.subject import open_subject
from .figures.sweep import sweep_figure
from .measure.environment import environment
from .measure.results import markdown_table, write_results
from .measure.timing import Refusal, compare

NUM_TARGETS = 4096
COLUMNS = ("what", "value", "trained", "nll", "nll_other", "change", "ms")


def main(options: argparse.Namespace) -> int:
    """``options``: path, a run or a model; text: held-out files for a bare model; iterations and concepts: values of K
    and C, or None for all that make sense; seconds: timed for each; out: a folder.

    Raises:
        InputError: the model has no decoder, or neither K nor C can be chosen at test time.
    """
    subject = open_subject(Path(options.path), options.text)
    if not subject.can_predict:
        raise InputError(f"{options.path}: an encoder without a decoder has no loss to measure")
    model, config = subject.model.eval(), subject.model.config
    iterations = iterations_of(model, options.iterations) if config.tie_layers else []
    concepts = concepts_of(model, options.concepts) if config.nested_concepts else []
    if not iterations and not concepts:
        raise InputError(
            f"{options.path}: neither K nor C can be chosen at test time: train with model.tie_layers=true (and "
            "model.iteration_sampling=random), or with model.nested_concepts=true"
        )
    rows = sweep_iterations(model, subject.loader, iterations, options.seconds)
    rows += sweep_concepts(model, subject.loader, concepts, options.seconds)
    about = {"model": subject.name, "text": subject.text, **environment(subject.seed)}
    path = write_results(options.out, "compute", rows, about, title="Computation at test time", columns=COLUMNS)
    sweep_figure(rows, options.out / "compute.png", subject.name)
    print(markdown_table([plain(row) for row in rows], COLUMNS))
    print(f"written: {path}, {options.out / 'compute.png'}")
    return 0


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "ms": row["ms"].reason if isinstance(row["ms"], Refusal) else row["ms"].median_ms}


def iterations_of(model: ConceptForMaskedLM, asked: Sequence[int] | None) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12 and, further than the model was trained, 16; always the trained K."""
    return sorted({*(asked or (1, 2, 3, 4, 6, 8, 12, 16)), model.config.iterations})


def concepts_of(model: ConceptForMaskedLM, asked: Sequence[int] | None) -> list[int]:
    """Powers of two up to C, and C.

    Raises:
        InputError: more are asked for than there are.
    """
    C = model.config.num_concepts
    if asked and max(asked) > C:
        raise InputError(f"--concepts: expected 1 to the model's C = {C}, got {max(asked)}")
    return sorted({*(asked or (2**i for i in range(C.bit_length()) if 2**i <= C)), C})


def sweep_iterations(model: ConceptForMaskedLM, loader: Any, values: Sequence[int], seconds: float) -> list[dict]:
    """One row a K. ``change``: |c_K - c_K-1| / |c_K-1| of the last iteration, mean over texts; ``ms``: of encoding."""
    if not values:
        return []
    rows, calls = [], {}
    for K in values:
        _, readings = does.read(model, loader, NUM_TARGETS, num_iterations=K)
        packed = readings[0].view.encoder
        calls[K] = lambda K=K, packed=packed: encode(model, packed, K)
        convergence = encode(model, packed, K, with_convergence=True).convergence
        rows.append({
            "what": "K", "value": K, "trained": model.config.iterations,
            **own_and_other(model, readings), "change": float(convergence[-1].mean()),
        })  # fmt: skip
    return with_times(rows, calls, model, seconds)


def sweep_concepts(model: ConceptForMaskedLM, loader: Any, values: Sequence[int], seconds: float) -> list[dict]:
    """One row for the first C concepts in nested order, which the decoder gets; ``ms``: of decoding the targets."""
    if not values:
        return []
    _, readings = does.read(model, loader, NUM_TARGETS)
    rows, calls = [], {}
    for C in values:
        first = does.nested_order(model.config.num_concepts)[:C]
        kept = [reading_with(reading, does.keep(first)) for reading in readings]
        calls[C] = lambda kept=kept: does.ask(model, kept[:1])
        rows.append({
            "what": "C", "value": C, "trained": model.config.num_concepts, **own_and_other(model, kept), "change": None,
        })  # fmt: skip
    return with_times(rows, calls, model, seconds)


def reading_with(reading: does.Reading, change: does.Change) -> does.Reading:
    concepts, anchors = change(reading.concepts, reading.anchors)
    return reading._replace(concepts=concepts, anchors=anchors)


@torch.no_grad()
def encode(model: ConceptForMaskedLM, packed: Any, K: int, with_convergence: bool = False) -> ConceptEncoderOutput:
    return model.encoder(packed=packed, num_iterations=K, output_convergence=with_convergence, return_dict=True)


def own_and_other(model: ConceptForMaskedLM, readings: Sequence[does.Reading]) -> dict[str, float]:
    """Nats per target from a text's own concepts, and from those of another text."""
    other = does.ask(model, readings, lambda z, a: (z.roll(1, 0), a.roll(1, 0)))
    return {"nll": does.mean(does.ask(model, readings)), "nll_other": does.mean(other)}


def with_times(rows: list[dict], calls: dict[int, Any], model: ConceptForMaskedLM, seconds: float) -> list[dict]:
    device = next(model.parameters()).device
    times = compare({str(value): call for value, call in calls.items()}, device=device, budget_s=seconds)
    return [{**row, "ms": times[str(row["value"])]} for row in rows]
