"""The figures of ``bench memory``, each drawn from its result file alone.

    memory.json      memory.*: peaks against N, and what the largest one is made of
    encoders.json    encoders.*: bytes that a training step takes for each token, by what is kept of it
"""

from pathlib import Path

from ..measure.environment import device_of
from ..measure.exponents import in_tokens
from ..measure.results import read_results
from .charts import LINES, sizes_of, title_of
from .plot import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    canvas,
    in_units,
    legend_below,
    length_axis,
    unit_axis,
)

STYLES = ((BLUE, "o"), (GREEN, "D"), (PURPLE, "P"))  # of concept cases, one a C
PEER = (ORANGE, "s")


def draw_memory(folder: Path) -> None:
    rows, environment = read_results(folder / "memory.json")
    rows = [row for row in rows if row.get("allocator_peak") is not None]
    sizes = sizes_of(environment)
    parts = (sizes, "one text of N tokens", environment.get("dtype"), device_of(environment))
    if any(row["C"] for row in rows):
        plot_memory(folder / "memory.png", rows, "; ".join(part for part in parts if part))
    if (folder / "encoders.json").exists():
        rows, _ = read_results(folder / "encoders.json")
        parts = (sizes, "two texts of N and 3N/4 tokens", environment.get("dtype"), device_of(environment))
        plot_encoders(folder / "encoders.png", [row for row in rows if row.get("bytes_per_token") is not None],
                      "; ".join(part for part in parts if part))  # fmt: skip


def plot_memory(path: Path, rows: list[dict], note: str) -> None:
    """Left: peaks against N, log-log. Right: what the peak of the longest concept case is made of."""
    with canvas(path, "Memory of a training step", note, size=(9.6, 4.9), columns=2) as (against, parts):
        lines = list(dict.fromkeys((row["encoder"], row["C"]) for row in rows))
        styles = dict(zip([line for line in lines if line[1]], STYLES, strict=False))
        for line in lines:
            kept = [row for row in rows if (row["encoder"], row["C"]) == line]
            label = f"{line[0]}, C = {line[1]}" if line[1] else line[0]
            colour, marker = styles.get(line, PEER)
            for key, style, what in (("allocator_peak", "-", "tensors"), ("resident_peak", (0, (1, 1.2)), "process")):
                against.plot(
                    [row["N"] for row in kept], [row[key] for row in kept], linestyle=style, color=colour,
                    marker=marker, markersize=5, label=f"{label}: {what}",
                )  # fmt: skip
        against.set_ylabel("peak memory")
        against.set_title("peak of the tensors, and of the process", fontsize=11)
        unit_axis(against, "bytes")
        length_axis(against, [row["N"] for row in rows])
        legend_below([against])
        last = max((row for row in rows if row["C"]), key=lambda row: (row["N"], row["C"]))
        held = ["parameters", "gradients", "optimizer"]
        names = [*held, *(n for n in last if n.startswith("activations") and (last[n] or 0) >= 1024), "temporary"]
        sizes = [last[name] / 2**20 for name in names]
        colours = [GREY if name in held else INK if name == "temporary" else BLUE for name in names]
        parts.barh(names[::-1], sizes[::-1], color=colours[::-1], height=0.65)
        for i, name in enumerate(names[::-1]):
            parts.annotate(in_units(last[name], "bytes"), (last[name] / 2**20, i), xytext=(6, 0), fontsize=9.5,
                           textcoords="offset points", va="center")  # fmt: skip
        parts.set(xlabel="MiB", xlim=(0, 1.38 * max(sizes)))
        parts.set_title(f"{last['encoder']}, N = {last['N']:,}, C = {last['C']}", fontsize=11)
        parts.grid(axis="y", visible=False)
        parts.grid(axis="x")
        parts.tick_params(axis="y", length=0)


def plot_encoders(path: Path, rows: list[dict], note: str) -> None:
    """A line an encoder, a mark a length, on a logarithmic axis of bytes."""
    if not rows:
        return
    names = list(dict.fromkeys(row["encoder"] for row in rows))
    lengths = sorted({row["N"] for row in rows})
    note = f"resident peak of forward and backward above what a short text took, per token; lower is better\n{note}"
    with canvas(path, "What a token costs in training", note, size=(9.6, 1.9 + 0.42 * len(names))) as (axes,):
        for place, length in enumerate(lengths):
            kept = [row for row in rows if row["N"] == length]
            axes.plot(
                [row["bytes_per_token"] for row in kept], [names.index(row["encoder"]) for row in kept],
                linestyle="none", marker="os^Dv"[place % 5], markersize=7, label=f"N = {in_tokens(length)}",
                color=(GREY, BLUE, ORANGE, GREEN, PURPLE)[place % 5],
            )  # fmt: skip
        for i, name in enumerate(names):
            longest = max((row for row in rows if row["encoder"] == name), key=lambda row: row["N"])
            axes.text(1.015, i, f"{longest['bytes_per_token']:,.0f} bytes at {in_tokens(longest['N'])}", va="center",
                      fontsize=9.5, transform=axes.get_yaxis_transform())  # fmt: skip
        axes.set(xscale="log", xlabel="bytes a token", ylim=(len(names) - 0.5, -0.5))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_yticks(range(len(names)), [title_of(name) if name in LINES else name for name in names])
        axes.tick_params(axis="y", labelsize=9.5, length=0)
        axes.grid(axis="both")
        legend_below([axes])
