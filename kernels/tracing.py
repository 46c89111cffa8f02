"""What torch.compile asks of arguments before they meet an autograd.Function."""

from typing import Any

import torch
from torch import Tensor


def distinct(*arguments: Any) -> list[Any]:
    """The arguments, where every tensor has an identity of its own: one that comes again is a view of itself.

    While torch.compile traces only: it cannot trace an ``autograd.Function`` that is given one tensor twice (keys that
    are the values too), whose two gradients it could not tell apart. Those of views it adds up.
    """
    if not torch.compiler.is_compiling():
        return list(arguments)
    found: list[Any] = []
    for argument in arguments:
        is_known = isinstance(argument, Tensor) and any(argument is other for other in found)
        found.append(argument.view_as(argument) if is_known else argument)
    return found
