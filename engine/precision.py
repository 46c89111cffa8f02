"""What `train.precision: auto` means on this machine, and what bf16 costs where it is emulated."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from . import compat
from .errors import InputError
from .launching.launch import World
from .recipe.reader import read_yaml
from .recipe.schema import Training

WIDE = 384  # of a CPU's model: from this width on its units for bfloat16 pay for the casts, below they do not
WIDE_READ = 256  # of one that is only read: there are no gradients to cast


def settled(recipe: Training, world: World) -> Training:
    """The recipe with fp32 or bf16 in place of auto: what its run was begun with, else what pays here. Collective.

    A GPU takes bf16 where it knows it. So does a CPU that has units for it (AMX, AVX512-BF16) and a model of at least
    ``WIDE``. A run that is resumed keeps what it had, wherever it goes on. An explicit bf16 that this CPU emulates
    is kept; one line says how slow that is.
    """
    return recipe.with_precision(world.first_then_share(lambda: decide(recipe, world.device.type)))


def decide(recipe: Training, device: str) -> str:
    wanted = recipe.train.precision
    if wanted == "auto":
        return begun_with(recipe) or ("bf16" if pays(recipe.model.get("hidden_size", WIDE), device) else "fp32")
    if wanted == "bf16" and device == "cpu" and not has_bf16(device):
        print(
            f"conceptron: warning: train.precision: this CPU has no units for bf16 and emulates it; a matrix product "
            f"takes {slowdown():.0f} times as long as in fp32. Use train.precision=auto",
            file=sys.stderr,
        )
    return wanted


def begun_with(recipe: Training) -> str | None:
    """The precision that the run in the recipe's folder has, if it is to be resumed."""
    file = recipe.path / "recipe.yaml"
    if recipe.resume == "never" or not file.is_file():
        return None
    try:
        found = read_yaml(file)["train"]["precision"]
    except (InputError, KeyError, TypeError):
        return None  # no recipe of a run: whoever opens the folder says so
    return found if found in ("fp32", "bf16") else None


def pays(width: int, device: str) -> bool:
    return has_bf16(device) and (device != "cpu" or width >= WIDE)


def reads_mixed(width: int, device: str) -> bool:
    """Whether a model of this width that is not trained multiplies in bfloat16."""
    return has_bf16(device) and width >= WIDE_READ


def has_bf16(device: str) -> bool:
    """Whether bfloat16 products run on units made for them."""
    if device == "cuda" and compat.uses_cuda():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def slowdown(rows: int = 256, width: int = 256) -> float:
    """Time of a bfloat16 product over that of a float32 one, the least of three each, measured now."""

    def least(dtype: torch.dtype) -> float:
        a, b = torch.randn(rows, width, dtype=dtype), torch.randn(width, width, dtype=dtype)
        return min(seconds(lambda: a @ b) for _ in range(3))

    return least(torch.bfloat16) / least(torch.float32)


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
