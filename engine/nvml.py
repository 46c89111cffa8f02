"""What NVML says about a GPU while something runs: power, energy, clocks, throttling, memory."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch

THROTTLE = {  # NVML's bits; idle and an application's own clock setting are no throttling
    0x4: "power cap", 0x8: "hardware slowdown", 0x20: "thermal (software)", 0x40: "thermal (hardware)",
    0x80: "power brake",
}  # fmt: skip


class GpuMonitor(AbstractContextManager):
    """Samples one GPU from a thread for as long as the block runs; ``summary()`` afterwards.

    Energy is the difference of the driver's own counter (Volta and newer), not an integral of samples; the driver
    updates it every 20 to 100 ms, so a block of half a second is good to about a tenth.
    """

    def __init__(self, nvml: Any, handle: Any, interval_s: float = 0.05):
        self.nvml, self.handle, self.interval_s = nvml, handle, interval_s
        self.power_w: list[float] = []
        self.clock_mhz: list[int] = []
        self.used_bytes: list[int] = []
        self.reasons = 0
        self.sample()  # a GPU that does not answer one of the questions says so here
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)

    def __enter__(self) -> "GpuMonitor":
        for figures in (self.power_w, self.clock_mhz, self.used_bytes):
            figures.clear()
        self.reasons = 0
        self._start_mj, self._start_s = self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle), time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.energy_j = (self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) - self._start_mj) / 1e3
        self.seconds = time.perf_counter() - self._start_s

    def _run(self) -> None:
        while True:
            self.sample()
            if self._stop.wait(self.interval_s):
                return

    def sample(self) -> None:
        nvml, handle = self.nvml, self.handle
        self.power_w.append(nvml.nvmlDeviceGetPowerUsage(handle) / 1e3)
        self.clock_mhz.append(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
        self.used_bytes.append(nvml.nvmlDeviceGetMemoryInfo(handle).used)
        self.reasons |= nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)

    def reading(self) -> dict[str, Any]:
        """What it says now; power is the driver's mean over the last moments."""
        nvml, handle = self.nvml, self.handle
        return {
            "power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "sm_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "throttled": throttling(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)),
        }

    def summary(self, num_tokens: int = 0) -> dict[str, Any]:
        """Means and extremes of the samples; joules per million tokens when their number is given."""
        figures = {
            "power_w": sum(self.power_w) / len(self.power_w),
            "energy_j": self.energy_j,
            "sm_clock_mhz": sum(self.clock_mhz) / len(self.clock_mhz),
            "sm_clock_min_mhz": min(self.clock_mhz),
            "memory_used_bytes": max(self.used_bytes),
            "throttled": throttling(self.reasons),
        }
        if num_tokens:
            figures["joules_per_million_tokens"] = self.energy_j / num_tokens * 1e6
        return figures


class NoMonitor(AbstractContextManager):
    """Stands where nothing can be asked; the summary says why ("" on a CPU, which has no NVML)."""

    def __init__(self, reason: str = ""):
        self.reason = reason

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def reading(self) -> dict[str, Any]:
        return self.summary()

    def summary(self, num_tokens: int = 0) -> dict[str, Any]:
        return {"nvml": self.reason} if self.reason else {}


def throttling(reasons: int) -> str:
    return ", ".join(name for bit, name in THROTTLE.items() if reasons & bit) or "no"


def monitor_of(device: torch.device, nvml: Any = None) -> GpuMonitor | NoMonitor:
    """The monitor of a device: NVML counts GPUs that CUDA does not see, so the GPU is asked for by its UUID."""
    if device.type != "cuda":
        return NoMonitor()
    try:
        if nvml is None:
            import pynvml as nvml
    except ImportError:
        return NoMonitor("not installed: nvidia-ml-py")
    try:
        nvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return GpuMonitor(nvml, nvml.nvmlDeviceGetHandleByUUID("GPU-" + uuid.removeprefix("GPU-")))
    except nvml.NVMLError as error:
        return NoMonitor(f"{type(error).__name__}: {error}")


def watched(call: Callable[[], object], device: torch.device, num_tokens: int, seconds: float) -> dict[str, Any]:
    """NVML's figures of a call repeated for ``seconds`` (at least once); nothing on a CPU.

    ``num_tokens``: of one call.
    """
    monitor = monitor_of(device)
    if isinstance(monitor, NoMonitor):
        return monitor.summary()
    num_calls = 0
    torch.cuda.synchronize(device)
    with monitor:
        start = time.perf_counter()
        while num_calls == 0 or time.perf_counter() - start < seconds:
            call()
            num_calls += 1
            torch.cuda.synchronize(device)
    return monitor.summary(num_calls * num_tokens)
