"""What is compared: for each operator its sizes, its inputs, and a float64 answer to check providers against.

A case is packed and may be ragged; peers that want padding get it made inside their own timed call only where a user
would have to make it there too (masks and unpadding count, tensors that a padded model already holds do not).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels.adaln.reference import reference_residual_modulate
from ...kernels.bixt_attention.reference import reference_bixt_attention
from ...kernels.concept_attention.reference import concept_attention
from ...kernels.linear_cross_entropy.reference import linear_cross_entropy
from ...kernels.slot_attention.reference import reference_slot_attention
from ...kernels.token_attention.reference import token_attention

OPERATORS = (
    "concept_attention", "token_attention", "bixt_attention", "slot_attention", "linear_cross_entropy", "adaln",
)  # fmt: skip
SLOT_EPS, ADALN_EPS = 1e-8, 1e-6  # the doors' defaults
KEEP_DTYPE = ("token_weight",)  # float32 whatever the activations are


@dataclass(frozen=True, eq=False)
class Case:
    """One operator at one size. ``label`` names it in tables and in pytest ids."""

    operator: str
    sizes: Mapping[str, int]
    ragged: bool = False

    @property
    def label(self) -> str:
        return "-".join(f"{name}{value}" for name, value in self.sizes.items()) + ("-ragged" * self.ragged)


@dataclass
class Inputs:
    """Tensors by name (those in ``wanted`` need gradients), and what is no tensor."""

    case: Case
    tensors: dict[str, Tensor]
    wanted: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> "Inputs":
        tensors = {
            name: x.detach().to(dtype) if x.is_floating_point() and name not in KEEP_DTYPE else x
            for name, x in self.tensors.items()
        }
        return Inputs(self.case, tensors, self.wanted, self.options).ready()

    def ready(self) -> "Inputs":
        for name in self.wanted:
            self.tensors[name] = self.tensors[name].detach().clone().requires_grad_()
        return self


def lengths_of(case: Case) -> list[int]:
    """Lengths of the B sequences: all N, or falling evenly from N to N / 2."""
    B, N = case.sizes["B"], case.sizes["N"]
    return [N - (N // 2) * i // max(1, B) if case.ragged else N for i in range(B)]


def attention_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    s, lengths = case.sizes, lengths_of(case)
    total = sum(lengths)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    concepts, tokens = (s["B"], s["C"], s["H"], s["D"]), (total, s["H"], s["D"])
    shapes = {
        "concept_attention": {"q": concepts, "k": tokens, "v": tokens},
        "token_attention": {"q": tokens, "k": concepts, "v": concepts},
        "slot_attention": {"q": concepts, "k": tokens, "v": tokens},
        "bixt_attention": {"concept_qk": concepts, "concept_v": concepts, "token_qk": tokens, "token_v": tokens},
    }[case.operator]
    tensors = {name: draw(*shape) for name, shape in shapes.items()}
    tensors["cu_seqlens"] = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32).to(device)
    return Inputs(case, tensors, tuple(shapes), {"max_seqlen": max(lengths), "lengths": lengths}).ready()


def head_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Rows of a trained model's scale: logits spread by about one, targets by Zipf's law, as text has them."""
    s = case.sizes
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(s["M"], s["d"], generator=generator)
    weight = torch.randn(s["V"], s["d"], generator=generator) * s["d"] ** -0.5
    ranks = torch.exp(torch.rand(s["M"], generator=generator) * torch.log(torch.tensor(float(s["V"])))).long() - 1
    tensors = {
        "hidden": hidden.to(device=device, dtype=dtype), "weight": weight.to(device=device, dtype=dtype),
        "targets": ranks.clamp(0, s["V"] - 1).to(device),
        "token_weight": (0.5 + torch.rand(s["M"], generator=generator)).to(device),
    }  # fmt: skip
    return Inputs(case, tensors, ("hidden", "weight"), {"label_smoothing": s.get("smoothing", 0) / 100}).ready()


def adaln_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    s, lengths = case.sizes, lengths_of(case)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    tensors = {name: draw(sum(lengths), s["d"]) for name in ("x", "branch")}
    tensors |= {name: draw(s["B"], s["d"]) for name in ("gate", "shift", "scale")}
    names = tuple(tensors)
    tensors["cu_seqlens"] = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32).to(device)
    return Inputs(case, tensors, names, {"lengths": lengths}).ready()


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    if case.operator == "linear_cross_entropy":
        return head_inputs(case, dtype, device)
    return adaln_inputs(case, dtype, device) if case.operator == "adaln" else attention_inputs(case, dtype, device)


def oracle(inputs: Inputs) -> tuple[Tensor, ...]:
    """The oracle's answer, in the dtype of the inputs."""
    t, o, cu_seqlens = inputs.tensors, inputs.options, inputs.tensors.get("cu_seqlens")
    scale = inputs.case.sizes.get("D", 1) ** -0.5
    match inputs.case.operator:
        case "concept_attention":
            return (concept_attention(t["q"], t["k"], t["v"], cu_seqlens)[0],)
        case "token_attention":
            return (token_attention(t["q"], t["k"], t["v"], cu_seqlens),)
        case "bixt_attention":
            names = ("concept_qk", "concept_v", "token_qk", "token_v")
            return reference_bixt_attention(*(t[name] for name in names), cu_seqlens, scale)
        case "slot_attention":
            return reference_slot_attention(t["q"], t["k"], t["v"], cu_seqlens, scale, "mean", SLOT_EPS)
        case "adaln":
            names = ("x", "branch", "gate", "shift", "scale")
            return reference_residual_modulate(*(t[name] for name in names), cu_seqlens, ADALN_EPS)
    return (linear_cross_entropy(
        t["hidden"], t["weight"], t["targets"], token_weight=t["token_weight"], label_smoothing=o["label_smoothing"]
    ),)  # fmt: skip
