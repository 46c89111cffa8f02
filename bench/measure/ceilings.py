"""The two rates of a machine that every other figure is a share of, measured in the run that uses them."""

import torch

from ...engine.meter import best_seconds, matmul_flops
from .roofline import Ceilings


def copy_bytes(device: torch.device) -> float:
    """Bytes/s, read plus written, of a copy that no cache holds."""
    source = torch.empty((1 << 30) if device.type == "cuda" else (1 << 28), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.numel() / best_seconds(lambda: target.copy_(source), device)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    return Ceilings(copy_gb_s=copy_bytes(device) / 1e9, matmul_tflops=matmul_flops(device, dtype) / 1e12)
