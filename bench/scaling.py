"""Time and memory against N: the concept encoder beside full attention and beside a plain Perceiver.

    conceptron bench scaling [--max-tokens 16384] [--variants layer_kind=bixt ...] [--out runs/bench/scaling]

A case is a batch of two texts of N and 3N/4 tokens, through the encoder alone ("forward") or through forward and
backward of the mean square of its output ("train"). All share width, depth, heads, feed-forward width and vocabulary.

    concept             C = 128 for every N
    concept, from ids   the same, of whose tokens a training step keeps the ids only (``ConceptEncoder.keep``)
    concept, shared keys    with one projection to keys and values for all layers (``share_kv``)
    concept, keys kept  with the keys and values of every layer kept, as it was before layers read in chunks
    concept, C grows    C = 128 (N / 512)^(2/3): 512 / 128, 4096 / 512, 32768 / 2048
    full attention      BERT-like, SDPA, the padded batch with its mask
    full, no padding    the same encoder, one text after the other without a mask, its best case: SDPA's flash path
    local + full        ModernBERT-like, SDPA, the padded batch
    local + full, Llama UltraBERT-like, SDPA, the padded batch
    plain Perceiver     torch.nn.MultiheadAttention with a key padding mask, C = 128

With ``--backbone DIR`` three others instead, of the module in DIR with random weights:

    backbone, windows               the module, frozen, in windows of 256 under 128 concepts (`pretrain/read.yaml`)
    backbone, windows, all trained  the same, whose module is trained too
    backbone, full attention        the bare module on the padded batch, all trained, its table of positions longer

And always, when asked for:

    VARIANT             "concept" with the fields of ConceptConfig that it names: layer_kind=slot, num_token_layers=2;
                        and keep=keys, states or ids

On a GPU everything runs under autocast to bfloat16, and NVML's energy of a training step is reported. A call of three
seconds or more is timed once, beside the one whose memory is recorded. What would take too long or too much memory, as
its growth so far says, is not run, and its row says so. Rows are written after each length: ``--resume`` goes on.
"""

import argparse
import re
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

from ..engine.errors import InputError
from ..engine.nvml import watched
from ..models.backbone_config import inner_config
from ..models.config import ConceptConfig
from ..models.decisions import FIELDS
from ..models.encoder import ConceptEncoder
from ..models.packing import pack_padded
from ..models.token_source import KEEPS
from .figures.charts import draw_scaling
from .measure.allocator import observe
from .measure.backbone import described, in_windows, whole
from .measure.clock import device_named, own_stream
from .measure.environment import (
    environment,
)
from .measure.exponents import (
    FROM_IDS,
    FULL,
    GROWING,
    LLAMA,
    LOCAL,
    ON_BACKBONE,
    OURS,
    PEERS,
    PERCEIVER,
    PHASES,
    SHARED,
    UNPADDED,
    WHOLE_BACKBONE,
    WINDOWED_TRAINED,
    WITH_KEYS,
    Rows,
    fits,
    points,
    verdicts,
    write_tables,
)
from .measure.peers import Perceiver, Shape, bert, modernbert, ultrabert
from .measure.results import (
    cell,
    flatten,
    markdown_table,
    rows_to_resume,
    write_results,
)
from .measure.timing import (
    Refusal,
    Timing,
    compare,
    refusal,
)

NAMES = (OURS, FROM_IDS, SHARED, WITH_KEYS, GROWING, *PEERS)
TRANSFORMERS = {FULL: bert, LOCAL: modernbert, LLAMA: ultrabert}
NUM_CONCEPTS = 128
ONCE_S = 3.0  # a call this long is made once
GIB = 2**30


def grown_concepts(num_tokens: int) -> int:
    """C for "C grows": 128 (N / 512)^(2/3), to the nearest multiple of 32."""
    return max(32, 32 * round(NUM_CONCEPTS * (num_tokens / 512) ** (2 / 3) / 32))


def concepts_of(name: str, num_tokens: int) -> int | None:
    if name in (UNPADDED, WHOLE_BACKBONE, *TRANSFORMERS):
        return None
    return grown_concepts(num_tokens) if name == GROWING else NUM_CONCEPTS


class Batch(NamedTuple):
    input_ids: Tensor  # [2, N]
    attention_mask: Tensor  # [2, N]
    num_tokens: int  # that are not padding


def make_batch(num_tokens: int, vocab_size: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(num_tokens)
    input_ids = torch.randint(1, vocab_size, (2, num_tokens), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[1, 3 * num_tokens // 4 :] = 0
    return Batch((input_ids * mask).to(device), mask.to(device), int(mask.sum()))


Encode = Callable[[], Tensor]
Build = Callable[[Batch], tuple[nn.Module, Encode]]


def parse_variant(text: str) -> dict[str, Any]:
    """"num_token_layers=2,funnel=[0,1]" -> fields of ConceptConfig, and keep.

    Raises:
        ValueError: not of this form, or no field of ConceptConfig.
    """
    known, fields = {*FIELDS, "keep"}, {}
    for part in re.split(r",(?![^\[]*\])", text):  # not the commas of a list
        name, sign, value = part.partition("=")
        if not sign or name not in known:
            raise ValueError(f"{part!r}: expected field=value with a field of ConceptConfig")
        fields[name] = yaml.safe_load(value)
    return fields


def encoders(
    shape: Shape, device: torch.device, variants: Sequence[str] = (), backbone: dict[str, Any] | None = None
) -> dict[str, Callable[[int], Build]]:
    """name -> (N -> (batch -> (module, call))): the modules that do not depend on N are built once, when asked for.

    ``backbone``: ``ConceptConfig.backbone``, for ``ON_BACKBONE``.
    """

    ours_by_name = {
        OURS: {}, FROM_IDS: {"keep": "ids"}, SHARED: {"share_kv": shape.num_layers}, WITH_KEYS: {"keep": "keys"},
    }  # fmt: skip

    def concept(num_concepts: int, keep: str | None = None, **fields: Any) -> nn.Module:
        encoder = ConceptEncoder(ConceptConfig(**{
            "vocab_size": shape.vocab_size, "hidden_size": shape.hidden_size, "num_concepts": num_concepts,
            "num_hidden_layers": shape.num_layers, "num_attention_heads": shape.num_heads,
            "intermediate_size": shape.intermediate_size, **fields,
        })).to(device)  # fmt: skip
        encoder.keep = keep
        return encoder

    @cache
    def fixed(name: str) -> nn.Module:
        torch.manual_seed(0)
        if name == PERCEIVER:
            return Perceiver(shape, NUM_CONCEPTS).to(device)
        if name in TRANSFORMERS:
            return TRANSFORMERS[name](shape).to(device)
        if name == WHOLE_BACKBONE:
            return whole(backbone, shape.max_tokens).to(device)
        if name in ON_BACKBONE:
            return in_windows(backbone, NUM_CONCEPTS, "all" if name == WINDOWED_TRAINED else "none").to(device)
        return concept(NUM_CONCEPTS, **(ours_by_name[name] if name in ours_by_name else parse_variant(name)))

    def ours(module: nn.Module, batch: Batch) -> Encode:
        packed = pack_padded(batch.input_ids, batch.attention_mask)
        return lambda: module(packed=packed).last_hidden_state

    def padded(module: nn.Module, batch: Batch) -> Encode:
        def call() -> Tensor:
            out = module(batch.input_ids, attention_mask=batch.attention_mask)
            return out if isinstance(out, Tensor) else out.last_hidden_state

        return call

    def one_by_one(module: nn.Module, batch: Batch) -> Encode:
        texts = [ids[mask != 0][None] for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
        return lambda: torch.cat([module(text).last_hidden_state[0] for text in texts])

    def with_module(module: nn.Module, build: Callable[[nn.Module, Batch], Encode]) -> Build:
        return lambda batch: (module, build(module, batch))

    return {
        **{name: lambda n, name=name: with_module(fixed(name), padded if name == WHOLE_BACKBONE else ours)
           for name in (*ours_by_name, *variants, *ON_BACKBONE)},
        GROWING: lambda n: with_module(concept(grown_concepts(n)), ours),
        **{name: lambda n, name=name: with_module(fixed(name), padded) for name in TRANSFORMERS},
        UNPADDED: lambda n: with_module(fixed(FULL), one_by_one),
        PERCEIVER: lambda n: with_module(fixed(PERCEIVER), padded),
    }


def phase_call(phase: str, module: nn.Module, encode: Encode, device: torch.device) -> Callable[[], object]:
    half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def forward() -> Tensor:
        with half:
            return encode()

    def step() -> None:
        module.zero_grad(set_to_none=True)
        forward().float().square().mean().backward()

    return torch.no_grad()(forward) if phase == "forward" else step


def expected(rows: Rows, name: str, phase: str, quantity: str) -> float:
    """What twice the longest N so far will need: it grows as it grew last, at least in proportion; 0 if nothing ran."""
    _, values = points(rows, name, phase, quantity)
    if len(values) < 2:
        return 4 * values[-1] if values else 0.0
    return values[-1] * max(2.0, values[-1] / values[-2])


def too_much(rows: Rows, name: str, phase: str, limit_s: float, device: torch.device) -> str | None:
    """Why a case is not run, from the rows of shorter texts."""
    mine = [row for row in rows if (row["encoder"], row["phase"]) == (name, phase)]
    if mine and mine[-1]["time_ms"] is None:
        reason = mine[-1]["status"]
        return reason if reason.startswith("not run") else f"not run: N = {mine[-1]['N']} ended with {reason}"
    seconds, memory = (expected(rows, name, phase, quantity) for quantity in ("time_ms", "peak_bytes"))
    if seconds / 1e3 > limit_s:
        return f"not run: expected about {seconds / 1e3:.0f} s a call, limit {limit_s:.0f} s"
    free = free_bytes(device)
    if memory > 0.9 * free:
        return f"not run: expected about {memory / GIB:.1f} GiB, {free / GIB:.1f} GiB free"
    return None


def once(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def measure(
    shape: Shape, lengths: Sequence[int], device: torch.device, names: Sequence[str], *, budget_s: float,
    limit_s: float, watch_s: float = 0.5, earlier: Rows = (), save: Callable[[list[dict]], object] = len,
    report: Callable[[str], None] = print, backbone: dict[str, Any] | None = None,
) -> list[dict]:  # fmt: skip
    """One flat row for each encoder, phase and N; those that ``earlier`` holds are kept as they are.

    ``save`` gets all rows after each length and phase. An encoder that raises (out of memory, say) says what it raised.
    """
    builders = encoders(shape, device, [name for name in names if name not in (*NAMES, *ON_BACKBONE)], backbone)
    rows = [dict(row) for row in earlier]
    done = {(row["encoder"], row["phase"], row["N"]) for row in rows}
    for num_tokens in lengths:
        batch, built = make_batch(num_tokens, shape.vocab_size, device), {}
        for phase in PHASES:
            calls, results, peaks, seconds, extra = {}, {}, {}, {}, {}
            for name in (name for name in names if (name, phase, num_tokens) not in done):
                reason = too_much(rows, name, phase, limit_s, device)
                if reason is not None:
                    results[name] = Refusal(reason)
                    continue
                try:
                    built[name] = built.get(name) or builders[name](num_tokens)(batch)
                    call = phase_call(phase, *built[name], device)
                    seconds[name], memory = observe(call, device)
                    peaks[name] = memory.extra_bytes
                    if seconds[name] >= ONCE_S and torch.get_num_threads() > 1:  # where memory is recorded, some of
                        seconds[name] = once(call)  # what threads would do is done by one
                    built[name][0].zero_grad(set_to_none=True)
                except Exception as error:  # whatever an encoder raises is its result here
                    results[name] = refusal(error)
                    continue
                if seconds[name] >= ONCE_S:
                    results[name] = Timing(*[seconds[name] * 1e3] * 3, 1, "once")
                else:
                    calls[name] = call
            results |= compare(calls, device=device, budget_s=budget_s, min_rounds=3, max_rounds=20, known_s=seconds)
            if phase == "train":
                extra = {name: watched(call, device, batch.num_tokens, watch_s) for name, call in calls.items()}
            for name in (name for name in names if name in results):
                result = results[name]
                if name in built:
                    built[name][0].zero_grad(set_to_none=True)
                rows.append(flatten({
                    "encoder": name, "phase": phase, "N": num_tokens, "tokens": batch.num_tokens,
                    "C": concepts_of(name, num_tokens), "time_ms": result,
                    "us_per_token": result.median_ms * 1e3 / batch.num_tokens if isinstance(result, Timing) else None,
                    "peak_bytes": peaks.get(name) if isinstance(result, Timing) else None, **extra.get(name, {}),
                }))  # fmt: skip
            if results:
                save(rows)
                shown = (f"{name} {cell(r.median_ms) if isinstance(r, Timing) else '-'}" for name, r in results.items())
                report(f"N={num_tokens:>7} {phase:<7} ms: {'  '.join(shown)}")
    return rows


def main(options: argparse.Namespace) -> int:
    """The command line."""
    if options.min_tokens > options.max_tokens:
        raise InputError(f"--min-tokens: expected at most --max-tokens {options.max_tokens}, got {options.min_tokens}")
    known = NAMES if options.backbone is None else ON_BACKBONE
    names = list(known) if options.only is None else options.only
    for name in names:
        if name not in known:
            raise InputError(f"--only: there is no encoder {name!r}; there are {', '.join(known)}")
    try:
        for text in options.variants:
            fields = parse_variant(text)
            keep = fields.pop("keep", None)
            if keep not in (None, *KEEPS):
                raise ValueError(f"keep: expected one of {', '.join(KEEPS)}, got {keep!r}")
            ConceptConfig(**fields)
    except (TypeError, ValueError) as error:
        raise InputError(f"--variants: {error}") from error
    lengths = [options.min_tokens]
    while lengths[-1] * 2 <= options.max_tokens:
        lengths.append(lengths[-1] * 2)
    shape = Shape.asked(options, lengths[-1])
    device, backbone = device_named(options.device), None
    if options.backbone is not None:
        backbone = described(options.backbone)
        inner = inner_config(backbone)
        shape = Shape(inner.hidden_size, inner.num_hidden_layers, inner.num_attention_heads, 0,
                      min(shape.vocab_size, inner.vocab_size), lengths[-1])  # fmt: skip
    stamp = {**environment(seed=0), "dtype": "bfloat16 (autocast)" if device.type == "cuda" else "float32",
             "width": shape.hidden_size, "layers": shape.num_layers, "heads": shape.num_heads,
             **({"backbone": backbone["name"]} if backbone else {})}  # fmt: skip
    title = (f"Scaling: d={shape.hidden_size}, {shape.num_layers} layers, {shape.num_heads} heads, "
             "two texts of N and 3N/4 tokens")  # fmt: skip
    earlier = rows_to_resume(options.out / "scaling.json", stamp) if options.resume else []

    def save(rows: list[dict]) -> None:
        write_results(options.out, "scaling", rows, stamp, title=title)
        write_tables(options.out, rows, stamp)

    with own_stream(device):
        rows = measure(
            shape, lengths, device, [*names, *options.variants], budget_s=options.seconds,
            limit_s=options.limit, earlier=earlier, save=save, backbone=backbone,
        )  # fmt: skip
    draw_scaling(options.out)
    table = fits(rows)
    print(markdown_table(table, list(table[0])) if table else "one length only: nothing to fit")
    print("\n".join(verdicts(rows)))
    print(f"written to {options.out}")
    return 0
