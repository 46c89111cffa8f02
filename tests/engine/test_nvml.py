import pytest
import torch

from conceptron.engine import nvml as module
from conceptron.engine.nvml import GpuMonitor, NoMonitor, monitor_of, watched


class FakeNvml:
    """Answers like pynvml: a counter of energy that grows by 5 J a reading, 100 W, a power cap."""

    NVML_CLOCK_SM = 1

    class NVMLError(Exception):
        pass

    def __init__(self):
        self.energy_mj = 0

    def nvmlInit(self):
        return None

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-0123"
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self.energy_mj += 5000
        return self.energy_mj

    def nvmlDeviceGetPowerUsage(self, handle):
        return 100_000

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return 1500

    def nvmlDeviceGetMemoryInfo(self, handle):
        return type("Info", (), {"used": 7})

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return 0x4 | 0x1  # power cap; idle, which is no throttling


@pytest.fixture
def gpu(monkeypatch):
    """A machine whose GPU is only asked for its UUID and waited for."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"uuid": "0123"}))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return torch.device("cuda", 0)


def test_monitor_reads_power_energy_clocks_and_throttling(gpu):
    monitor = monitor_of(gpu, FakeNvml())
    assert isinstance(monitor, GpuMonitor)
    with monitor:
        pass
    assert monitor.reading() == {"power_w": 100.0, "sm_clock_mhz": 1500, "throttled": "power cap"}
    assert monitor.summary(num_tokens=2_000_000) == {
        "power_w": 100.0, "energy_j": 5.0, "sm_clock_mhz": 1500.0, "sm_clock_min_mhz": 1500, "memory_used_bytes": 7,
        "throttled": "power cap", "joules_per_million_tokens": 2.5,
    }  # fmt: skip


def test_watched_repeats_the_call_and_divides_by_its_tokens(gpu, monkeypatch):
    calls, fake = [], FakeNvml()
    monkeypatch.setattr(module, "monitor_of", lambda device: monitor_of(device, fake))
    figures = watched(lambda: calls.append(1), gpu, num_tokens=1000, seconds=0.01)
    assert len(calls) > 1
    assert figures["joules_per_million_tokens"] == pytest.approx(5.0 / (1000 * len(calls)) * 1e6)
    calls.clear()
    watched(lambda: calls.append(1), gpu, num_tokens=1000, seconds=0.0)
    assert len(calls) == 1, "a call longer than the time is made once"


def test_what_cannot_be_asked_is_said(gpu, monkeypatch):
    class Old(FakeNvml):
        def nvmlDeviceGetTotalEnergyConsumption(self, handle):
            raise self.NVMLError("Not Supported")

    monitor = monitor_of(gpu, Old())
    assert isinstance(monitor, NoMonitor)
    with monitor:
        pass
    assert monitor.summary(10) == {"nvml": "NVMLError: Not Supported"}
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert monitor_of(gpu).summary() == {"nvml": "not installed: nvidia-ml-py"}
    assert watched(lambda: None, torch.device("cpu"), 1, 1.0) == {}, "a CPU has no such figures, and nothing is run"
