"""Runs the comparison: checks every provider against float64, times those that pass beside each other.

    conceptron bench kernels [OPERATOR ...] [--matrix cpu|anchor|wide] [--providers NAME ...] [--out runs/bench/kernels]

"error" is the largest difference to the oracle in float64 over all outputs and gradients, as a share of the largest
true value. A provider passes when it is no worse than three times plain torch in the same dtype (and a few units of
rounding). One that does not pass is timed, and marked; no speed-up over it is stated. One that is still compiling after
``--limit`` seconds (ours: ten times that) is not run, and says so.
"""

import argparse
import gc
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..figures.charts import draw_kernels
from ..measure.allocator import allocator_peak
from ..measure.ceilings import measure_ceilings
from ..measure.clock import device_named, num_cold_copies, own_stream
from ..measure.environment import environment
from ..measure.results import MEASURED, cell, flatten, markdown_table, rows_to_resume, write_results
from ..measure.roofline import Ceilings, Floor, work_of
from ..measure.timing import Refusal, Timing, compare, refusal
from .best import COLUMNS, best_peers
from .cases import Case, Inputs, lengths_of, make_inputs, oracle
from .matrix import MATRICES
from .providers import PROVIDERS, Prepared, Provider, Tensors, Unavailable, providers_of

OURS = ("conceptron", "conceptron (torch)")
SLACK = 3.0  # times the error of plain torch in the same dtype
MODES = ("forward", "backward", "both")


class Checked(NamedTuple):
    prepared: Prepared
    upstream: Tensors  # gradients of the outputs
    error: float


def results_of(prepared: Prepared, upstream: Tensors) -> Tensors:
    """Outputs and gradients in packed layout."""
    outputs = prepared.call()
    grads = torch.autograd.grad(outputs, prepared.leaves, upstream)
    return (*prepared.outputs(outputs), *prepared.grads(grads))


def upstream_of(prepared: Prepared, packed_upstream: Sequence[Tensor]) -> Tensors:
    """The same upstream gradients for every provider, in the layout of its outputs."""
    outputs = prepared.call()
    shaped = prepared.outputs(outputs)
    probes = [torch.zeros_like(x, requires_grad=True) for x in outputs]
    brought = prepared.outputs(tuple(probes))
    pairs = [(b, u.to(b.dtype)) for b, s, u in zip(brought, shaped, packed_upstream, strict=True)]
    return torch.autograd.grad([b for b, _ in pairs], probes, [u for _, u in pairs])


def draw_upstream(truth: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.ones_like(x) if x.ndim == 0 else torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
        for x in truth
    ]


def truth_of(inputs: Inputs) -> tuple[Tensors, list[Tensor]]:
    """Outputs and gradients of the oracle in float64, and the upstream gradients (of ``inputs``' own precision)."""
    exact = inputs.to(torch.float64)
    outputs = oracle(exact)
    upstream = [u.to(inputs.tensors[inputs.wanted[0]].dtype).double() for u in draw_upstream(outputs)]
    grads = torch.autograd.grad(outputs, [exact.tensors[name] for name in exact.wanted], upstream)
    return (*(x.detach() for x in outputs), *grads), upstream


def error_of(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Largest error over all tensors, each relative to its own largest true value; infinite for a NaN."""
    worst = 0.0
    for ours, exact in zip(results, truth, strict=True):
        size = float(exact.abs().max()) or 1.0
        error = float((ours.detach().double() - exact).abs().max()) / size
        worst = max(worst, error if error == error else float("inf"))
    return worst


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside the block when it takes longer. Main thread only, where there are such signals.

    A timer that runs already goes on afterwards.
    """

    def ring(signum: int, frame: Any) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    handler, start = signal.signal(signal.SIGALRM, ring), time.monotonic()
    left_s, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left_s:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, left_s - (time.monotonic() - start)))


def check(
    provider: Provider, inputs: Inputs, truth: Tensors, upstream: list[Tensor], limit_s: float = 60.0
) -> Checked | Refusal:
    """One untimed call of forward and backward, compilation included, against the truth."""
    try:
        with time_limit(limit_s):
            prepared = provider(inputs)
            shaped = upstream_of(prepared, upstream)
            return Checked(prepared, shaped, error_of(results_of(prepared, shaped), truth))
    except Unavailable as error:
        return Refusal(str(error))
    except Exception as error:  # whatever a peer raises is its result here
        return refusal(error)


def allowed_error(inputs: Inputs, truth: Tensors, upstream: list[Tensor], dtype: torch.dtype) -> float:
    """What plain torch in the same dtype gets wrong, times three, and a few units of rounding."""
    yardstick = check(PROVIDERS["eager"], inputs, truth, upstream)
    if isinstance(yardstick, Refusal):
        name = f"{inputs.case.operator} {inputs.case.label}"
        raise RuntimeError(f"{name}: plain torch, the yardstick, failed: {yardstick.reason}")
    return SLACK * yardstick.error + 4 * torch.finfo(dtype).eps


def floor_of(case: Case, mode: str, dtype: torch.dtype, ceilings: Ceilings) -> Floor:
    sizes = dict(case.sizes)
    if "N" in sizes:
        sizes["T"] = sum(lengths_of(case))
    return work_of(case.operator, mode, sizes, dtype.itemsize).floor(ceilings)


def calls_of(checked: Checked, mode: str) -> Callable[[], object]:
    prepared, upstream = checked.prepared, checked.upstream
    if mode == "forward":
        return torch.no_grad()(prepared.call)
    if mode == "both":
        return lambda: torch.autograd.grad(prepared.call(), prepared.leaves, upstream)
    outputs = prepared.call()
    return lambda: torch.autograd.grad(outputs, prepared.leaves, upstream, retain_graph=True)


def modes_of(case: Case) -> tuple[str, ...]:
    """A head may compute its gradients in its forward pass, so its backward alone means nothing."""
    return ("forward", "both") if case.operator == "linear_cross_entropy" else MODES


def run_case(
    case: Case, names: Sequence[str], dtype: torch.dtype, device: torch.device, ceilings: Ceilings,
    *, budget_s: float, limit_s: float = 60.0,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for each mode and provider."""
    torch._dynamo.reset()  # one function compiled for more than eight shapes would silently run eagerly
    inputs = make_inputs(case, dtype, device)
    truth, upstream = truth_of(inputs)
    allowed = allowed_error(inputs, truth, upstream, dtype)
    limit = {name: 10 * limit_s if name in OURS else limit_s for name in names}
    checked = {name: check(PROVIDERS[name], inputs, truth, upstream, limit[name]) for name in names}
    copies: dict[str, list[Checked]] = {}
    for name, result in checked.items():
        if isinstance(result, Checked):
            try:
                copies[name] = copied(name, result, inputs, num_copies(inputs, device))
            except Exception as error:  # whatever a peer raises is its result here
                checked[name] = refusal(error)
    rows = []
    for mode in modes_of(case):
        timings = time_mode(copies, mode, device, budget_s)
        floor = floor_of(case, mode, dtype, ceilings)
        fastest_ours = min(
            (timings[name].median_ms for name in OURS if name in timings and isinstance(timings[name], Timing)
             and checked[name].error <= allowed), default=None,
        )  # fmt: skip
        for name, result in checked.items():
            timing = result if isinstance(result, Refusal) else timings[name]
            row = {"operator": case.operator, "case": case.label, "mode": mode, "provider": name, "ms": timing}
            if isinstance(timing, Timing):
                passed = result.error <= allowed
                memory = allocator_peak(calls_of(result, mode), device).extra_bytes
                row |= {
                    "tflops": floor.flops / timing.median_ms / 1e9, "gb_s": floor.bytes / timing.median_ms / 1e6,
                    "share_of_floor": floor.share(timing.median_ms * 1e3), "bound": floor.bound,
                    "peak_mb": memory / 1e6, "error": result.error, "error_allowed": allowed, "accurate": passed,
                    "ours_is_faster_by": timing.median_ms / fastest_ours
                    if passed and fastest_ours and name not in OURS else None,
                }  # fmt: skip
            rows.append(row)
    del checked, copies, truth
    gc.collect()
    return rows


def num_copies(inputs: Inputs, device: torch.device) -> int:
    """Copies of the inputs to walk over, so that a GPU's L2 does not hold a call's own."""
    if device.type != "cuda":
        return 1
    return num_cold_copies(sum(x.numel() * x.element_size() for x in inputs.tensors.values()), limit=8)


def copied(name: str, checked: Checked, inputs: Inputs, num: int) -> list[Checked]:
    """The provider on ``num`` copies of the inputs, its own among them."""
    dtype = inputs.tensors[inputs.wanted[0]].dtype
    others = (PROVIDERS[name](inputs.to(dtype)) for _ in range(num - 1))  # gives the wanted tensors fresh storage
    return [checked, *(Checked(prepared, checked.upstream, checked.error) for prepared in others)]


def time_mode(
    copies: dict[str, list[Checked]], mode: str, device: torch.device, budget_s: float
) -> dict[str, Timing | Refusal]:
    """Every provider in one mode, beside the others."""
    calls, refused = {}, {}
    for name, instances in copies.items():
        try:
            calls[name] = [calls_of(each, mode) for each in instances]  # "backward" runs the forward pass here
        except Exception as error:  # whatever a peer raises is its result here
            refused[name] = refusal(error)
    return compare(calls, device=device, budget_s=budget_s) | refused


def main(options: argparse.Namespace) -> int:
    """The command line."""
    device = device_named(options.device)
    on_cuda = device.type == "cuda"
    dtype = getattr(torch, options.dtype or ("bfloat16" if on_cuda else "float32"))
    matrix = MATRICES[options.matrix or ("anchor" if on_cuda else "cpu")]()
    cases = [case for case in matrix if not options.operators or case.operator in options.operators]
    stamp = {**environment(seed=0), "dtype": str(dtype).removeprefix("torch.")}
    rows = rows_to_resume(options.out / "kernels.json", stamp) if options.resume else []
    ceilings = measure_ceilings(device, dtype)
    print(f"ceilings measured now: copy {ceilings.copy_gb_s:.0f} GB/s, matmul {ceilings.matmul_tflops:.2f} TF/s")
    done = {(row["operator"], row["case"]) for row in rows}
    with own_stream(device):
        for case in (case for case in cases if (case.operator, case.label) not in done):
            names = [n for n in providers_of(case.operator) if options.providers is None or n in options.providers]
            limits = {"budget_s": options.seconds, "limit_s": options.limit}
            new = run_case(case, names, dtype, device, ceilings, **limits)
            print(summary(new, case), flush=True)
            rows += [flatten(row) for row in new]
            write_results(options.out, "kernels", rows, {**stamp, **ceilings._asdict()},
                          title="Operators beside their peers", columns=COLUMNS)  # fmt: skip
    best = best_peers(rows)
    write_results(options.out, "best", best, {**stamp, **ceilings._asdict()}, title="Against the fastest accurate peer")
    draw_kernels(options.out, best)
    print(f"written to {options.out}")
    return 0


def summary(rows: Sequence[dict], case: Case) -> str:
    """The rows of one case as a short table: a line for each provider, its time in each mode."""
    lines = []
    mine = [row for row in rows if (row["operator"], row["case"]) == (case.operator, case.label)]
    for name in dict.fromkeys(row["provider"] for row in mine):
        line: dict[str, Any] = {f"{case.operator} {case.label}": name}
        for row in (row for row in mine if row["provider"] == name):
            ms = row["ms"]
            line[f"{row['mode']} ms"] = cell(ms.median_ms) if isinstance(ms, Timing) else None
            line["error"] = f"{row['error']:.1e}" if "error" in row else None
            said = ms.reason if isinstance(ms, Refusal) else MEASURED if row["accurate"] else "not accurate"
            line["status"] = said if line.get("status") in (None, MEASURED, said) else f"{line['status']}; {said}"
        lines.append(line)
    return markdown_table(lines, list(lines[0]))
