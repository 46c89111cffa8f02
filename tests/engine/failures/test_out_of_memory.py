"""What is said when memory ends; that it is said when it does is tested with processes of their own (test_watch.py)."""

import torch

from conceptron.engine.failures import out_of_memory
from conceptron.engine.failures.out_of_memory import REST, advice, asked, is_meant, num_bytes, with_rest
from conceptron.engine.launching.launch import World
from conceptron.engine.recipe.schema import Recipe

ALONE, PAIR = (World(0, 0, size, torch.device("cpu")) for size in (1, 2))


def recipe(**fields) -> Recipe:
    return Recipe.model_validate({"data": {}, "objective": {"name": "mlm"}, "train": {"steps": 1}} | fields)


def test_what_both_devices_say_is_understood():
    of_gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139")
    of_cpu = RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried "
                          "to allocate 36000000 bytes. Error code 12 (Cannot allocate memory)")  # fmt: skip
    assert all(map(is_meant, (of_gpu, of_cpu, MemoryError()))) and not is_meant(RuntimeError("shapes")) | is_meant(None)
    assert (asked(of_gpu), asked(of_cpu), asked(MemoryError())) == ("2.68 GB", "0.04 GB", "more")


def test_the_field_to_lower_follows_from_what_is_largest():
    small = recipe(batch={"micro_tokens": 512}, train={"steps": 1, "recompute": True})
    assert advice(recipe(), PAIR, [REST, "moments"]) == (
        "lower batch.micro_tokens (16384), or set train.recompute=true"
    )
    assert advice(small, ALONE, [REST]) == "lower batch.micro_tokens (512)"
    assert advice(recipe(), PAIR, ["moments", REST]).startswith("raise zero.stage (1)")
    assert advice(recipe(zero={"stage": 3}), PAIR, ["weights"]).startswith("lower model.hidden_size")
    assert "checkpoint.async=false" in advice(recipe(), ALONE, ["moments", "the copy of a checkpoint"])


def test_memory_is_counted_once():
    whole = torch.zeros(100)
    assert num_bytes([whole[:50], whole[50:], None, torch.zeros(1)]) == 404
    assert with_rest({"weights": 3, "moments": 0}, 10) == {"weights": 3, REST: 7}
    assert out_of_memory.in_gb(2.5e6) == "2.50 MB"
