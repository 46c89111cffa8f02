"""Pretrained models as token layers: transformers' own module, run over windows of the text, at linear cost.

B texts, T packed tokens, N tokens of one text, W windows of one call, L their longest, e width of the module's states.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel

from .backbone_config import CAUSAL, LAYERS, inner_config, layer_numbers
from .packing import Packed

LAST_NORMS = ("norm", "final_norm")  # what closes the last layer, where layers begin with a norm
CALL_TOKENS = 8192  # of one call of the module,
CPU_CALL_TOKENS = 4096  # and of one on a CPU, whose caches hold no more between two layers
CALL_SLACK = 8  # a window this much shorter than the longest, or an eighth, is padded rather than given its own call


class Windows(NamedTuple):
    """Where texts are cut: every window reads the rows ``start`` to ``start + length`` and answers for some of them."""

    starts: np.ndarray  # [n] int64, packed row
    lengths: np.ndarray  # [n] int64
    first: np.ndarray  # [n] int64, packed row from which on a state is taken from this window
    end: np.ndarray  # [n] int64, and up to which


def cut(lengths: np.ndarray, capacity: int, overlap: int) -> Windows:
    """Cuts texts [B] of N tokens into windows of at most ``capacity``, all windows of a text of one length.

    Neighbours share at least ``overlap`` tokens, and a shared token belongs to the window in which it is farther from
    the edge that both have there. Text without tokens has no window.
    """
    counts = np.where(lengths <= capacity, np.minimum(lengths, 1), -(-(lengths - overlap) // (capacity - overlap)))
    sizes = -(-(lengths + (counts - 1) * overlap) // np.maximum(counts, 1))
    n, size, count = (np.repeat(x, counts) for x in (lengths, sizes, counts))
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # within its text
    steps = np.maximum(count - 1, 1)
    starts, before = number * (n - size) // steps, (number - 1) * (n - size) // steps
    first = np.where(number == 0, 0, (starts + before + size) // 2)
    end = np.where(number == count - 1, n, np.append(first[1:], 0))
    text = np.repeat(np.cumsum(lengths) - lengths, counts)
    return Windows(text + starts, size, text + first, text + end)


def calls(lengths: np.ndarray, num_added: int, most: int = CALL_TOKENS) -> Iterator[np.ndarray]:
    """Windows that are computed at once: of about one length, longest first, ``most`` tokens with the added ones."""
    order = np.argsort(-lengths, kind="stable")
    begin = 0
    while begin < len(order):
        longest = int(lengths[order[begin]])
        room = max(1, most // (longest + num_added))
        shortest = longest - max(CALL_SLACK, longest // 8)
        part = order[begin : begin + room]
        part = part[lengths[part] >= shortest]
        yield part
        begin += len(part)


class Backbone(nn.Module):
    """The states of a pretrained module at every token [T, e], as its own ``last_hidden_state`` has them.

    A text is cut into windows of ``backbone_window`` tokens, the special tokens that the module's tokenizer adds to a
    text included; each window is a text of its own to the module, and the states of special tokens are dropped. Tokens
    that were deleted leave no gap. With ``backbone_layers`` the module has these of its layers only (0: none, its bare
    embeddings), and what follows its last layer. With ``backbone_bridges`` a linear map stands where layers were left
    out between others (``bridges.fit_bridges``).

    What is not trained (``backbone_train``) stays in evaluation mode; a module of which nothing is trained also builds
    no graph. Cost O(T * backbone_window). Windows are cut on the host: ``cu_seqlens`` is read back once.

    ``mean`` and ``scale`` say how states lie: (x - mean) / scale is centred and of mean square 1. They start as 0 and
    1; ``calibrate`` measures them.
    """

    def __init__(self, config):
        super().__init__()
        described = config.backbone
        inner = inner_config(described)
        inner.vocab_size = max(inner.vocab_size, config.vocab_size)  # a mask token may have been added
        numbers = layer_numbers(inner, config.backbone_layers)
        self.model = keep_layers(AutoModel.from_config(inner), numbers)
        self.prefix, self.suffix = tuple(described.get("prefix", ())), tuple(described.get("suffix", ()))
        self.capacity = config.backbone_window - len(self.prefix) - len(self.suffix)
        self.overlap, self.trained = config.backbone_overlap, config.backbone_train
        self.padding = inner.pad_token_id or 0
        self.options = {}
        if inner.model_type in CAUSAL:
            self.options = {"use_cache": False} | ({"is_causal": False} if config.backbone_two_sided else {})
        width = inner.hidden_size
        if config.backbone_bridges:
            for i, layer in enumerate(self.layers):
                if numbers[i] != (numbers[i - 1] + 1 if i else 0):
                    add_bridge(layer, width)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))
        self.freeze()
        self.train()  # a new module has dropout everywhere

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.get_submodule(LAYERS[self.model.config.model_type])

    @property
    def embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    @property
    def embeddings_name(self) -> str:
        """Of the table [V, e], under this module."""
        name = next(name for name, module in self.model.named_modules() if module is self.embeddings)
        return f"model.{name}.weight"

    def trained_parts(self) -> list[nn.Module]:
        if self.trained == "all":
            return [self.model]
        if self.trained == "none":
            return []
        layers = list(self.layers)[-int(self.trained.split()[1]) :]
        return layers + [getattr(self.model, name) for name in LAST_NORMS if hasattr(self.model, name)]

    def freeze(self) -> None:
        """Parameters that are not trained need no gradient."""
        self.model.requires_grad_(False)
        for part in self.trained_parts():
            part.requires_grad_(True)

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        self.model.eval()
        for part in self.trained_parts():
            part.train(mode)
        return self

    def forward(self, packed: Packed) -> Tensor:
        if packed.num_tokens == 0:
            return self.mean.new_zeros((0, self.mean.shape[0]))
        lengths = packed.cu_seqlens.diff().cpu().numpy().astype(np.int64)
        windows = cut(lengths, self.capacity, self.overlap)
        states, rows = [], []
        most = CPU_CALL_TOKENS if packed.input_ids.device.type == "cpu" else CALL_TOKENS
        with torch.no_grad() if self.trained == "none" else nullcontext():
            for part in calls(windows.lengths, len(self.prefix) + len(self.suffix), most):
                states.append(self.states_of(Windows(*(x[part] for x in windows)), packed.input_ids))
                rows.append(np.concatenate([np.arange(*bounds) for bounds in zip(*owned(windows, part), strict=True)]))
            order = torch.from_numpy(np.argsort(np.concatenate(rows), kind="stable"))
            return torch.cat(states)[order.to(packed.input_ids.device)]

    def states_of(self, windows: Windows, input_ids: Tensor) -> Tensor:
        """The states [n, e] of the tokens that these windows answer for, window by window."""
        device, W, longest = input_ids.device, len(windows.starts), int(windows.lengths.max())
        before, after = len(self.prefix), len(self.suffix)
        columns, length_W1 = np.arange(longest + before + after), windows.lengths[:, None]
        inside = (columns >= before) & (columns < before + length_W1)
        rows = np.where(inside, windows.starts[:, None] + columns - before, 0)
        added = np.full(rows.shape, self.padding, dtype=np.int64)
        added[:, :before] = self.prefix
        for i, token in enumerate(self.suffix):
            added[np.arange(W), before + windows.lengths + i] = token
        rows, inside, added = (torch.from_numpy(x).to(device) for x in (rows, inside, added))
        mask = None
        if windows.lengths.min() < longest:
            mask = torch.from_numpy((columns < before + after + length_W1).astype(np.int64)).to(device)
        ids_WL = torch.where(inside, input_ids[rows], added)
        states_WLe = self.model(input_ids=ids_WL, attention_mask=mask, **self.options).last_hidden_state
        taken = [
            np.arange(first, end) - start + before + i * len(columns)
            for i, (start, first, end) in enumerate(zip(windows.starts, windows.first, windows.end, strict=True))
        ]
        return states_WLe.flatten(0, 1)[torch.from_numpy(np.concatenate(taken)).to(device)]

    @torch.no_grad()
    def calibrate(self, packed: Packed) -> None:
        """Measures ``mean`` and ``scale`` on texts.

        Raises:
            ValueError: there is no token in them.
        """
        if packed.num_tokens == 0:
            raise ValueError("packed: expected texts with at least one token to measure states on, got none")
        was_training = self.training
        states = self.eval().forward(packed).double()
        self.train(was_training)
        mean = states.mean(0)
        self.mean.copy_(mean)
        self.scale.copy_((states - mean).square().mean().sqrt())

    def centred(self, states: Tensor) -> Tensor:
        """States [..., e] -> as they lie around zero, of mean square 1."""
        return (states.to(self.mean.dtype) - self.mean) / self.scale

    def restored(self, centred: Tensor) -> Tensor:
        """The inverse of ``centred``."""
        return centred * self.scale.to(centred.dtype) + self.mean.to(centred.dtype)


def owned(windows: Windows, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return windows.first[part], windows.end[part]


def add_bridge(layer: nn.Module, width: int) -> None:
    """x + bridge(x) comes into the layer instead of x."""
    layer.bridge = nn.Linear(width, width)
    nn.init.zeros_(layer.bridge.weight)
    nn.init.zeros_(layer.bridge.bias)
    layer.register_forward_pre_hook(crossed, with_kwargs=True)


def crossed(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return (args[0] + layer.bridge(args[0]), *args[1:]), kwargs
    states = kwargs["hidden_states"]
    return args, {**kwargs, "hidden_states": states + layer.bridge(states)}


def keep_layers(model: nn.Module, numbers: list[int]) -> nn.Module:
    """The module with these of its layers, and without a pooler, which reads no token."""
    inner, place = model.config, LAYERS[model.config.model_type]
    parent, _, name = place.rpartition(".")
    layers = model.get_submodule(place)
    setattr(model.get_submodule(parent), name, nn.ModuleList(layers[i] for i in numbers))
    inner.num_hidden_layers = len(numbers)
    if getattr(inner, "layer_types", None):
        inner.layer_types = [inner.layer_types[i] for i in numbers]
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model
