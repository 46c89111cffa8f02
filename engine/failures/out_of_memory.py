"""Out of memory, in one line: what was asked for, what is held, and which field to lower."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import LaunchError
from ..launching.launch import World
from ..meter import peak_memory_bytes
from ..recipe.schema import Training

REST = "activations and the rest"
ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMGT]iB)")
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class OutOfMemory:
    """Inside `with`, a lack of memory becomes one line. Every rank that meets it says so: others may not."""

    def __init__(self, recipe: Training, world: World) -> None:
        self.recipe, self.world = recipe, world
        self.trainer: Any = None  # a `Trainer`, once there is one

    def __enter__(self) -> "OutOfMemory":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not is_meant(error):
            return
        rank = f"rank {self.world.rank}: " * (self.world.size > 1)
        where, held, back = "while the model was built", {}, ""
        if self.trainer is not None:
            where, back = f"in step {self.trainer.progress.step + 1}", f"; {self.trainer.way_back('')}"
            held = with_rest(holdings(self.trainer), peak_memory_bytes(self.world.device))
        most = sorted(held, key=held.__getitem__, reverse=True)
        words = f"; held at most: {', '.join(f'{name} {in_gb(held[name])}' for name in most)}" if held else ""
        problem = f"{self.recipe.path}: {rank}out of memory {where}, asked for {asked(error)}{words}"
        raise LaunchError(f"{problem}; {advice(self.recipe, self.world, most)}{back}") from error


def is_meant(error: BaseException | None) -> bool:
    is_of_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or is_of_cpu


def holdings(trainer: Any) -> dict[str, int]:
    """Bytes of what a trainer knows it holds, the largest parameter apart."""
    module, zero = trainer.engine.module, trainer.engine.optimizer
    optimizer = zero.optimizer
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    masters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    weights = list(module.parameters())
    grads = [parameter.grad for parameter in (*weights, *masters)]
    grads += [grad for of_group in zero.averaged_gradients.values() for grad in of_group or ()]
    copy = trainer.writer.host.values() if trainer.world.device.type == "cpu" else []
    return {
        "weights": num_bytes([*weights, *masters]), "moments": num_bytes(moments), "gradients": num_bytes(grads),
        "the copy of a checkpoint": num_bytes(copy),
    }  # fmt: skip


def with_rest(held: dict[str, int], peak: int) -> dict[str, int]:
    """The same with what else there was at the fullest moment, without what is nothing."""
    held = {**held, REST: max(0, peak - sum(held.values()))}
    return {name: size for name, size in held.items() if size > 0}


def num_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Of the memory behind them, each piece once."""
    storages = {}
    for tensor in tensors:
        if tensor is not None:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def advice(recipe: Training, world: World, most: list[str]) -> str:
    """``most``: names of `holdings`, the largest first; none while the model is built."""
    if most and most[0] == REST:
        more = "" if recipe.train.recompute else ", or set train.recompute=true"
        return f"lower batch.micro_tokens ({recipe.batch.micro_tokens}){more}"
    if world.size > 1 and recipe.zero.stage < 3:
        return f"raise zero.stage ({recipe.zero.stage}), which divides more of it among ranks"
    if most and "the copy of a checkpoint" in most:
        return "set checkpoint.async=false, which keeps no copy, or lower model.hidden_size or model.num_hidden_layers"
    return "lower model.hidden_size or model.num_hidden_layers, or use more ranks with zero.stage=3"


def asked(error: BaseException | None) -> str:
    match = ASKED.search(str(error))
    return in_gb(float(match[1]) * UNITS[match[2]]) if match else "more"


def in_gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
