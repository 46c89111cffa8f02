"""How many bytes of logits may live at once: CONCEPTRON_LCE_CHUNK_MB."""

import math
import os

VARIABLE = "CONCEPTRON_LCE_CHUNK_MB"
GPU_MB, CPU_MB = 256, 64  # a CPU keeps a smaller chunk nearer to its caches and has less to gain from a larger one


def chunk_megabytes(on_gpu: bool) -> float:
    """The budget in MB (2**20 bytes). 0 asks for the memory mode of the Triton backend, or the smallest torch chunk."""
    given = os.environ.get(VARIABLE)
    if given is None:
        return GPU_MB if on_gpu else CPU_MB
    try:
        megabytes = float(given)
    except ValueError:
        megabytes = -1.0
    if not 0 <= megabytes < math.inf:
        raise ValueError(f"{VARIABLE}: expected a number of megabytes, 0 or more, got {given!r}")
    return megabytes


def chunk_rows(num_rows: int, row_bytes: int, megabytes: float, multiple: int) -> int:
    """Rows per chunk: a multiple of ``multiple``, at least one, as many as the budget holds, evenly shared."""
    most = max(int(megabytes * 2**20) // row_bytes // multiple, 1) * multiple
    num_rows = max(num_rows, 1)
    num_chunks = -(-num_rows // most)
    return -(-num_rows // num_chunks // multiple) * multiple
