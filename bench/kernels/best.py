"""Every case of a comparison in one line: ours beside the fastest peer that gave the right answer."""

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("operator", "case", "mode", "provider", "ms", "ms_p20", "ms_p80", "tflops", "gb_s", "share_of_floor",
           "peak_mb", "error", "ours_is_faster_by", "status")  # fmt: skip
BEST_COLUMNS = ["operator", "case", "ours ms", "share of floor", "best peer", "its ms", "ours is faster by"]


def best_peers(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line a case: our time and that of the fastest peer whose result passed its check, wins and losses alike."""
    table = []
    both = [row for row in rows if row["mode"] == "both"]
    for operator, case in dict.fromkeys((row["operator"], row["case"]) for row in both):
        ran = [
            row for row in both
            if (row["operator"], row["case"]) == (operator, case) and row.get("accurate") is True
        ]  # fmt: skip
        mine = [row for row in ran if row["provider"].startswith("conceptron")]
        theirs = [row for row in ran if row not in mine]
        ours, peer = (min(group, key=lambda row: row["ms"], default=None) for group in (mine, theirs))
        table.append({
            "operator": operator, "case": case, "ours ms": ours and ours["ms"],
            "share of floor": ours and ours["share_of_floor"], "best peer": peer["provider"] if peer else "none ran",
            "its ms": peer and peer["ms"], "ours is faster by": peer["ms"] / ours["ms"] if ours and peer else None,
        })  # fmt: skip
    return table
