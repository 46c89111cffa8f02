"""Where the memory of a training step goes, against N and C, and the longest N that fits in a given memory.

    conceptron bench memory [--max-tokens 8192] [--concepts 128 512] [--fit 1.0] [--out runs/bench/memory]

Each case is one fresh process that trains a masked-diffusion model for two steps on one text of N tokens and reports

    parameters, gradients, optimizer     bytes of those tensors
    activations                          what the forward pass keeps for the backward pass, by part of the model
    temporary                            the allocator's peak during the second step, less all of the above
    allocator peak                       their sum: parameters, gradients, moments and what lived beside them
    resident peak                        of the process (on a GPU: as NVML sees it), with libraries and slack

and the same for a full-attention encoder of equal width and depth, whose language-model head sees the same targets.

The prediction is a straight line through the allocator's peaks of the two longest concept cases; it is checked by a run
at the N that it names for ``--fit`` GiB.
"""

import argparse
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..kernels.linear_cross_entropy.op import linear_cross_entropy
from ..models.config import ConceptConfig
from ..models.heads import ConceptForMaskedLM
from ..models.objectives import OBJECTIVES
from ..models.objectives.view import SampleKey, SpecialTokens, View
from ..models.packing import pack
from .allocator import allocator_peak
from .harness import device_of, environment, markdown_table, resident_peak, write_results
from .peers import Shape, bert
from .plot import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, canvas, length_axis

GIB = 2**30
OURS, FULL = "concept", "full attention"
PARTS = {  # part of the report -> modules, the first that fits
    "embedding": r"encoder\.(embed_tokens|token_norm)|decoder\.embed_tokens|body\.embeddings",
    "queries": r"encoder\.concepts",
    "encoder": r"encoder|body",
    "decoder": r"decoder",
    "head": r"lm_head|head",
}


class FullAttentionLM(nn.Module):
    """The peer: a BERT-like encoder and a tied head on the target rows, through the same fused cross-entropy."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.body = bert(shape)
        self.head = TiedHead(self.body.embeddings.word_embeddings)

    def forward(self, view: View) -> Tensor:
        hidden = self.body(view.encoder.input_ids[None]).last_hidden_state[0]
        return self.head(hidden, view) / view.divisor


class TiedHead(nn.Module):
    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.weight = embedding.weight

    def forward(self, hidden_Td: Tensor, view: View) -> Tensor:
        return linear_cross_entropy(
            hidden_Td, self.weight, view.targets, index=view.decoder_position_ids, token_weight=view.weights,
            reduction="sum",
        )  # fmt: skip


def make_view(num_tokens: int, vocab_size: int, hidden: str) -> View:
    """A text of random tokens under masked diffusion at t = 0.5."""
    ids = np.random.default_rng(num_tokens).integers(8, vocab_size, num_tokens)
    objective = OBJECTIVES["diffusion"](hidden=hidden)
    tokens = SpecialTokens(mask_id=1, special_ids=frozenset(range(8)), vocab_size=vocab_size)
    key = SampleKey(seed=0, epoch=0, index=0)
    return objective.evaluation_views(pack([ids]), [key], tokens)["t=0.50"]


def make_model(kind: str, shape: Shape, num_concepts: int) -> nn.Module:
    torch.manual_seed(0)
    if kind == FULL:
        return FullAttentionLM(shape)
    return ConceptForMaskedLM(ConceptConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, num_concepts=num_concepts,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size, num_decoder_layers=1, mask_token_id=1,
    ))  # fmt: skip


@contextmanager
def saved_by_part(
    model: nn.Module, parts: Mapping[str, str] = PARTS, ignored: Collection[torch.Size] = ()
) -> Iterator[dict[str, int]]:
    """Bytes that the forward pass inside keeps for backward, by part; each storage counts once, parameters not at all,
    nor the 16-bit copies that autocast makes of them.

    Activations that a fused operator saves are seen like any other. A storage belongs to the part that saved it first.

    Args:
        parts: part -> a regular expression that the names of its modules begin with.
        ignored: shapes of what is not to be counted.
    """
    bytes_of, stack, seen = dict.fromkeys([*parts, "other"], 0), ["other"], set()
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}  # one a storage

    def part_of(name: str) -> str | None:
        return next((part for part, pattern in parts.items() if re.match(pattern, name)), None)

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters and storage._cdata not in seen:
            seen.add(storage._cdata)
            if tensor.shape not in ignored and not is_cast_parameter(tensor):
                bytes_of[stack[-1]] += storage.nbytes()
        return tensor

    handles = []
    for name, module in model.named_modules():
        part = part_of(name)
        if part is not None:
            handles.append(module.register_forward_pre_hook(lambda m, i, part=part: stack.append(part)))
            handles.append(module.register_forward_hook(lambda m, i, o: stack.pop() and None, always_call=True))
    try:
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            yield bytes_of
    finally:
        for handle in handles:
            handle.remove()


def is_cast_parameter(tensor: Tensor) -> bool:
    """Whether nothing but casts and transpositions lies between a parameter and this tensor."""
    node = tensor.grad_fn
    while node is not None and node.name() in ("ToCopyBackward0", "TBackward0", "TransposeBackward0"):
        node = node.next_functions[0][0]
    return node is not None and node.name() == "torch::autograd::AccumulateGrad"


def training_case(
    kind: str, shape: Sequence[int], num_tokens: int, num_concepts: int, device: str
) -> Callable[[], dict]:
    """Called in a fresh process: builds everything but the step, returns the call whose memory is measured."""
    sizes = Shape(*shape)
    model = make_model(kind, sizes, num_concepts).to(device)
    view = make_view(num_tokens, sizes.vocab_size, "mask" if kind == FULL else "drop").to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def loss() -> Tensor:
        return model(view) if kind == FULL else model(view=view).loss

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    def case() -> dict[str, Any]:
        step()  # creates the gradients and the moments
        with saved_by_part(model) as activations:
            kept = loss()
        del kept
        optimizer.zero_grad(set_to_none=True)
        peak = allocator_peak(step, device)
        parameters = sum(parameter.nbytes for parameter in model.parameters())
        moments = sum(
            value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        )
        persistent = 0 if device == "cuda" else parameters + moments  # a CPU's count starts at zero
        total = peak.peak_bytes + persistent
        return {
            "parameters": parameters, "gradients": parameters, "optimizer": moments,
            **{f"activations: {part}": size for part, size in activations.items()},
            "allocator_peak": total, "nvml": nvml_used() if device == "cuda" else None,
        }  # fmt: skip

    return case


def nvml_used() -> int | None:
    """Bytes that NVML says this process's GPU has in use; None when nvidia-ml-py is not installed."""
    try:
        import pynvml
    except ImportError:
        return None
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
    return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)


def run_case(kind: str, shape: Shape, num_tokens: int, num_concepts: int, device: str) -> dict[str, Any]:
    """One row of the table, from a fresh process."""
    memory, result = resident_peak(
        f"{__name__}:training_case", kind=kind, shape=list(shape.__dict__.values()), num_tokens=num_tokens,
        num_concepts=num_concepts, device=device,
    )  # fmt: skip
    kept = sum(size for name, size in result.items() if name.startswith("activations"))
    accounted = result["parameters"] + result["gradients"] + result["optimizer"] + kept
    peak = result.pop("allocator_peak")
    nvml = result.pop("nvml")
    return {
        "encoder": kind, "N": num_tokens, "C": num_concepts if kind == OURS else None, **result,
        "temporary": max(0, peak - accounted), "allocator_peak": peak,
        "resident_peak": nvml if nvml is not None else memory.peak_bytes,
    }  # fmt: skip


def longest_that_fits(rows: Sequence[dict], limit_bytes: int) -> int:
    """N at which the line through the allocator's peaks of the two longest cases reaches ``limit_bytes``.

    Raises:
        ValueError: fewer than two cases, or a peak that does not grow with N.
    """
    if len(rows) < 2:
        raise ValueError(f"rows: expected at least two lengths to predict from, got {len(rows)}")
    first, second = sorted(rows, key=lambda row: row["N"])[-2:]
    slope = (second["allocator_peak"] - first["allocator_peak"]) / (second["N"] - first["N"])
    if slope <= 0:
        raise ValueError("rows: the peak does not grow with N; measure longer texts")
    return int(second["N"] + (limit_bytes - second["allocator_peak"]) / slope)


def plot(path: Path, rows: Sequence[dict], note: str) -> None:
    """Left: peaks against N, log-log. Right: what the peak of the longest concept case is made of."""
    with canvas(path, "Memory of a training step", note, size=(10.4, 4.6), columns=2) as (against, parts):
        lines = {(row["encoder"], row["C"]) for row in rows}
        for (name, num_concepts), colour in zip(sorted(lines, key=str), (BLUE, GREEN, PURPLE, ORANGE), strict=False):
            kept = [row for row in rows if (row["encoder"], row["C"]) == (name, num_concepts)]
            label = f"{name}, C = {num_concepts}" if num_concepts else name
            colour = ORANGE if name == FULL else colour
            for key, style in (("allocator_peak", "o-"), ("resident_peak", "o:")):
                against.plot(
                    [row["N"] for row in kept], [row[key] / 2**20 for row in kept], style, color=colour, markersize=4,
                    label=label if key == "allocator_peak" else None,
                )  # fmt: skip
        against.set(yscale="log", ylabel="MiB")
        against.set_title("peak: allocator (solid), process (dotted)", fontsize=10.5)
        length_axis(against, [row["N"] for row in rows])
        against.legend(fontsize=9)
        last = max((row for row in rows if row["encoder"] == OURS), key=lambda row: (row["N"], row["C"]))
        names = ["parameters", "gradients", "optimizer", *(n for n in last if n.startswith("activations")), "temporary"]
        sizes = [last[name] / 2**20 for name in names]
        colours = [GREY, GREY, GREY, *([BLUE] * (len(names) - 4)), INK]
        parts.barh(names[::-1], sizes[::-1], color=colours[::-1], height=0.65)
        for i, size in enumerate(sizes[::-1]):
            parts.text(size, i, f" {size:.1f}", va="center", fontsize=9)
        parts.set(xlabel="MiB")
        parts.set_title(f"concept encoder, N = {last['N']}, C = {last['C']}", fontsize=10.5)
        parts.grid(axis="y", visible=False)


def snapshot(path: Path, shape: Shape, num_tokens: int, num_concepts: int) -> None:
    """A CUDA memory snapshot of one case, for pytorch.org/memory_viz."""
    torch.cuda.memory._record_memory_history()
    training_case(OURS, list(shape.__dict__.values()), num_tokens, num_concepts, "cuda")()
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="conceptron bench memory", description="Where a training step's memory goes.")
    parser.add_argument("--min-tokens", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--concepts", type=int, nargs="+", default=[128])
    parser.add_argument("--width", type=int, default=128, help="d, of both encoders")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--fit", type=float, default=1.0, metavar="GIB", help="predict the longest N for this memory")
    parser.add_argument("--snapshot", type=Path, help="also write a CUDA memory snapshot of the longest case")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench/memory"))
    options = parser.parse_args(argv)
    if options.snapshot is not None and options.device != "cuda":
        parser.error("--snapshot: torch records memory snapshots on CUDA only; run on a GPU or leave it out")
    lengths = [options.min_tokens]
    while lengths[-1] * 2 <= options.max_tokens:
        lengths.append(lengths[-1] * 2)
    shape = Shape(options.width, options.layers, options.heads, 2 * options.width, 8192, lengths[-1])
    cases = [(OURS, n, c) for c in options.concepts for n in lengths] + [(FULL, n, 0) for n in lengths]
    rows = []
    for kind, num_tokens, num_concepts in cases:
        rows.append(run_case(kind, shape, num_tokens, num_concepts, options.device))
        print(f"{kind} N={num_tokens} C={num_concepts or '-'}: peak {rows[-1]['allocator_peak'] / 2**20:.1f} MiB")
    checks = [check_prediction(rows, shape, c, options.fit, options.device) for c in options.concepts]
    stamp = environment()
    options.out.mkdir(parents=True, exist_ok=True)
    title = f"Memory of a training step: d={options.width}, {options.layers} layers, one text of N tokens, bytes"
    write_results(options.out, "memory", rows, stamp, title=title)
    write_results(options.out, "prediction", checks, stamp, title="Longest N that fits: predicted and checked")
    note = f"d = {options.width}, {options.layers} layers, float32, {device_of(stamp)}"
    for suffix in ("png", "svg"):
        plot(options.out / f"memory.{suffix}", rows, note)
    if options.snapshot is not None:
        snapshot(options.snapshot, shape, lengths[-1], options.concepts[0])
    print(markdown_table(checks, list(checks[0])))
    print(f"written to {options.out}")
    return 0


def check_prediction(rows: Sequence[dict], shape: Shape, num_concepts: int, limit_gib: float, device: str) -> dict:
    """Predicts the longest N for ``limit_gib``, runs it, and says how far the peak came from the limit."""
    known = [row for row in rows if row["encoder"] == OURS and row["C"] == num_concepts]
    longest = longest_that_fits(known, int(limit_gib * GIB))
    measured = run_case(OURS, shape, longest, num_concepts, device)["allocator_peak"]
    return {
        "C": num_concepts, "limit_GiB": limit_gib, "predicted N": longest, "measured_GiB": round(measured / GIB, 4),
        "error_percent": round(100 * (measured / (limit_gib * GIB) - 1), 2), "predicted from N": known[-1]["N"],
    }  # fmt: skip
