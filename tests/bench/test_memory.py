import pytest
import torch
from torch import nn

from conceptron.bench.memory import FULL, OURS, longest_that_fits, make_model, make_view, saved_by_part, training_case
from conceptron.bench.nvml import GpuMonitor
from conceptron.bench.peers import Shape

TINY = Shape(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, vocab_size=256, max_tokens=512)


def test_prediction_is_the_line_through_the_last_two():
    rows = [{"N": n, "allocator_peak": 1000 + 7 * n} for n in (512, 1024, 2048)]
    rows[0]["allocator_peak"] = 1  # the constant part dominates short texts: they are not used
    assert longest_that_fits(rows, 1000 + 7 * 100_000) == 100_000
    with pytest.raises(ValueError, match="at least two"):
        longest_that_fits(rows[:1], 10)
    with pytest.raises(ValueError, match="does not grow"):
        longest_that_fits([{"N": 1, "allocator_peak": 5}, {"N": 2, "allocator_peak": 5}], 10)


def test_saved_bytes_are_counted_once_and_given_to_their_part():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(4, 4, bias=False), nn.Linear(4, 8, bias=False)

        def forward(self, x):
            return self.decoder(self.encoder(x))

    model, x = Model(), torch.randn(10, 4)
    with saved_by_part(model) as saved:
        model(x)
    assert saved["encoder"] == 10 * 4 * 4  # x, for the encoder's weight
    assert saved["decoder"] == 10 * 4 * 4  # its input; the weights themselves are parameters and do not count
    assert saved["other"] == 0


@pytest.mark.parametrize("kind", [OURS, FULL])
def test_a_case_accounts_for_its_peak(kind):
    result = training_case(kind, list(TINY.__dict__.values()), 128, 16, "cpu")()
    model = make_model(kind, TINY, 16)
    assert result["parameters"] == sum(p.nbytes for p in model.parameters()) == result["gradients"]
    assert result["optimizer"] == pytest.approx(2 * result["parameters"], rel=0.01)  # two moments, and step counts
    kept = sum(size for name, size in result.items() if name.startswith("activations"))
    assert kept > 0
    assert result["allocator_peak"] > result["parameters"] + result["optimizer"] + result["gradients"]


def test_both_models_answer_the_same_targets():
    view = make_view(128, 256, "drop")
    losses = [make_model(OURS, TINY, 16)(view=view).loss, make_model(FULL, TINY, 16)(make_view(128, 256, "mask"))]
    for loss in losses:  # untrained: near the weighted loss of a uniform guess
        assert torch.isfinite(loss)
    assert torch.equal(view.targets, make_view(128, 256, "mask").targets)


class FakeNvml:
    """Answers like pynvml: a counter of energy that grows by 5 J a reading, 100 W, a power cap."""

    NVML_CLOCK_SM = 1

    def __init__(self):
        self.energy_mj = 0

    def nvmlInit(self):
        return None

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

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


def test_gpu_monitor_reads_power_energy_clocks_and_throttling():
    with GpuMonitor(0, interval_s=0.001, nvml=FakeNvml()) as monitor:
        pass
    assert monitor.summary(num_tokens=2_000_000) == {
        "power_w": 100.0, "energy_j": 5.0, "sm_clock_mhz": 1500.0, "sm_clock_min_mhz": 1500, "memory_used_bytes": 7,
        "throttled": "power cap", "joules_per_million_tokens": 2.5,
    }  # fmt: skip
