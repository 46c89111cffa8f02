"""Compiles every shipped kernel configuration, with or without a GPU, and checks what came out.

    conceptron kernels compile --arch sm_80,sm_90,sm_100,gfx942

The table shows, for each configuration and architecture, registers a thread, stack bytes a thread, spill instructions,
shared memory, matrix instructions by kind, and the seconds it took. A configuration fails when it keeps more than 64
bytes of stack a thread, needs more shared or tensor memory than the architecture has, more registers than a
multiprocessor has, has a matrix product without matrix instructions, or does not compile. Kernels are tuned for NVIDIA;
on gfx942 what does not compile or fit is listed as skipped, with the reason, and does not fail.

Measurements are kept under $XDG_CACHE_HOME/conceptron/compile, by kernel source, configuration and compiler version.
"""

import argparse
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from .build import Build

OPERATORS = (
    "concept_attention",
    "streamed_attention",
    "token_attention",
    "bixt_attention",
    "slot_attention",
    "linear_cross_entropy",
    "adaln",
)
SHARED_KB = {  # what one program may use
    "sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_103": 227, "sm_120": 99,
    "gfx942": 64, "gfx950": 160,
}  # fmt: skip
MAX_STACK_BYTES = 64
MAX_REGISTERS = 65536  # of one multiprocessor
MAX_TENSOR_COLUMNS = 512  # tensor memory of sm_100
MATRIX = re.compile(r"\b(HGMMA|IGMMA|QGMMA|UTC\w*MMA|HMMA|IMMA|DMMA|QMMA|OMMA)\b")  # longest names first
MATRIX_AMD = re.compile(r"\b(v_mfma|v_smfmac)_")
STORE_VERSION = 1  # of the measurements kept on disk


@dataclass(frozen=True)
class Row:
    """What one configuration became on one architecture."""

    name: str
    arch: str
    num_warps: int
    has_dot: bool
    registers: int = 0
    stack_bytes: int = 0
    spills: int = 0
    shared_bytes: int = 0
    tensor_columns: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    cached: bool = False
    error: str | None = None

    def failures(self) -> list[str]:
        if self.error is not None:
            return [f"does not compile: {self.error}"]
        found = []
        threads = self.num_warps * (64 if self.arch.startswith("gfx") else 32)
        if self.stack_bytes > MAX_STACK_BYTES:
            found.append(f"{self.stack_bytes} bytes of stack a thread, more than {MAX_STACK_BYTES}")
        if self.shared_bytes > SHARED_KB[self.arch] * 1024:
            found.append(f"{self.shared_bytes} bytes of shared memory, more than {SHARED_KB[self.arch]} KB")
        if self.tensor_columns > MAX_TENSOR_COLUMNS:
            found.append(f"{self.tensor_columns} columns of tensor memory, more than {MAX_TENSOR_COLUMNS}")
        if not self.arch.startswith("gfx") and self.registers * threads > MAX_REGISTERS:
            found.append(f"{self.registers} registers x {threads} threads, more than {MAX_REGISTERS}")
        if self.has_dot and not self.matrix:
            found.append("a matrix product without matrix instructions")
        return found

    def line(self) -> str:
        if self.error is not None:
            return f"{self.name:<64} {self.arch:<7} does not compile"
        matrix = " ".join(f"{kind} {count}" for kind, count in sorted(self.matrix.items())) or "-"
        return (
            f"{self.name:<64} {self.arch:<7} {self.registers:>4} {self.stack_bytes:>6} {self.spills:>6} "
            f"{self.shared_bytes / 1024:>7.1f}  {matrix:<20} {self.seconds:>6.2f}"
        )


class Task(NamedTuple):
    """The build at ``index`` of what ``source`` lists, for one architecture."""

    source: str
    index: int
    build: Build
    arch: str


HEADER = f"{'operator/configuration':<64} {'arch':<7} {'regs':>4} {'stack':>6} {'spills':>6} {'smem KB':>7}"
HEADER += f"  {'matrix instructions':<20} {'s':>6}"


def load(source: str) -> list[Build]:
    """The builds of one operator, or of a Python file with a function ``builds()``."""
    if source.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(source).stem, source)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(f".{source}.library", __package__)
    return list(module.builds())


def wanted(build: Build, arch: str) -> bool:
    """``archs`` of a build names architectures or "cuda" or "hip"."""
    return build.archs is None or arch in build.archs or ("hip" if arch.startswith("gfx") else "cuda") in build.archs


def sampled(name: str, arch: str, every: int) -> bool:
    """True for about one configuration in ``every``, always the same ones, others on each architecture."""
    return int.from_bytes(hashlib.sha256(f"{arch} {name}".encode()).digest()[:8]) % every == 0


def target(arch: str):
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def compile_build(build: Build, arch: str) -> Row:
    """Compiles, or raises what the compiler raises."""
    import triton
    from triton import knobs
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    missing = [name for name in names if name not in build.signature]
    if missing:
        raise ValueError(f"the signature lacks {', '.join(missing)}")
    signature = {name: build.signature[name] for name in names}
    aligned = [
        i for i, name in enumerate(names)
        if signature[name].startswith("*") or (name in build.divisible and signature[name] != "constexpr")
    ]  # fmt: skip
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(build.kernel, signature, dict(build.constants), attributes)
    knobs.compilation.always_compile = True  # Triton's own cache would hide how long it takes
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, "enable_fp_fusion": True}
    start = time.perf_counter()
    kernel = triton.compile(source, target=target(arch), options=options)
    seconds = time.perf_counter() - start
    row = Row(
        build.name, arch, kernel.metadata.num_warps, build.has_dot, shared_bytes=kernel.metadata.shared,
        tensor_columns=getattr(kernel.metadata, "tmem_size", 0) or 0, seconds=seconds,
    )  # fmt: skip
    return replace(row, **(read_amd(kernel) if arch.startswith("gfx") else read_nvidia(kernel, build.has_dot)))


def read_nvidia(kernel, has_dot: bool) -> dict:
    """Registers, stack and instruction counts of the machine code, by the cuobjdump that Triton brings."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        tool = [knobs.nvidia.cuobjdump.path]
        usage = subprocess.run([*tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise RuntimeError("cuobjdump printed no registers")
        if not has_dot and found[2] == "0":  # no spills and no products: the slow disassembly would show nothing
            return {"registers": int(found[1])}
        code = subprocess.run([*tool, "-sass", cubin.name], capture_output=True, text=True, check=True).stdout
    if "EXIT" not in code:
        raise RuntimeError("cuobjdump printed no code")
    return {
        "registers": int(found[1]),
        "stack_bytes": int(found[2]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "matrix": dict(Counter(MATRIX.findall(code))),
    }


def read_amd(kernel) -> dict:
    code = kernel.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", code)
        if found is None:
            raise RuntimeError(f"the assembly does not tell {key}")
        return int(found[1])

    return {
        "registers": number("vgpr_count") + number("agpr_count"),
        "stack_bytes": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),
        "matrix": dict(Counter(MATRIX_AMD.findall(code))),
    }


def cache_path(build: Build, arch: str) -> Path:
    """Where the measurement of this very kernel, configuration and compiler is kept."""
    import triton
    from triton import knobs

    tools = [os.environ.get(name, "") for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")]
    identity = (
        STORE_VERSION, triton.__version__, knobs.nvidia.cuobjdump.path, *tools, arch, build.kernel.cache_key,
        sorted(build.signature.items()), sorted((key, repr(value)) for key, value in build.constants.items()),
        build.num_warps, build.num_stages, sorted(build.divisible),
    )  # fmt: skip
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "conceptron" / "compile" / f"{digest}.json"


def recall(build: Build, path: Path) -> Row | None:
    """The row of an earlier run."""
    if not path.exists():
        return None
    return replace(Row(**json.loads(path.read_text())), name=build.name, has_dot=build.has_dot, cached=True)


def measure(source: str, index: int, arch: str) -> Row:
    """One row, kept for later runs. Runs in a worker, which lists the builds again since a kernel does not travel."""
    build = load(source)[index]
    try:
        row = compile_build(build, arch)
    except Exception as error:  # whatever the compiler raises is this row's result
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        return Row(build.name, arch, build.num_warps, build.has_dot, error=f"{type(error).__name__}: {first}")
    path = cache_path(build, arch)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(asdict(row)))
    unfinished.replace(path)
    return row


def table(tasks: Sequence[Task], jobs: int, use_cache: bool) -> list[Row]:
    """Prints each row as it is known, in order."""
    known = [recall(task.build, cache_path(task.build, task.arch)) if use_cache else None for task in tasks]
    context = multiprocessing.get_context("fork")  # nothing but imports ran in this process: see main
    rows = []
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        pending = [
            None if row else pool.submit(measure, task.source, task.index, task.arch)
            for row, task in zip(known, tasks, strict=True)
        ]
        for row, future in zip(known, pending, strict=True):
            rows.append(row or future.result())
            print(rows[-1].line(), flush=True)
    return rows


def judge(rows: Sequence[Row], unreadable: Sequence[str] = ()) -> int:
    """Names what failed and what was skipped; the exit code."""
    failed = len(unreadable)
    for problem in unreadable:
        print(f"FAILED: {problem}")
    for row in rows:
        for failure in row.failures():
            word = "skipped" if row.arch.startswith("gfx") else "FAILED"
            failed += word == "FAILED"
            print(f"{word}: {row.name} on {row.arch}: {failure}")
    cached = sum(row.cached for row in rows)
    print(f"{len(rows)} compiled ({cached} read from the cache), {failed} failure{'' if failed == 1 else 's'}")
    return 1 if failed else 0


def main(options: argparse.Namespace) -> int:
    """The command line: 0 when every configuration is clean, 1 when one fails.

    The work is done by a fresh process: Triton's interpreter, chosen when Triton is imported, must be off, and workers
    are forked from a process that has done nothing but import.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "conceptron.kernels.compile", json.dumps(vars(options), default=str)]
    return subprocess.run(command, env=environment, check=False).returncode


def run(options: argparse.Namespace) -> int:
    tasks, unreadable = list_tasks(options)
    if not tasks and not unreadable:
        print(f"no configuration for {', '.join(options.arch)} has a name that contains {options.only!r}")
        return 1
    print(HEADER)
    rows = table(tasks, options.jobs, not options.no_cache)
    if options.json:
        entries = [{**asdict(row), "failures": row.failures()} for row in rows]
        Path(options.json).write_text(json.dumps(entries, indent=1))
    return judge(rows, unreadable)


def list_tasks(options: argparse.Namespace) -> tuple[list[Task], list[str]]:
    """All that is to be compiled, and what could not be listed."""
    builds, unreadable = {}, []
    for source in [options.builds] if options.builds else OPERATORS:
        try:
            builds[source] = load(source)
        except Exception as error:  # one broken operator must not hide the others' rows
            if options.only.split("/")[0] in source:
                unreadable.append(f"{source}: its builds cannot be listed: {type(error).__name__}: {error}")
    tasks = [
        Task(source, index, build, arch)
        for arch in options.arch
        for source, found in builds.items()
        for index, build in enumerate(found)
        if options.only in build.name and wanted(build, arch) and sampled(build.name, arch, options.sample)
    ]
    return tasks, unreadable


if __name__ == "__main__":
    sys.exit(run(argparse.Namespace(**json.loads(sys.argv[1]))))
