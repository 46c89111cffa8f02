"""Recipe -> DeepSpeed. The only place that knows DeepSpeed's keys."""

from typing import Any

import torch
from torch import nn

from . import compat
from .recipe.schema import Training

BUCKET_NUMEL = 48_000 * 1024  # elements reduced in one call; DeepSpeed's own default reserves 2 GB at 4 bytes each


def deepspeed_config(recipe: Training, num_parameters: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given.

    - Batches are ours: DeepSpeed is told 1 and 1, the trainer says which micro-batch is a step's last, and the loss
      already carries the global divisor. `train_batch_size` stays out, DeepSpeed derives it.
    - `bf16` is `torch_autocast`: compute in bfloat16; weights, gradients, their accumulation and AdamW's moments in
      float32. DeepSpeed's `bf16.enabled` would accumulate gradients in bfloat16. No module is listed as safe for
      lower-precision communication, so gradients are also reduced in float32.
    - The stage is 1 to 3. With 0, a NaN gradient would reach the weights.
    - The optimizer is torch's AdamW, which DeepSpeed calls untested; its own would compile an extension first. So it is
      where the update runs on the host: torch's fused AdamW is as fast there, and there is nothing to build.
    - Muon needs whole gradients, and its clipping is ours (`muon.py`).
    """
    if recipe.train.precision == "auto":
        raise RuntimeError("train.precision: expected what `precision.settled` makes of auto")
    bucket = min(BUCKET_NUMEL, -(-num_parameters // 1024) * 1024)  # it must be even
    zero: dict[str, Any] = {"stage": recipe.zero.stage, "reduce_bucket_size": bucket, "overlap_comm": False}
    if recipe.zero.stage < 3 and not compat.uses_cuda():
        zero["contiguous_gradients"] = False  # on a CPU their copies into one buffer are a part of every step
    if recipe.zero.stage < 3:
        zero["allgather_bucket_size"] = bucket
    else:
        zero["stage3_prefetch_bucket_size"] = bucket
    if recipe.optim.muon is not None:
        zero["reduce_scatter"] = False
    host = {"device": "cpu", "pin_memory": compat.uses_cuda()}
    if recipe.zero.offload is not None:
        zero["offload_optimizer"] = host
    if recipe.zero.offload == "parameters":
        zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.optim.clip if recipe.optim.muon is None else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": recipe.train.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": None,
    }


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Training) -> Any:
    """A DeepSpeed engine around a model whose weights are already in place. Needs a process group (`launch.py`)."""
    import deepspeed

    compat.plain_muon()
    num_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(recipe, num_parameters), dist_init_required=False
    )
    compat.spare_reduction(engine)
    return engine
