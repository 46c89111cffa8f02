"""The two rates of a machine that every other figure is a share of, measured in the run that uses them."""

import time

import torch

from .roofline import Ceilings


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(call, device: torch.device, repeats: int = 10) -> float:
    """The shortest of ``repeats`` calls, after one that is not counted."""
    call()
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large square product."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / best_seconds(lambda: torch.mm(a, a), device)


def copy_bytes(device: torch.device) -> float:
    """Bytes/s, read plus written, of a copy that no cache holds."""
    source = torch.empty((1 << 30) if device.type == "cuda" else (1 << 28), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.numel() / best_seconds(lambda: target.copy_(source), device)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    return Ceilings(copy_gb_s=copy_bytes(device) / 1e9, matmul_tflops=matmul_flops(device, dtype) / 1e12)
