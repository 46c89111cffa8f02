"""torch.compile of the layers, once for every length."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as shapes

from ..models.decoder import ConceptDecoder
from ..models.encoder import ConceptEncoder
from . import compat
from .errors import InputError

BACKEND = "inductor"
DETERMINISTIC = {"deterministic": True}  # of it: no choice between kernels by the clock


def check_compiler(device: str) -> None:
    """
    Raises:
        InputError: what torch.compile makes for this kind of device could not be built here.
    """
    names = (os.environ.get("CXX"), "g++", "clang++") if device == "cpu" else (os.environ.get("CC"), "gcc", "clang")
    if not any(name and shutil.which(name) for name in names):
        wanted = "C++" if device == "cpu" else "C"
        raise InputError(f"train.compile: expected false without a {wanted} compiler; install g++, or leave it out")


def compile_layers(model: nn.Module, backend: Any = None) -> list[nn.Module]:
    """Compiles each layer of the encoder and of its tokens, and the decoder, in place; returns what is compiled.

    Layers of one kind share their code. In every tensor they are given, the first size counts texts, tokens or rows and
    is left open; the others are fixed. So there is one graph for all batches of two texts and more, and another for
    those of one, since torch.compile tells sizes of 0 and 1 from all others; likewise where all rows of a decoder with
    local mixing are one window. Batches without any text are not compiled.
    """
    shapes.use_duck_shape = False  # else as many texts as heads in the first batch would be a rule for all
    parts = list(compilable(model))
    for part in parts:
        compat.gather_as_one(part)
        part.forward = Compiled(part, backend or BACKEND)
    return parts


def compilable(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, ConceptEncoder):
            yield from (*module.layers, *module.token_layers)
        elif isinstance(module, ConceptDecoder):
            yield module


class Compiled:
    """What stands in for a module's ``forward``."""

    def __init__(self, module: nn.Module, backend: Any) -> None:
        self.plain, self.module = module.forward, module
        options = DETERMINISTIC if backend == "inductor" else None
        self.compiled = torch.compile(self.plain, dynamic=True, fullgraph=True, backend=backend, options=options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = list(tensors((args, kwargs)))
        if not self.module.training or any(tensor.shape[0] == 0 for tensor in given if tensor.ndim):
            return self.plain(*args, **kwargs)
        for tensor in given:
            for dim in range(1, tensor.ndim):
                torch._dynamo.mark_static(tensor, dim)
        return self.compiled(*args, **kwargs)


def tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor in tuples, lists, dictionaries, and what has fields of them."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from tensors(value)
    elif hasattr(tree, "__dataclass_fields__"):
        yield from tensors(vars(tree))
