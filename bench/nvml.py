"""What NVML says about a GPU while something runs: power, energy, clocks, throttling, memory."""

import threading
import time
from types import TracebackType
from typing import Any

THROTTLE = {  # NVML's bits; idle and an application's own clock setting are no throttling
    0x4: "power cap", 0x8: "hardware slowdown", 0x20: "thermal (software)", 0x40: "thermal (hardware)",
    0x80: "power brake",
}  # fmt: skip


class GpuMonitor:
    """Samples one GPU from a thread for as long as the block runs; ``summary()`` afterwards.

    Needs nvidia-ml-py. Energy is the difference of the driver's own counter (Volta and newer), not an integral of
    samples.
    """

    def __init__(self, index: int = 0, interval_s: float = 0.05, nvml: Any = None):
        if nvml is None:
            import pynvml as nvml
        self.nvml, self.interval_s = nvml, interval_s
        nvml.nvmlInit()
        self.handle = nvml.nvmlDeviceGetHandleByIndex(index)
        self.power_w: list[float] = []
        self.clock_mhz: list[int] = []
        self.used_bytes: list[int] = []
        self.reasons = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)

    def __enter__(self) -> "GpuMonitor":
        self._start_mj, self._start_s = self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle), time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.energy_j = (self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) - self._start_mj) / 1e3
        self.seconds = time.perf_counter() - self._start_s

    def _run(self) -> None:
        nvml = self.nvml
        while True:
            self.power_w.append(nvml.nvmlDeviceGetPowerUsage(self.handle) / 1e3)
            self.clock_mhz.append(nvml.nvmlDeviceGetClockInfo(self.handle, nvml.NVML_CLOCK_SM))
            self.used_bytes.append(nvml.nvmlDeviceGetMemoryInfo(self.handle).used)
            self.reasons |= nvml.nvmlDeviceGetCurrentClocksEventReasons(self.handle)
            if self._stop.wait(self.interval_s):
                return

    def summary(self, num_tokens: int = 0) -> dict[str, Any]:
        """Means and extremes of the samples; joules per million tokens when their number is given."""
        figures = {
            "power_w": sum(self.power_w) / len(self.power_w),
            "energy_j": self.energy_j,
            "sm_clock_mhz": sum(self.clock_mhz) / len(self.clock_mhz),
            "sm_clock_min_mhz": min(self.clock_mhz),
            "memory_used_bytes": max(self.used_bytes),
            "throttled": ", ".join(name for bit, name in THROTTLE.items() if self.reasons & bit) or "no",
        }
        if num_tokens:
            figures["joules_per_million_tokens"] = self.energy_j / num_tokens * 1e6
        return figures
