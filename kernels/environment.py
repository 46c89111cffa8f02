"""The variables of the environment that operators read, all at once: before a run, not in its first step."""

import torch

from .backend import choose
from .checks import thorough
from .linear_cross_entropy.budget import chunk_megabytes


def check_environment(device: torch.device) -> None:
    """Raises ValueError for the first of CONCEPTRON_BACKEND, CONCEPTRON_CHECK and CONCEPTRON_LCE_CHUNK_MB that holds
    what it cannot, or asks for what does not run on ``device``."""
    choose("auto", torch.empty(0, device=device))
    thorough()
    chunk_megabytes(on_gpu=device.type == "cuda")
