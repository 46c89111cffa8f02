"""What tests of several operators share."""

from collections.abc import Callable

import pytest
import torch


@pytest.fixture
def compiled_by() -> Callable:
    """Of the builds of the compile table: is this tile of a kernel, for these matrix units and this head width, one?"""
    from conceptron.kernels.splits import ARCHS  # here: tests/conftest.py decides about the interpreter first

    def of(builds):
        def compiled(kernel, units, block_d, config):
            launch = config["num_warps"], config["num_stages"]
            named = {key: value for key, value in config.items() if not key.startswith(("num_", "EVEN"))}
            tile = named | {"D": block_d}
            return any(
                (build.kernel, build.archs) == (kernel, ARCHS[units])
                and (build.num_warps, build.num_stages) == launch
                and tile.items() <= build.constants.items()
                for build in builds
            )

        return compiled

    return of


@pytest.fixture
def poison(monkeypatch):
    """Memory that a kernel asks for comes as NaN, so that a cell it forgets shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
