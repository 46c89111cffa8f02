"""Where the memory of a training step goes, against N and C, and the longest N that fits in a given memory.

    conceptron bench memory [--max-tokens 8192] [--concepts 128 512] [--fit 1.0] [--out runs/bench/memory]

Each case is one fresh process that trains a masked-diffusion model for two steps on one text of N tokens and reports

    parameters, gradients, optimizer     bytes of those tensors
    activations                          what the forward pass keeps for the backward pass, by part of the model
    temporary                            the allocator's peak during the second step, less all of the above
    allocator peak                       their sum: parameters, gradients, moments and what lived beside them
    resident peak                        of the process (on a GPU: as NVML sees it), with libraries and slack
    power, energy, clock, throttled      on a GPU, as NVML sees them while the step is repeated for a second

and the same for a full-attention encoder of equal width and depth, whose language-model head sees the same targets.
Parameters, gradients and moments are float32; on a GPU the step runs under autocast to bfloat16.

A second table is of encoders alone, forward and backward over two texts of N and 3N/4 tokens (``--encoder-tokens``):
the resident peak above what the process had after texts of 2048 (on a GPU: the allocator's peak), per token. It has
every form of what is kept of a token (``ConceptEncoder.keep``) beside a plain Perceiver.

The prediction is a straight line through the allocator's peaks of the two longest concept cases; it is checked by a run
at the N that it names for ``--fit`` GiB. A case that fails says why. Results are written after each: ``--resume`` goes
on.
"""

import argparse
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.errors import InputError
from ..engine.nvml import watched
from ..kernels.linear_cross_entropy.op import linear_cross_entropy
from ..models.config import ConceptConfig
from ..models.encoder import ConceptEncoder
from ..models.encoder_layers import TokenRead
from ..models.layers import Heads
from ..models.masked_lm import ConceptForMaskedLM
from ..models.objectives import OBJECTIVES
from ..models.objectives.view import SampleKey, SpecialTokens, View
from ..models.packing import pack
from .figures.memory import draw_memory
from .measure.allocator import allocator_peak
from .measure.clock import device_named
from .measure.environment import environment
from .measure.exponents import FROM_IDS, FULL, OURS, PERCEIVER, SHARED, WITH_KEYS
from .measure.peers import Shape, bert
from .measure.resident import resident_peak, return_free_pages
from .measure.results import MEASURED, markdown_table, rows_to_resume, write_results
from .measure.timing import refusal
from .scaling import encoders, make_batch, phase_call

GIB = 2**30
ENCODERS = (OURS, FROM_IDS, SHARED, WITH_KEYS, PERCEIVER)  # of the second table
WARM_UP = 2048  # tokens; their concepts, gradients and chunks are as large as those of longer texts
GPU_FIGURES = ("memory_used_bytes", "power_w", "energy_j", "sm_clock_mhz", "sm_clock_min_mhz", "throttled",
               "joules_per_million_tokens", "nvml")  # fmt: skip
PARTS = {  # part of the report -> modules, the first that fits
    "embedding": r"encoder\.(embed_tokens|token_norm|token_reader)|decoder\.embed_tokens|body\.embeddings",
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
    model: nn.Module, parts: Mapping[str, str] = PARTS, ignored: Collection[torch.Size] = (), *, num_tokens: int
) -> Iterator[dict[str, int]]:
    """Bytes that the forward pass inside keeps for backward, by part; each storage counts once, parameters not at all,
    nor the 16-bit copies that autocast makes of them.

    Activations that a fused operator saves are seen like any other. A storage belongs to the part that saved it first.

    Args:
        parts: part -> a regular expression that the names of its modules begin with.
        ignored: shapes of what is not to be counted.
        num_tokens: that the encoder will read: of few it keeps other things (``ConceptEncoder.keep``).
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

    handles, silent = [], called_by_functions(model, num_tokens)
    for name, module in model.named_modules():
        part = part_of(name)
        if part is not None and name not in silent:
            handles.append(module.register_forward_pre_hook(lambda m, i, part=part: stack.append(part)))
            handles.append(module.register_forward_hook(lambda m, i, o: stack.pop() and None, always_call=True))
    try:
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            yield bytes_of
    finally:
        for handle in handles:
            handle.remove()


def called_by_functions(model: nn.Module, num_tokens: int) -> set[str]:
    """Names of modules whose parameters a function takes instead of calling them, unless they have a hook
    (``layers.is_plain``): what they would keep belongs to the module that they are a part of."""
    names = []
    for name, module in model.named_modules():
        parts = []
        if isinstance(module, Heads):
            parts = ["project", "bias", "norm"]
        elif isinstance(module, TokenRead):
            parts = ["value"]
        elif isinstance(module, ConceptEncoder) and module.has_plain_embeddings:
            parts = [] if module.kept_of_tokens(num_tokens) == "keys" else ["embed_tokens", "token_norm"]
        names += [f"{name}.{part}".lstrip(".") for part in parts]
    return set(names)


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
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return model(view) if kind == FULL else model(view=view).loss

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    def case() -> dict[str, Any]:
        step()  # creates the gradients and the moments
        with saved_by_part(model, num_tokens=view.encoder.num_tokens) as activations:
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
        gpu = watched(step, torch.device(device), num_tokens, seconds=1.0)
        return {
            "parameters": parameters, "gradients": parameters, "optimizer": moments,
            **{f"activations: {part}": size for part, size in activations.items()},
            "allocator_peak": total, **gpu,
        }  # fmt: skip

    return case


def run_case(kind: str, shape: Shape, num_tokens: int, num_concepts: int, device: str) -> dict[str, Any]:
    """One row of the table, from a fresh process; one that fails says how."""
    case = {"encoder": kind, "N": num_tokens, "C": num_concepts if kind == OURS else None}
    try:
        memory, result = resident_peak(
            f"{__name__}:training_case", kind=kind, shape=list(shape.__dict__.values()), num_tokens=num_tokens,
            num_concepts=num_concepts, device=device,
        )  # fmt: skip
    except RuntimeError as error:  # out of memory, say
        return {**case, "status": refusal(error).reason}
    kept = sum(size for name, size in result.items() if name.startswith("activations"))
    accounted = result["parameters"] + result["gradients"] + result["optimizer"] + kept
    peak = result.pop("allocator_peak")
    gpu = {name: result.pop(name) for name in GPU_FIGURES if name in result}
    resident = gpu.pop("memory_used_bytes", memory.peak_bytes if device == "cpu" else None)
    return {
        **case, **result, "temporary": max(0, peak - accounted), "allocator_peak": peak, "resident_peak": resident,
        **gpu, "status": MEASURED,
    }


def encoder_case(name: str, shape: Sequence[int], num_tokens: int, device: str) -> Callable[[], dict]:
    """Called in a fresh process: the call is forward and backward of one encoder of ``bench scaling``."""
    sizes, on = Shape(*shape), torch.device(device)
    build = encoders(sizes, on)[name](num_tokens)
    batch = make_batch(num_tokens, sizes.vocab_size, on)
    call = phase_call("train", *build(batch), on)
    return_free_pages()  # before, not after the short text, whose concepts and gradients the long one needs too
    phase_call("train", *build(make_batch(min(num_tokens, WARM_UP), sizes.vocab_size, on)), on)()

    def case() -> dict[str, Any]:
        start = time.process_time()
        peak = allocator_peak(call, on).extra_bytes if device == "cuda" else call()
        return {"tokens": batch.num_tokens, "peak": peak, "seconds": time.process_time() - start}

    return case


def run_encoder_case(name: str, shape: Shape, num_tokens: int, device: str) -> dict[str, Any]:
    """One row of the table of encoders, from a fresh process; one that fails says how."""
    case = {"encoder": name, "N": num_tokens}
    try:
        memory, result = resident_peak(
            f"{__name__}:encoder_case", name=name, shape=list(shape.__dict__.values()), num_tokens=num_tokens,
            device=device,
        )  # fmt: skip
    except RuntimeError as error:
        return {**case, "status": refusal(error).reason}
    peak, tokens = result["peak"] or memory.extra_bytes, result["tokens"]
    return {**case, "tokens": tokens, "peak": peak, "bytes_per_token": round(peak / tokens, 1),
            "us_per_token": round(result["seconds"] * 1e6 / tokens, 2), "status": MEASURED}  # fmt: skip


def told_of(row: dict[str, Any], column: str, in_words: Callable[[float], str]) -> str:
    return in_words(row[column]) if row["status"] == MEASURED else row["status"]


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


def snapshot(path: Path, shape: Shape, num_tokens: int, num_concepts: int) -> None:
    """A CUDA memory snapshot of one case, for pytorch.org/memory_viz."""
    torch.cuda.memory._record_memory_history()
    training_case(OURS, list(shape.__dict__.values()), num_tokens, num_concepts, "cuda")()
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)


def main(options: argparse.Namespace) -> int:
    """The command line."""
    options.device = device_named(options.device).type
    if options.min_tokens > options.max_tokens:
        raise InputError(f"--min-tokens: expected at most --max-tokens {options.max_tokens}, got {options.min_tokens}")
    if options.snapshot is not None and options.device != "cuda":
        raise InputError("--snapshot: torch records memory snapshots on CUDA only; run on a GPU or leave it out")
    lengths = [options.min_tokens]
    while lengths[-1] * 2 <= options.max_tokens:
        lengths.append(lengths[-1] * 2)
    shape = Shape.asked(options, lengths[-1])
    dtype = "float32" if options.device == "cpu" else "float32, autocast to bfloat16"
    stamp = {**environment(seed=0), "dtype": dtype, "width": options.width, "layers": options.layers}
    rows = rows_to_resume(options.out / "memory.json", stamp) if options.resume else []
    title = f"Memory of a training step: d={options.width}, {options.layers} layers, one text of N tokens, bytes"
    cases = [(OURS, n, c) for c in options.concepts for n in lengths] + [(FULL, n, 0) for n in lengths]
    known = {(row["encoder"], row["N"], row["C"] or 0) for row in rows}
    for case in (case for case in cases if case not in known):
        rows.append(run_case(case[0], shape, *case[1:], options.device))
        write_results(options.out, "memory", rows, stamp, title=title)
        told = told_of(rows[-1], "allocator_peak", lambda size: f"peak {size / 2**20:.1f} MiB")
        print(f"{case[0]} N={case[1]} C={case[2] or '-'}: {told}", flush=True)
    of_encoders = rows_to_resume(options.out / "encoders.json", stamp) if options.resume else []
    done = {(row["encoder"], row["N"]) for row in of_encoders}
    for n, name in ((n, name) for n in options.encoder_tokens for name in ENCODERS if (name, n) not in done):
        longest = Shape.asked(options, n)
        of_encoders.append(run_encoder_case(name, longest, n, options.device))
        write_results(options.out, "encoders", of_encoders, stamp, title="Encoders: bytes a token")
        told = told_of(of_encoders[-1], "bytes_per_token", lambda size: f"{size:,.0f} bytes a token")
        print(f"encoder {name} N={n}: {told}", flush=True)
    checks = [check_prediction(rows, shape, c, options.fit, options.device) for c in options.concepts]
    write_results(options.out, "prediction", checks, stamp, title="Longest N that fits: predicted and checked")
    draw_memory(options.out)
    if options.snapshot is not None:
        snapshot(options.snapshot, shape, lengths[-1], options.concepts[0])
    print(markdown_table(checks, list(checks[0])))
    print(f"written to {options.out}")
    return 0


def check_prediction(rows: Sequence[dict], shape: Shape, num_concepts: int, limit_gib: float, device: str) -> dict:
    """Predicts the longest N for ``limit_gib``, runs it, and says how far the peak came from the limit."""
    known = [row for row in rows if (row["encoder"], row["C"]) == (OURS, num_concepts) and row["status"] == MEASURED]
    try:
        longest = longest_that_fits(known, int(limit_gib * GIB))
    except ValueError as error:
        return {"C": num_concepts, "limit_GiB": limit_gib, "predicted N": None, "measured_GiB": None,
                "status": f"not run: {error}"}  # fmt: skip
    row = run_case(OURS, shape, longest, num_concepts, device)
    measured = row["allocator_peak"] / GIB if row["status"] == MEASURED else None
    return {
        "C": num_concepts, "limit_GiB": limit_gib, "predicted N": longest,
        "measured_GiB": None if measured is None else round(measured, 4),
        "error_percent": None if measured is None else round(100 * (measured / limit_gib - 1), 2),
        "predicted from N": max(row["N"] for row in known), "status": row["status"],
    }  # fmt: skip
