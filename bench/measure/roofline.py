"""The least time an operator can take: its unavoidable bytes and its matrix products against two measured ceilings.

    work = work_of("concept_attention", "backward", {"B": 64, "T": 64 * 512, "C": 128, "H": 8, "D": 64}, itemsize=2)
    floor = work.floor(Ceilings(copy_gb_s=4300, matmul_tflops=780))
    floor.us, floor.bound, floor.share(measured_us=61.0)

Bytes: every input read once and every result written once, whatever is kept between forward and backward among them.
Partial sums, recomputed reads and anything else an implementation adds are not counted. FLOPs: two for each
multiply-add of the matrix products, recomputation of the similarities in the backward pass among them (none of the
operators stores them); exponentials and sums are not counted. The tokens' part of the attention operators, for each
token (d = H * D, two bytes an element, Hkv = H):

    operator                 forward FLOPs, bytes      backward FLOPs, bytes
    concept_attention        4 C d    4 d   (K, V)                10 C d    8 d   (K, V, dK, dV)
    token_attention          4 C d    4 d   (Q, O)                10 C d    6 d   (Q, dO, dQ)
    bixt_attention           6 C d    6 d   (R, V, O)             14 C d   10 d   (R, V, dO, dR, dV)
    slot_attention           4 C d    4 d   (K, V)                10 C d    8 d   (K, V, dK, dV)
    adaln (plain)            -        4 d   (x, y)                -         6 d   (dy, x, dx)
    adaln (residual)         -        8 d   (x, branch, h, y)     -        12 d   (dy, dh, h, branch, dx, dbranch)

linear_cross_entropy has one product of 2 M V d FLOPs forward and two backward ("chunked", which also writes the M V
exponentials once and reads them twice), or three backward ("memory", which recomputes them).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

FLOAT32_BYTES = 4
MODES = ("forward", "backward", "both")


class Ceilings(NamedTuple):
    """What a device was measured to do: copying (bytes read plus bytes written), and large matrix products."""

    copy_gb_s: float
    matmul_tflops: float


@dataclass(frozen=True)
class Floor:
    """The two times below which no implementation can go."""

    bytes: int
    flops: int
    memory_us: float
    matmul_us: float

    @property
    def us(self) -> float:
        return max(self.memory_us, self.matmul_us)

    @property
    def bound(self) -> str:
        """Which of the two binds: "memory" or "matmul"."""
        return "matmul" if self.matmul_us > self.memory_us else "memory"

    def share(self, measured_us: float) -> float:
        """The floor as a share of a measured time: 1.0 is the limit, above it the measurement or a ceiling is wrong."""
        if not measured_us > 0:
            raise ValueError(f"measured_us: expected a positive time, got {measured_us}")
        return self.us / measured_us


@dataclass(frozen=True)
class Work:
    """Bytes by tensor, those read and those written, and the FLOPs of the matrix products."""

    traffic: Mapping[str, int]
    flops: int

    @property
    def bytes(self) -> int:
        return sum(self.traffic.values())

    def floor(self, ceilings: Ceilings) -> Floor:
        if min(ceilings) <= 0:
            raise ValueError(f"ceilings: expected positive rates, got {ceilings}")
        memory_us = self.bytes / ceilings.copy_gb_s / 1e3
        return Floor(self.bytes, self.flops, memory_us, self.flops / ceilings.matmul_tflops / 1e6)

    def __add__(self, other: "Work") -> "Work":
        """One after the other; tensors are told apart by their pass."""
        traffic = {f"{name} (first)": size for name, size in self.traffic.items()}
        traffic |= {f"{name} (second)": size for name, size in other.traffic.items()}
        return Work(traffic, self.flops + other.flops)


def tensors(itemsize: int, elements: Mapping[str, int]) -> dict[str, int]:
    return {name: itemsize * count for name, count in elements.items()}


def concept_attention(mode: str, s: Mapping[str, int], itemsize: int) -> Work:
    keys = s["T"] * s.get("Hkv", s["H"]) * s["D"]
    queries = s["B"] * s["C"] * s["H"] * s["D"]
    lse = {"lse": FLOAT32_BYTES * s["B"] * s["C"] * s["H"]}
    product = 2 * s["T"] * s["C"] * s["H"] * s["D"]
    if mode == "forward":
        return Work(tensors(itemsize, {"k": keys, "v": keys, "q": queries, "out": queries}) | lse, 2 * product)
    names = {"k": keys, "v": keys, "dk": keys, "dv": keys, "q": queries, "out": queries, "dout": queries, "dq": queries}
    return Work(tensors(itemsize, names) | lse, 5 * product)


def token_attention(mode: str, s: Mapping[str, int], itemsize: int) -> Work:
    queries = s["T"] * s["H"] * s["D"]
    keys = s["B"] * s["C"] * s.get("Hkv", s["H"]) * s["D"]
    product = 2 * s["T"] * s["C"] * s["H"] * s["D"]
    if mode == "forward":
        return Work(tensors(itemsize, {"q": queries, "out": queries, "k": keys, "v": keys}), 2 * product)
    names = {"q": queries, "dout": queries, "dq": queries, "k": keys, "v": keys, "dk": keys, "dv": keys}
    return Work(tensors(itemsize, names), 5 * product)


def bixt_attention(mode: str, s: Mapping[str, int], itemsize: int) -> Work:
    token, concept = s["T"] * s["H"] * s["D"], s["B"] * s["C"] * s["H"] * s["D"]
    lse = {"lse": FLOAT32_BYTES * s["B"] * s["C"] * s["H"]}
    product = 2 * s["T"] * s["C"] * s["H"] * s["D"]
    forward, backward = ("qk", "v", "out"), ("qk", "v", "dout", "dqk", "dv")
    names = {f"token_{name}": token for name in (forward if mode == "forward" else backward)}
    names |= {f"concept_{name}": concept for name in (forward if mode == "forward" else (*backward, "out"))}
    return Work(tensors(itemsize, names) | lse, (3 if mode == "forward" else 7) * product)


def slot_attention(mode: str, s: Mapping[str, int], itemsize: int) -> Work:
    keys, queries = s["T"] * s.get("Hkv", s["H"]) * s["D"], s["B"] * s["C"] * s["H"] * s["D"]
    mass = FLOAT32_BYTES * s["B"] * s["C"] * s["H"]
    product = 2 * s["T"] * s["C"] * s["H"] * s["D"]
    if mode == "forward":
        names = {"k": keys, "v": keys, "q": queries, "out": queries}
        return Work(tensors(itemsize, names) | {"mass": mass}, 2 * product)
    names = {"k": keys, "v": keys, "dk": keys, "dv": keys, "q": queries, "out": queries, "dout": queries, "dq": queries}
    return Work(tensors(itemsize, names) | {"mass": mass, "dmass": mass}, 5 * product)


def linear_cross_entropy(mode: str, s: Mapping[str, int], itemsize: int, method: str = "chunked") -> Work:
    if method not in ("chunked", "memory"):
        raise ValueError(f"method: expected 'chunked' or 'memory', got {method!r}")
    rows, weight = s["M"] * s["d"], s["V"] * s["d"]
    exponentials = s["M"] * s["V"] if method == "chunked" else 0
    product = 2 * s["M"] * s["V"] * s["d"]
    vectors = {"nll": FLOAT32_BYTES * s["M"], "targets": 8 * s["M"]}
    if mode == "forward":
        names = {"hidden": rows, "weight": weight, "exponentials": exponentials}
        return Work(tensors(itemsize, names) | vectors, product)
    names = {"hidden": rows, "weight": weight, "dhidden": rows, "dweight": weight, "exponentials": 2 * exponentials}
    return Work(tensors(itemsize, names) | vectors, (2 if method == "chunked" else 3) * product)


def adaln(mode: str, s: Mapping[str, int], itemsize: int, residual: bool = True) -> Work:
    rows, vectors = s["T"] * s["d"], s["B"] * s["d"]
    moments = {"mean, rstd": 2 * FLOAT32_BYTES * s["T"]}
    if mode == "forward":
        names = {"x": rows, "y": rows, "shift": vectors, "scale": vectors}
        names |= {"branch": rows, "h": rows, "gate": vectors} if residual else {}
    else:
        names = {"dy": rows, "x": rows, "dx": rows, "scale": vectors, "dshift": vectors, "dscale": vectors}
        if residual:  # "x" is h here
            names |= {"dh": rows, "branch": rows, "dbranch": rows, "gate": vectors, "dgate": vectors}
    return Work(tensors(itemsize, names) | moments, 0)


OPERATORS: dict[str, Callable[..., Work]] = {
    "concept_attention": concept_attention,
    "token_attention": token_attention,
    "bixt_attention": bixt_attention,
    "slot_attention": slot_attention,
    "linear_cross_entropy": linear_cross_entropy,
    "adaln": adaln,
}


def work_of(operator: str, mode: str, sizes: Mapping[str, int], itemsize: int, **options) -> Work:
    """The work of an operator in one pass, or of "both" one after the other.

    Args:
        operator: a key of OPERATORS.
        mode: "forward", "backward" or "both".
        sizes: B sequences, T packed tokens (or N in each), C concepts, H heads, Hkv key/value heads, D head width;
            M targets, V vocabulary, d width for linear_cross_entropy; B, T, d for adaln.
        itemsize: bytes an element.
        options: ``method`` of linear_cross_entropy, ``residual`` of adaln.
    """
    if operator not in OPERATORS:
        raise ValueError(f"operator: expected one of {', '.join(OPERATORS)}, got {operator!r}")
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    sizes = dict(sizes)
    if "T" not in sizes and "N" in sizes:
        sizes["T"] = sizes["B"] * sizes["N"]
    count = OPERATORS[operator]
    if mode == "both":
        return count("forward", sizes, itemsize, **options) + count("backward", sizes, itemsize, **options)
    return count(mode, sizes, itemsize, **options)
