"""What one long text over P GPUs sends between them, beside two ways of spreading full attention, by count.

    concepts   all_gather of what each GPU read, [C, d] 16-bit and a log-sum-exp a head; backward an all_reduce of
               [C, d] float32: nothing depends on N (``models/sharding.py``)
    Ulysses    four all-to-alls of [N / P, d]: queries, keys, values, what was read; four more backward. P <= heads.
               Jacobs et al. 2023, arXiv:2309.14509
    ring       keys and values of every GPU pass all others; backward again, with their float32 gradients behind them.
               Liu et al. 2023, arXiv:2310.01889

Times are simulated: bytes over the bandwidth, FLOPs over the rate that are given, nothing overlapped. They are no
measurement; the bytes of the concepts are counted on real processes in tests/models/test_sharding.py.
"""

import argparse
from typing import NamedTuple

from ..engine.errors import InputError
from .measure.environment import environment
from .measure.results import markdown_table, write_results

HALF, FULL = 2, 4  # bytes of bfloat16, float32


class Text(NamedTuple):
    """One text and the layer that reads it."""

    tokens: int
    width: int
    heads: int
    concepts: int


def concept_bytes(text: Text, gpus: int) -> float:
    """Received by one GPU for one layer, forward and backward."""
    forward = (gpus - 1) * text.concepts * (text.width * HALF + text.heads * FULL)
    return forward + 2 * (gpus - 1) / gpus * text.concepts * text.width * FULL


def ulysses_bytes(text: Text, gpus: int) -> float | None:
    if gpus > text.heads:
        return None
    return 8 * text.tokens / gpus * text.width * HALF * (gpus - 1) / gpus


def ring_bytes(text: Text, gpus: int) -> float:
    keys_values = 2 * text.tokens / gpus * text.width
    return (gpus - 1) * keys_values * (HALF + HALF + FULL)


def concept_flops(text: Text, gpus: int) -> float:
    """Of one layer's read, forward and backward: keys and values of the tokens, scores and sums of C concepts."""
    return 3 * (4 * text.tokens * text.width**2 + 4 * text.concepts * text.tokens * text.width) / gpus


def full_flops(text: Text, gpus: int) -> float:
    """The same of full attention, its four projections included; its backward pass takes 2.5 times the scores."""
    return (3 * 8 * text.tokens * text.width**2 + 3.5 * 4 * text.tokens**2 * text.width) / gpus


def rows_of(text: Text, counts: list[int], gb_s: float, tflops: float) -> list[dict]:
    rows = []
    for gpus in counts:
        row: dict = {"GPUs": gpus, "tokens a GPU": text.tokens // gpus}
        for name, sent, flops in (
            ("concepts", concept_bytes(text, gpus), concept_flops(text, gpus)),
            ("Ulysses", ulysses_bytes(text, gpus), full_flops(text, gpus)),
            ("ring", ring_bytes(text, gpus), full_flops(text, gpus)),
        ):
            row[f"{name} MB"] = None if sent is None else sent / 1e6
            row[f"{name} ms"] = None if sent is None else 1e3 * (sent / (gb_s * 1e9) + flops / (tflops * 1e12))
        rows.append(row)
    return rows


def main(options: argparse.Namespace) -> None:
    """The command line."""
    if options.width % options.heads:
        raise InputError(f"--width: expected a multiple of --heads = {options.heads}, got {options.width}")
    text = Text(options.tokens, options.width, options.heads, options.concepts)
    rows = rows_of(text, options.gpus, options.bandwidth, options.tflops)
    assumed = f"{options.bandwidth:g} GB/s and {options.tflops:g} TFLOP/s a GPU assumed, nothing overlapped"
    title = f"One text of {text.tokens} tokens over several GPUs, one layer, forward and backward: counted; {assumed}"
    write_results(options.out, "parallel", rows, {**environment(seed=0), **text._asdict()}, title=title)
    print(f"{title}\n\n{markdown_table(rows, list(rows[0]))}\nwritten to {options.out / 'parallel.json'}")
