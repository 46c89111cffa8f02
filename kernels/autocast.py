"""Autocast at the doors: the rule that torch applies to scaled_dot_product_attention and linear."""

import torch
from torch import Tensor


def lower_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts to the autocast dtype of the first tensor's device while autocast is on; float64 and integers stay."""
    if not tensors or not isinstance(tensors[0], Tensor):
        return tensors  # the door's checks name what is wrong
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        eligible = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    return tuple(cast(tensor) for tensor in tensors)
