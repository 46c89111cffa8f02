"""Canaries: each fails when DeepSpeed has mended the fault, and then the work-around in compat.py can go."""

import inspect
import os
import sys
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from conceptron.engine import compat


def timeouts() -> set[timedelta]:
    return {group._get_backend(torch.device("cpu")).options._timeout for group in distributed_c10d._world.pg_map}


def test_canary_a_process_group_wants_a_compiled_extension():
    from deepspeed.comm.torch import TorchBackend, build_shm_op

    assert "build_shm_op()" in inspect.getsource(TorchBackend.__init__)
    compat.choose_accelerator()
    assert build_shm_op() is None


def test_canary_no_launcher_means_mpi(monkeypatch):
    """The fault behind `launch.world` making its own group of one."""
    from deepspeed.comm import comm

    class Asked(Exception):
        pass

    def discovery(**_):
        raise Asked

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(comm, "cdb", None)
    monkeypatch.setattr(comm, "mpi_discovery", discovery)
    with pytest.raises(Asked):
        comm.init_distributed("gloo")


def test_canary_zero_clones_groups_with_the_default_timeout(build):
    build()
    assert len(distributed_c10d._world.pg_map) > 1
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=77), dist.group.WORLD)
    assert len(timeouts()) > 1  # the clone does not follow
    compat.set_timeouts(55)
    assert timeouts() == {timedelta(seconds=55)}


def test_canary_stage_3_calls_deprecated_collectives(build, steps):
    if not hasattr(dist, "all_gather_single"):
        pytest.skip("this torch does not deprecate them yet")
    engine = build(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps(engine, 0, 1)
    assert any(issubclass(warning.category, FutureWarning) for warning in caught)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compat.quiet()
        steps(engine, 1, 2)
    assert not [warning for warning in caught if issubclass(warning.category, FutureWarning)]


def test_canary_skipped_steps_are_logged_to_standard_output():
    from deepspeed.utils import logger

    assert all(handler.stream is not sys.stderr for handler in logger.handlers)


def test_canary_groups_outlive_the_process_group():
    """torch's own destroy leaves DeepSpeed with a dead group."""
    from deepspeed.utils import groups

    from conceptron.engine.launching import launch

    assert groups._WORLD_GROUP is None
    with launch.world():
        import deepspeed

        deepspeed.init_distributed("gloo", dist_init_required=False)
        groups._clone_world_group()
        dist.destroy_process_group()
        assert groups._WORLD_GROUP is not None
        groups._release_process_group_references()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_canary_moments_of_the_second_group_are_not_found(build, steps):
    """The fault behind `compat.fragments`, stages 1 and 2."""
    from deepspeed.utils import safe_get_full_optimizer_state

    engine = build(1)
    steps(engine, 0, 1)
    in_second = engine.optimizer.bit16_groups[1][0]
    with pytest.raises(ValueError, match="exp_avg not found"):
        safe_get_full_optimizer_state(in_second, "exp_avg")


def test_canary_the_stage_3_setter_ignores_padding():
    """The fault behind `compat.fragments`, stage 3: `numel` elements are taken from `numel * rank` on, always."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    source = inspect.getsource(DeepSpeedZeroOptimizer_Stage3.set_full_hp_param)
    assert "fp32_opt_state_partition.numel() * my_rank" in source and "pad" not in source


def test_canary_a_rank_that_is_alone_reduces_its_gradients(build, steps, monkeypatch):
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    buckets, reduce = [], DeepSpeedZeroOptimizer.allreduce_bucket
    monkeypatch.setattr(
        DeepSpeedZeroOptimizer, "allreduce_bucket", lambda self, *a, **k: buckets.append(1) or reduce(self, *a, **k)
    )
    spared = build(1)
    without = steps(spared, 0, 3)
    assert not buckets
    plain = build(1)
    for parameter in plain.module.parameters():
        del parameter.ds_grad_is_ready
    assert steps(plain, 0, 3) == without
    assert buckets
    pairs = zip(spared.module.parameters(), plain.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_canary_the_launcher_ignores_sigterm_on_one_node():
    """test_launch.py shows what follows from it."""
    import deepspeed.launcher.runner as runner

    source = inspect.getsource(runner.main)
    condition = "    if args.launcher == PDSH_LAUNCHER and multi_node_exec:\n        signal.signal("
    assert condition in source and source.index("signal.signal(") > source.index(condition)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fragments_cover_every_parameter_once(build, steps, stage):
    engine = build(stage)
    steps(engine, 0, 1)
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in engine.module.named_parameters()}
    held = {name: 0 for name in sizes}
    for fragment in compat.fragments(engine):
        held[fragment.name] += fragment.numel
        assert fragment.of(fragment.flat).numel() == fragment.numel
        state = engine.optimizer.optimizer.state[fragment.flat]
        assert state["exp_avg"].shape == fragment.flat.shape
    assert held == sizes


@pytest.mark.parametrize("stage", [1, 3])
def test_fragments_are_the_parameters(build, steps, stage):
    engine = build(stage)
    steps(engine, 0, 1)
    whole = {name: compat.whole(parameter).flatten() for name, parameter in engine.module.named_parameters()}
    for fragment in compat.fragments(engine):
        part = whole[fragment.name][fragment.start : fragment.start + fragment.numel]
        assert torch.equal(fragment.of(fragment.flat), part)


def test_a_launcher_that_dies_is_noticed():
    assert compat.deepspeed_launcher() is None
    here = compat.Launcher(os.getppid(), compat._parent(os.getppid()))
    assert not compat.is_gone(here) and not compat.is_gone(None)
    assert compat.is_gone(here._replace(parent=here.parent + 1))
    assert compat.is_gone(here._replace(pid=here.pid + 1))
    assert compat._parent(os.getpid()) == os.getppid()


def test_canary_muon_is_compiled_as_it_is_imported(build):
    """Once here, in a process of its own elsewhere: a module is imported once."""
    from deepspeed.runtime import compiler

    build()
    from deepspeed.runtime.zero.muon import original_muon

    assert "@compiler.compile()" in inspect.getsource(original_muon) and compiler.compile() is torch.compile
    assert not hasattr(original_muon.muon_update, "_torchdynamo_orig_callable")
