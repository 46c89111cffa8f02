"""Who runs each operator: ours, what one would write by hand, and the libraries that could be used instead.

A provider turns packed ``Inputs`` into a ``Prepared`` call in its own layout (padding done once, outside of the timed
call, since a padded model holds padded tensors), or raises ``Unavailable`` with the reason that its cell will show.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import kernels
from .cases import ADALN_EPS, SLOT_EPS, Inputs

Tensors = tuple[Tensor, ...]


class Unavailable(RuntimeError):
    """This provider cannot run this case here."""


class Prepared(NamedTuple):
    """``call`` reads ``leaves`` (in the order of ``Inputs.wanted``); the others bring results into packed layout."""

    call: Callable[[], Tensors]
    leaves: Tensors
    outputs: Callable[[Tensors], Tensors]
    grads: Callable[[Tensors], Tensors]


Provider = Callable[[Inputs], Prepared]


def same(tensors: Tensors) -> Tensors:
    return tensors


# --- ours -------------------------------------------------------------------------------------------------------------


def ours(backend: str) -> Provider:
    """Our door with an explicit backend."""

    def prepare(inputs: Inputs) -> Prepared:
        t, o, name = inputs.tensors, inputs.options, inputs.case.operator
        leaves = tuple(t[wanted] for wanted in inputs.wanted)
        if backend == "triton" and not leaves[0].is_cuda:
            raise Unavailable("needs a GPU")
        if name == "linear_cross_entropy":
            def call() -> Any:
                return kernels.linear_cross_entropy(
                    *leaves, t["targets"], token_weight=t["token_weight"], label_smoothing=o["label_smoothing"],
                    backend=backend,
                )  # fmt: skip
        elif name == "adaln":
            def call() -> Any:
                return kernels.adaln_residual_modulate(*leaves, t["cu_seqlens"], eps=ADALN_EPS, backend=backend)
        else:
            operator = getattr(kernels, name)

            def call() -> Any:
                return operator(*leaves, t["cu_seqlens"], o["max_seqlen"], backend=backend)

        return Prepared(lambda: as_tuple(call()), leaves, same, same)

    return prepare


def as_tuple(result: Any) -> Tensors:
    return result if isinstance(result, tuple) else (result,)


# --- padded layouts ---------------------------------------------------------------------------------------------------


def pad(x: Tensor, lengths: list[int]) -> Tensor:
    """[T, ...] -> [B, N, ...], zeros behind each sequence."""
    return torch.nn.utils.rnn.pad_sequence(list(x.detach().split(lengths)), batch_first=True)


def unpad(x: Tensor, lengths: list[int]) -> Tensor:
    """[B, N, ...] -> [T, ...]."""
    return torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)])


class Padded(NamedTuple):
    """The inputs as [B, H, rows, D] leaves and the mask [B, 1, 1, N] of real tokens (None: no padding)."""

    leaves: Tensors
    mask: Tensor | None
    packed: Callable[[str, Tensor], Tensor]  # brings a result of the layout of an input back


def padded(inputs: Inputs) -> Padded:
    lengths, is_token = inputs.options["lengths"], token_names(inputs)
    leaves = []
    for name in inputs.wanted:
        x = inputs.tensors[name]
        x = pad(x, lengths) if name in is_token else x.detach()
        leaves.append(x.transpose(1, 2).contiguous().requires_grad_())
    N, device = max(lengths), leaves[0].device
    mask = None
    if min(lengths) < N:
        mask = (torch.arange(N, device=device) < torch.tensor(lengths, device=device)[:, None])[:, None, None, :]

    def packed(name: str, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return unpad(x, lengths) if name in is_token else x

    return Padded(tuple(leaves), mask, packed)


def token_names(inputs: Inputs) -> tuple[str, ...]:
    """Which inputs have a row for each token; the others have one for each concept."""
    return {
        "concept_attention": ("k", "v"), "slot_attention": ("k", "v"), "token_attention": ("q",),
        "bixt_attention": ("token_qk", "token_v"),
    }[inputs.case.operator]  # fmt: skip


def on_padded(inputs: Inputs, function: Callable[..., Tensors]) -> Prepared:
    """A provider whose ``function(mask, *leaves)`` works on padded tensors."""
    layout = padded(inputs)
    first = {"concept_attention": ("q",), "token_attention": ("q",), "bixt_attention": ("concept_qk", "token_qk"),
             "slot_attention": ("q", "")}[inputs.case.operator]  # fmt: skip

    def outputs(results: Tensors) -> Tensors:
        return tuple(layout.packed(name, x) if name else x for name, x in zip(first, results, strict=True))

    def grads(results: Tensors) -> Tensors:
        return tuple(layout.packed(name, x) for name, x in zip(inputs.wanted, results, strict=True))

    return Prepared(lambda: as_tuple(function(layout.mask, *layout.leaves)), layout.leaves, outputs, grads)


# --- written by hand --------------------------------------------------------------------------------------------------


def by_hand_concept(mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def by_hand_token(mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).float() * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype) @ v


def by_hand_bixt(
    mask: Tensor | None, concept_qk: Tensor, concept_v: Tensor, token_qk: Tensor, token_v: Tensor
) -> Tensors:
    scores = (concept_qk @ token_qk.mT).float() * concept_qk.shape[-1] ** -0.5
    read = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return read.softmax(-1).to(token_v.dtype) @ token_v, scores.softmax(-2).to(concept_v.dtype).mT @ concept_v


def by_hand_slot(mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    share = ((q @ k.mT).float() * q.shape[-1] ** -0.5).softmax(-2)
    share = share if mask is None else share * mask
    weight = share + SLOT_EPS if mask is None else (share + SLOT_EPS) * mask
    return (weight / weight.sum(-1, keepdim=True)).to(v.dtype) @ v, share.sum(-1)


def by_hand_adaln(lengths: Tensor, total: int, x, branch, gate, shift, scale) -> Tensors:
    gate, shift, scale = (m.repeat_interleave(lengths, 0, output_size=total) for m in (gate, shift, scale))
    h = x + gate * branch
    return h, F.layer_norm(h, h.shape[-1:], eps=ADALN_EPS) * (1 + scale) + shift


def by_hand_head(targets: Tensor, token_weight: Tensor, smoothing: float, hidden: Tensor, weight: Tensor) -> Tensor:
    nll = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none", label_smoothing=smoothing)
    return (token_weight * nll).sum() / token_weight.sum()


def eager(compiled: bool) -> Provider:
    """The formula in plain torch, on padded tensors; through torch.compile if asked."""

    def wrap(function: Callable) -> Callable:
        if not compiled:
            return function
        # by default the compiled backward writes into what the forward saved, so it could not be timed by itself
        torch._functorch.config.donated_buffer = False
        return torch.compile(function, dynamic=False)

    def prepare(inputs: Inputs) -> Prepared:
        t, o, name = inputs.tensors, inputs.options, inputs.case.operator
        leaves = tuple(t[wanted] for wanted in inputs.wanted)
        if name == "linear_cross_entropy":
            function = wrap(by_hand_head)
            return Prepared(
                lambda: (function(t["targets"], t["token_weight"], o["label_smoothing"], *leaves),), leaves, same, same
            )
        if name == "adaln":
            function, lengths = wrap(by_hand_adaln), t["cu_seqlens"].diff().long()
            return Prepared(lambda: function(lengths, sum(o["lengths"]), *leaves), leaves, same, same)
        function = {
            "concept_attention": by_hand_concept, "token_attention": by_hand_token,
            "bixt_attention": by_hand_bixt, "slot_attention": by_hand_slot,
        }[name]  # fmt: skip
        return on_padded(inputs, wrap(function))

    return prepare


# --- torch's attention ------------------------------------------------------------------------------------------------


def sdpa(backend: SDPBackend) -> Provider:
    """scaled_dot_product_attention with one backend pinned. BiXT is two calls: one for each direction."""

    def prepare(inputs: Inputs) -> Prepared:
        name, is_cuda = inputs.case.operator, inputs.tensors["cu_seqlens"].is_cuda
        if name == "slot_attention":
            raise Unavailable("SDPA has no softmax over the queries")
        if not is_cuda and backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            raise Unavailable("needs a GPU")
        masked = name != "token_attention" and min(inputs.options["lengths"]) < max(inputs.options["lengths"])
        if masked and is_cuda and backend == SDPBackend.FLASH_ATTENTION:
            raise Unavailable("takes no mask")

        def function(mask: Tensor | None, *x: Tensor) -> Any:
            with sdpa_kernel(backend):
                if name == "bixt_attention":
                    concept_qk, concept_v, token_qk, token_v = x
                    read = F.scaled_dot_product_attention(concept_qk, token_qk, token_v, attn_mask=mask)
                    return read, F.scaled_dot_product_attention(token_qk, concept_qk, concept_v)
                return F.scaled_dot_product_attention(*x, attn_mask=mask if name == "concept_attention" else None)

        return on_padded(inputs, function)

    return prepare


def flex(inputs: Inputs) -> Prepared:
    """FlexAttention, compiled, with a block mask for ragged lengths."""
    name = inputs.case.operator
    if name not in ("concept_attention", "token_attention"):
        raise Unavailable("no such score function")
    if not inputs.tensors["cu_seqlens"].is_cuda:
        raise Unavailable("has no backward on a CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    layout, lengths = padded(inputs), inputs.options["lengths"]
    block_mask = None
    if layout.mask is not None and name == "concept_attention":
        ends = torch.tensor(lengths, device=layout.leaves[0].device)
        q, k = layout.leaves[:2]
        block_mask = create_block_mask(
            lambda b, h, i, j: j < ends[b], len(lengths), None, q.shape[2], k.shape[2], device=q.device
        )
    compiled = torch.compile(flex_attention, dynamic=False)
    return on_padded(inputs, lambda mask, q, k, v: compiled(q, k, v, block_mask=block_mask))


def flash_attn(version: int) -> Provider:
    """flash_attn_varlen_func of FlashAttention 2 (package flash_attn) or 3 (flash_attn_interface)."""

    def prepare(inputs: Inputs) -> Prepared:
        name, t = inputs.case.operator, inputs.tensors
        if name not in ("concept_attention", "token_attention"):
            raise Unavailable("no such operator")
        function = imported("flash_attn" if version == 2 else "flash_attn_interface").flash_attn_varlen_func
        leaves = tuple(t[wanted] for wanted in inputs.wanted)
        B, C = inputs.case.sizes["B"], inputs.case.sizes["C"]
        cu_concepts = torch.arange(B + 1, device=leaves[0].device, dtype=torch.int32) * C
        cu_tokens, N = t["cu_seqlens"], inputs.options["max_seqlen"]
        cu_q, cu_k, max_q, max_k = cu_concepts, cu_tokens, C, N
        if name == "token_attention":
            cu_q, cu_k, max_q, max_k = cu_tokens, cu_concepts, N, C

        def call() -> Tensors:
            flat = (x.flatten(0, 1) if x.ndim == 4 else x for x in leaves)
            out = function(*flat, cu_q, cu_k, max_q, max_k)
            out = out[0] if isinstance(out, tuple) else out
            return (out.view_as(leaves[0]),)

        return Prepared(call, leaves, same, same)

    return prepare


def imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Unavailable(f"not installed: {package}") from error


# --- heads ------------------------------------------------------------------------------------------------------------


def head(run: Callable[[Inputs, Tensor, Tensor], Tensor]) -> Provider:
    def prepare(inputs: Inputs) -> Prepared:
        if inputs.case.operator != "linear_cross_entropy":
            raise Unavailable("no such operator")
        leaves = tuple(inputs.tensors[wanted] for wanted in inputs.wanted)
        return Prepared(lambda: (run(inputs, *leaves),), leaves, same, same)

    return prepare


def weighted(inputs: Inputs, nll: Tensor) -> Tensor:
    token_weight = inputs.tensors["token_weight"]
    return (token_weight * nll).sum() / token_weight.sum()


@head
def liger(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    if not hidden.is_cuda:
        raise Unavailable("needs a GPU")
    function = imported("liger_kernel.ops").LigerFusedLinearCrossEntropyFunction
    smoothing = inputs.options["label_smoothing"]
    result = function.apply(hidden, weight, inputs.tensors["targets"], None, None, -100, 0.0, smoothing, "none")
    return weighted(inputs, result[0] if isinstance(result, tuple) else result)


def cut_cross_entropy(implementation: str) -> Provider:
    @head
    def run(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
        if inputs.options["label_smoothing"]:
            raise Unavailable("no label smoothing")
        if not hidden.is_cuda:
            raise Unavailable("needs a GPU")
        function = imported("cut_cross_entropy").linear_cross_entropy
        nll = function(hidden, weight, inputs.tensors["targets"], reduction="none", impl=implementation)
        return weighted(inputs, nll)

    return run


@head
def torch_linear_cross_entropy(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Tensor:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Unavailable(f"torch {torch.__version__} has none")
    if inputs.options["label_smoothing"]:
        raise Unavailable("materialises the logits with label smoothing")
    return weighted(inputs, function(hidden, weight, inputs.tensors["targets"], reduction="none"))


PROVIDERS: dict[str, Provider] = {
    "conceptron": ours("triton"),
    "conceptron (torch)": ours("torch"),
    "eager": eager(compiled=False),
    "torch.compile": eager(compiled=True),
    "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    "SDPA efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "SDPA math": sdpa(SDPBackend.MATH),
    "FlexAttention": flex,
    "flash_attn 2": flash_attn(2),
    "flash_attn 3": flash_attn(3),
    "Liger": liger,
    "CCE": cut_cross_entropy("cce"),
    "CCE exact": cut_cross_entropy("cce_exact"),
    "F.linear_cross_entropy": torch_linear_cross_entropy,
}
OF_OPERATOR = {  # providers whose row is shown for an operator even when they refuse the case
    "attention": ("conceptron", "conceptron (torch)", "eager", "torch.compile", "SDPA flash", "SDPA cuDNN",
                  "SDPA efficient", "SDPA math", "FlexAttention", "flash_attn 2", "flash_attn 3"),
    "bixt_attention": ("conceptron", "conceptron (torch)", "eager", "torch.compile", "SDPA flash", "SDPA cuDNN",
                       "SDPA efficient", "SDPA math"),
    "slot_attention": ("conceptron", "conceptron (torch)", "eager", "torch.compile"),
    "adaln": ("conceptron", "conceptron (torch)", "eager", "torch.compile"),
    "linear_cross_entropy": ("conceptron", "conceptron (torch)", "eager", "torch.compile", "Liger", "CCE", "CCE exact",
                             "F.linear_cross_entropy"),
}  # fmt: skip


def providers_of(operator: str) -> tuple[str, ...]:
    return OF_OPERATOR.get(operator, OF_OPERATOR["attention"])
