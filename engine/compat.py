"""Every DeepSpeed work-around in one place. `tests/engine/test_compat.py` holds a canary for each: a test that fails
when upstream has mended the fault, so that the work-around can go.

Seen with DeepSpeed 0.19.8; `pyproject.toml` allows no 0.20.
"""

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


def uses_cuda() -> bool:
    """DS_ACCELERATOR=cpu, DeepSpeed's own variable, keeps a run off the GPU."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def choose_accelerator() -> None:
    """Faults: without a GPU, DeepSpeed warns about it on every start, and the first process group compiles a
    shared-memory extension (over a minute; the run dies where there is no compiler) that only inference uses.

    To DeepSpeed no extension is then compatible, and it need not run the compiler to find out. Must run before
    DeepSpeed sees a process group.
    """
    if uses_cuda():
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}


def quiet() -> None:
    """Faults: ZeRO-3 calls collectives by names that torch 2.13 deprecates, one warning per rank and call site; and
    DeepSpeed logs to standard output, such as every step that it skips, which the trainer reports itself."""
    import deepspeed.utils

    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed(\.|$)")


def destroy_process_group() -> None:
    """Fault: DeepSpeed keeps references to groups that torch destroys, and the next `deepspeed.initialize` of the same
    process fails on them. Its own function drops them, but works only after a `deepspeed.initialize`."""
    import deepspeed.comm

    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    else:
        torch.distributed.destroy_process_group()


def set_timeouts(seconds: float) -> None:
    """Fault: ZeRO clones the process group with the default timeout, whatever was asked for, so a rank that hangs holds
    the others for 10 to 30 minutes. Sets the timeout of every group that exists now."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


class Launcher(NamedTuple):
    pid: int
    parent: int


def deepspeed_launcher() -> Launcher | None:
    """Fault: on one node, `deepspeed` dies of a SIGTERM but leaves its inner launcher and all ranks training.

    Returns the inner launcher and who started it, to be watched by `is_gone`; None under any other launcher.
    """
    pid = os.getppid()
    command = Path(f"/proc/{pid}/cmdline")
    if not command.exists() or b"deepspeed.launcher.launch" not in command.read_bytes():
        return None
    return Launcher(pid, _parent(pid))


def is_gone(launcher: Launcher | None) -> bool:
    return launcher is not None and (os.getppid() != launcher.pid or _parent(launcher.pid) != launcher.parent)


def _parent(pid: int) -> int:
    try:
        # the command's name, in brackets, may hold anything; the parent is the second field after it
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def once_per_engine(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What does not change while an engine lives is found once: to walk through a module with a dozen layers takes
    half a millisecond, in every step."""
    known: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    @functools.wraps(find)
    def found(engine: Any) -> Any:
        if engine not in known:
            known[engine] = find(engine)
        return known[engine]

    return found


@once_per_engine
def names_of(engine: Any) -> dict[int, str]:
    """id(parameter) -> name. An engine keeps the parameters that it was given."""
    return {id(parameter): name for name, parameter in engine.module.named_parameters()}


class Fragment(NamedTuple):
    """The part of one parameter whose float32 master weights and moments this rank holds."""

    name: str
    start: int  # first element, counted in the flattened parameter
    numel: int
    flat: Tensor  # the rank's flat float32 partition that holds it, the optimizer's own parameter
    offset: int  # first element, counted in `flat`

    def of(self, flat: Tensor) -> Tensor:
        """The fragment's range of any tensor laid out like `flat`; a view."""
        return flat.narrow(0, self.offset, self.numel)


def fragments(engine: Any) -> Iterator[Fragment]:
    """Which range of which parameter lies where on this rank, for ZeRO stage 1, 2 and 3.

    Faults of the public `safe_get/set_full_optimizer_state`: on stages 1 and 2 the moments of every parameter group but
    the first are "not found", because they are linked after the first group's first step; on stage 3 the setter reads
    beyond the end of a parameter whose size the world size does not divide.
    """
    zero, names = engine.optimizer, names_of(engine)
    if engine.zero_optimization_stage() < 3:
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            for parameter in group:
                if parameter._hp_mapping is not None:  # None: wholly on other ranks
                    here, there = parameter._hp_mapping.hp_fragment_address, parameter._hp_mapping.lp_fragment_address
                    yield Fragment(names[id(parameter)], there.start, there.numel, flat, here.start)
    else:
        for group in zero.fp16_groups:
            for parameter in group:
                index, offset, size = zero.grad_position[zero.get_param_id(parameter)]
                start = size * engine.global_rank
                numel = min(size, parameter.ds_numel - start)  # the last part is padded
                if numel > 0:
                    flat = zero.fp32_partitioned_groups_flat[index]
                    yield Fragment(names[id(parameter)], start, numel, flat, offset)


def partitions(engine: Any) -> list[Tensor]:
    """The flat float32 partitions that this rank updates, the optimizer's own parameters."""
    return list({id(fragment.flat): fragment.flat for fragment in fragments(engine)}.values())


def muon_groups(engine: Any) -> list[bool]:
    """Of each of the engine's groups of gradients, ``averaged_gradients``: whether Muon updates it."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        return [group.get("use_muon", False) for group in zero.optimizer.param_groups]
    return list(getattr(zero, "sub_groups_using_muon", [False] * len(zero.fp16_groups)))


def momenta(engine: Any) -> list[tuple[str, int, Tensor]]:
    """(parameter, first element, momentum from there on) of each matrix that this rank updates with Muon.

    Stages 1 and 2 need the momentum of whole matrices, also of those of which the rank holds a part only; stage 3
    gathers what it needs. Views of DeepSpeed's own buffers, which are made here where there has been no step yet.
    """
    zero, of_muon = engine.optimizer, muon_groups(engine)
    if not any(of_muon):
        return []
    if engine.zero_optimization_stage() == 3:
        own = [zero.fp32_partitioned_groups_flat[i] for i, is_muon in enumerate(of_muon) if is_muon]
        return [
            (part.name, part.start, part.of(zero.optimizer.state[part.flat]["momentum_buffer"]))
            for part in fragments(engine) if any(part.flat is flat for flat in own)
        ]  # fmt: skip
    names, found = names_of(engine), []
    for i, is_muon in enumerate(of_muon):
        parameters = zero.params_in_partition[i]
        if not is_muon or not parameters:
            continue
        flat, start = zero.single_partition_of_fp32_groups[i], 0
        buffer = zero._muon_momentum_buffer(parameters, i, flat.dtype, flat.device)
        for parameter in parameters:
            found.append((names[id(parameter)], 0, buffer.narrow(0, start, parameter.numel())))
            start += parameter.numel()
    return found


def muon_gradients(engine: Any) -> list[tuple[str, Tensor]]:
    """(name, gradient): this rank's parts of the gradients of matrices that Muon is about to take, before the step.

    Fault: on stages 1 and 2 they are gone by then, overwritten with the orthogonal update. What is left of them is the
    step of the momentum, m <- m + (1 - beta) * (g - m), which is staged until the step is known to be good.
    """
    zero, of_muon = engine.optimizer, muon_groups(engine)
    names = names_of(engine)
    if engine.zero_optimization_stage() == 3:
        return [
            (names[id(parameter)], gradient)
            for i, is_muon in enumerate(of_muon) if is_muon
            for parameter, gradient in zip(zero.fp16_groups[i], zero.averaged_gradients[i], strict=True)
        ]  # fmt: skip
    found = []
    parts = {fragment.name: fragment for fragment in fragments(engine)}
    for i, (staged, flat) in zero._muon_pending_momentum.items():
        before, beta = zero.optimizer.state[flat]["momentum_buffer"], zero.optimizer.param_groups[i]["momentum"]
        start = 0
        for parameter in zero.params_in_partition[i]:
            part = parts[names[id(parameter)]]
            where = slice(start + part.start, start + part.start + part.numel)
            found.append((part.name, before[where] + (staged[where] - before[where]) / (1 - beta)))
            start += parameter.numel()
    return found


def plain_muon() -> type[torch.optim.Optimizer]:
    """DeepSpeed's Muon. Fault: importing it, which stages 1 and 2 do in every run, wraps its functions in
    torch.compile: that alone imports a compiler, and to use them takes minutes on a CPU. Here they are as they are
    written, in a process that has called this before its first step."""
    from deepspeed.runtime import compiler

    wrap, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
    finally:
        compiler.compile = wrap
    return MuonWithAuxAdam


def spread(engine: Any) -> None:
    """Gives every rank's model what the partitions hold now, as after an update. Collective.

    Fault: DeepSpeed's own ``update_lp_params`` does so for stages 1 and 2 only; the rest is what its stage 3 does at
    the end of a step.
    """
    zero = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def gradient_norms(engine: Any) -> tuple[list[str], list[Tensor]] | None:
    """Names of the parameters of which this rank holds a part, and of each the norm of its part of the gradient [],
    averaged over ranks, before it is clipped. Between the last backward pass of a step and `engine.step`; None where an
    optimizer is offloaded, whose gradients are on their way to the host.

    There is no public way: `safe_get_full_grad` gathers each parameter by itself."""
    zero, known = engine.optimizer, names_of(engine)
    if getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False):
        return None
    stage, of_muon = engine.zero_optimization_stage(), muon_groups(engine)
    names, held = [], []
    if stage < 3 and any(of_muon):
        for name, gradient in muon_gradients(engine):
            names.append(name)
            held.append(gradient)
    groups = zero.fp16_groups if stage == 3 else zero.params_in_partition
    for i, group in enumerate(groups):
        if stage < 3 and of_muon[i]:
            continue
        parts = [part for part in zero.averaged_gradients[i] if not getattr(part, "_zero_padding", False)]
        names += [known[id(parameter)] for parameter in group]
        held += parts[: len(group)]  # of a rank that holds nothing there is a row of zeros
    return names, list(torch._foreach_norm(held)) if held else []


def whole(tensor: Tensor) -> Tensor:
    """A copy of a parameter or buffer on the CPU, gathered where ZeRO-3 has divided it. Collective on stage 3."""
    if not hasattr(tensor, "ds_id"):
        return tensor.detach().cpu().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().cpu().clone()


def gather_as_one(module: torch.nn.Module) -> None:
    """Makes ZeRO-3 gather a module's parameters before its forward pass, all that are inside. Fault: it gathers those
    of each module inside by hooks of that module, and torch.compile breaks its graph at every one of them."""
    from deepspeed.utils import set_z3_leaf_module

    set_z3_leaf_module(module, True)


def recompute_layers(model) -> None:
    """Gradient checkpointing, under the name that this transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def spare_reduction(engine: Any) -> None:
    """Fault: a rank that is alone copies all gradients into one buffer, "averages" it and copies them back. On stage 1
    the mark by which DeepSpeed tells gradients that are not to be reduced yet keeps them where they are."""
    is_alone = torch.distributed.get_world_size() == 1
    if is_alone and engine.zero_optimization_stage() == 1 and not engine.optimizer.cpu_offload:
        for parameter in engine.module.parameters():
            parameter.ds_grad_is_ready = False
