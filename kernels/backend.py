"""Which implementation an operator runs: chosen by device, never by trial."""

import importlib.util
import os

from torch import Tensor

BACKENDS = ("auto", "triton", "torch")


def interpreting() -> bool:
    """True when Triton runs in its interpreter, the only way in which it runs on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def choose(backend: str, tensor: Tensor) -> str:
    """Resolves ``backend`` for ``tensor``'s device to "triton" or "torch".

    "auto" reads ``CONCEPTRON_BACKEND`` if it is set; else it is "triton" on CUDA and "torch" elsewhere. An explicit
    choice, by argument or variable, runs or raises: nothing falls back.

    Raises:
        ValueError: an unknown name, or "triton" where Triton cannot run on this tensor.
    """
    source = "backend"
    if backend == "auto":
        backend = os.environ.get("CONCEPTRON_BACKEND", "auto")
        source = "CONCEPTRON_BACKEND"
    if backend not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        return "triton" if tensor.is_cuda else "torch"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            raise ValueError(f"{source}: 'triton' is not installed; install triton>=3.6 or use backend='torch'")
        if not tensor.is_cuda and not interpreting():
            raise ValueError(
                f"{source}: 'triton' needs CUDA tensors, got one on {tensor.device}; move the inputs to a GPU, use "
                "backend='torch', or set TRITON_INTERPRET=1 before Python starts to run the interpreter on the CPU"
            )
    return backend
