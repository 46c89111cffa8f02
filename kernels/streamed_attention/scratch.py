"""Memory that one thread writes its chunks' tensors to, again and again: fresh pages cost as much as the arithmetic."""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch(threading.local):
    """Tensors by name, of what was in them before. Each lives until the thread takes the same name again."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[*shape] in the dtype of ``like`` or another; fresh on a GPU, whose allocator keeps its pages."""
        dtype = dtype or like.dtype
        if like.is_cuda:
            return like.new_empty(shape, dtype=dtype)
        size, key = math.prod(shape), (name, dtype)
        held = self.held.get(key)
        if held is None or held.numel() < size:
            with torch.inference_mode(False):  # else nobody outside of it could write to them
                held = self.held[key] = torch.empty(size, dtype=dtype)
        return held[:size].view(shape)


scratch = Scratch()
