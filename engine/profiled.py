"""What a few steps of a run spend their time and memory on: `profile.steps` leaves it in RUN/profile."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from .launching.launch import World

ROWS = 40  # of the table


class Profiled:
    """Records the steps ``first`` to ``last``, counted from 1, of this rank. Nothing at all without them.

        trace-00000.json     a Chrome trace of rank 0, for chrome://tracing or ui.perfetto.dev
        table-00000.txt      its operators, longest first
        memory-00000.pickle  on a GPU: what was allocated, where, for pytorch.org/memory_viz
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, world: World) -> None:
        self.first, self.last = steps or (0, 0)
        self.folder, self.world = folder, world
        self.on_cuda = world.device.type == "cuda"
        self.recorder: profile | None = None

    def begin(self, step: int) -> None:
        if step != self.first:
            return
        if self.on_cuda:
            torch.cuda.memory._record_memory_history()
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self.on_cuda]
        self.recorder = profile(activities=activities, profile_memory=True)
        self.recorder.start()

    def end(self, step: int) -> Path | None:
        """The folder, when the last of the steps has been recorded."""
        if self.recorder is None or step < self.last:
            return None
        self.recorder.stop()
        self.folder.mkdir(exist_ok=True)
        name = f"{self.world.rank:05d}"
        self.recorder.export_chrome_trace(str(self.folder / f"trace-{name}.json"))
        by = "self_device_time_total" if self.on_cuda else "self_cpu_time_total"
        table = self.recorder.key_averages().table(sort_by=by, row_limit=ROWS)
        (self.folder / f"table-{name}.txt").write_text(table + "\n", encoding="utf-8")
        if self.on_cuda:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory-{name}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self.recorder = None
        return self.folder
