"""Metrics of ranked documents, 0 to 1: nDCG@10 as LongEmbed and MTEB report it, with the share of right first ones."""

import math
from collections.abc import Sequence
from statistics import fmean

CUT = 10


def ranking(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Of every query the documents that were found, best first, against those that answer it (each of gain 1)."""
    rows = []
    for found, wanted in zip(predictions, references, strict=True):
        hits = [document in wanted for document in found[:CUT]]
        gain = sum(hit / math.log2(place + 2) for place, hit in enumerate(hits))
        best = sum(1 / math.log2(place + 2) for place in range(min(CUT, len(wanted))))
        first = next((place for place, hit in enumerate(hits) if hit), None)
        rows.append({
            "ndcg@10": gain / best, "recall@1": float(hits[0]) if hits else 0.0,
            "mrr@10": 0.0 if first is None else 1 / (first + 1),
        })  # fmt: skip
    return {key: fmean(row[key] for row in rows) for key in rows[0]}, rows
